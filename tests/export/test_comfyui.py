"""ComfyUI's own code reads exported files and workflows, if COMFYUI is the path of a copy.

Install ComfyUI's requirements and run: COMFYUI=~/ComfyUI make test PYTEST_ARGS="-k comfyui"
"""

import asyncio
import os
import sys
from collections import defaultdict
from importlib import import_module as load
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.export.formats import primary_part
from bilora_diffusion.export.writer import save_diffusers
from bilora_diffusion.image.families import SDXL, family_of
from bilora_diffusion.image.pipeline import select_layers
from tests.export.comfy_names import place
from tests.export.export_models import add_adapters
from tests.image.test_comfy import comfy_levels, graph_of, pipeline_of
from tests.image.tiny import make_pipeline

COMFYUI = os.environ.get("COMFYUI", "")
MODELS = yaml.safe_load(Path(__file__).with_name("comfyui.yaml").read_text(encoding="utf-8"))
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
FOLDERS = ("loras", "checkpoints", "diffusion_models", "text_encoders", "vae")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI is not set to a copy of ComfyUI")


@pytest.fixture(params=MODELS)
def model(request, monkeypatch):
    """Return ComfyUI's model without weights; `pipeline_class` is diffusers' class."""
    monkeypatch.setattr(sys, "path", [*sys.path, COMFYUI])  # last, since ComfyUI also has an `app`
    load("comfy.cli_args").args.cpu = True
    sizes = MODELS[request.param]
    config = getattr(load("comfy.supported_models"), sizes["class"])(sizes["config"])
    model = config.get_model({}, device="meta")
    model.pipeline_class = request.param
    return model


def test_comfyui_applies_the_trained_changes(model, tmp_path, caplog):
    is_sdxl = model.pipeline_class == SDXL
    if is_sdxl:
        pipeline = pipeline_of(SDXL)
        models = {name: getattr(pipeline, name) for name in ("unet", *ENCODERS)}
        chosen_layers, file = ["all"], tmp_path / "dog" / "dog.safetensors"
    else:
        sizes = MODELS[model.pipeline_class].get("ours", {})
        pipeline = make_pipeline(model.pipeline_class, **sizes)
        models = {"transformer": pipeline.transformer}
        chosen_layers, file = ["attention"], tmp_path / "dog" / FILE_NAME
    for name, trained in models.items():
        targets = "all-linear"
        if name not in ENCODERS:
            targets = select_layers(chosen_layers, family_of(pipeline), trained)
        add_adapters(trained, AdapterSpec(rank=2, alpha=3, target_modules=targets))
    save_diffusers(tmp_path / "dog", models, base_model="some/base", kohya=is_sdxl)

    # ComfyUI's patches, by its own names for the weights
    lora = load("comfy.lora")
    keys = lora.model_lora_keys_unet(model, {})
    unet_names = {}
    if is_sdxl:
        lora.model_lora_keys_clip(load("comfy.sdxl_clip").SDXLClipModel("meta"), keys)
        unet_names = load("comfy.utils").unet_to_diffusers(model.model_config.unet_config)
    patches = defaultdict(list)
    converted = load("comfy.lora_convert").convert_lora(load_file(file))
    for key, patch in lora.load_lora(converted, keys).items():
        # For a part of a fused weight, the key also has the part's offset.
        name, offset = (key, None) if isinstance(key, str) else key
        patches[name.removeprefix("diffusion_model.")].append((1.0, patch, 1.0, offset, None))
    assert not [line for line in caplog.messages if "not loaded" in line]

    # ComfyUI's name -> number of the part -> the trained change B A
    expected = defaultdict(dict)
    for name, trained in models.items():
        for layer in primary_part(name, trained).layers:
            part = 0
            if name == "unet":
                key = unet_names[f"{layer.name}.weight"].removesuffix(".weight")
            elif name in ENCODERS:
                inner = "" if layer.name == "text_projection" else "text_model."
                key = f"{ENCODERS[name]}.transformer.{inner}{layer.name}"
            else:
                key, part = place(type(trained).__name__, layer.name)
            expected[f"{key}.weight"][part] = layer.B.flatten(1) @ layer.A.flatten(1)
    assert patches.keys() == expected.keys()
    weights = model.diffusion_model.state_dict()
    for key, parts in expected.items():
        shape = weights[key].shape if key in weights else parts[0].shape
        change = torch.zeros(shape)
        for part, delta in parts.items():
            change.flatten(1)[part * len(delta) :][: len(delta)] = delta
        result = lora.calculate_weight(patches[key], torch.zeros_like(change), key)
        torch.testing.assert_close(result, change)


def nodes_reading(folder, monkeypatch):
    """Load ComfyUI's nodes and let them look for all files in one folder."""
    nodes = load("nodes")
    comfy_folders = load("folder_paths").folder_names_and_paths
    for name in ("flux", "model_advanced", "sd3", "custom_sampler", "hooks"):
        file = f"{COMFYUI}/comfy_extras/nodes_{name}.py"
        assert asyncio.run(nodes.load_custom_node(file, module_parent="comfy_extras"))
    for kind in FOLDERS:
        monkeypatch.setitem(comfy_folders, kind, ([str(folder)], {".safetensors"}))
    return nodes


@pytest.mark.parametrize("guidance_from", ["adapter", "base", 0.5])
def test_comfyui_accepts_the_workflow_and_computes_its_noise_levels(
    guidance_from, model, tmp_path, monkeypatch
):
    if guidance_from != "adapter" and model.pipeline_class == "FluxPipeline":
        pytest.skip("FLUX.1 makes no unconditional prediction")
    nodes = nodes_reading(tmp_path, monkeypatch)
    graph = graph_of(pipeline_of(model.pipeline_class), guidance_from)
    patched = load("comfy.model_patcher").ModelPatcher(model, "cpu", "cpu")
    levels = None
    for node in graph.values():
        kind, inputs = node["class_type"], node["inputs"]
        declared = nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
        assert inputs.keys() <= declared["required"].keys() | declared.get("optional", {}).keys()
        for value in inputs.values():
            if str(value).endswith(".safetensors"):
                (tmp_path / value).touch()
        if kind.startswith("ModelSampling"):
            (patched,) = nodes.NODE_CLASS_MAPPINGS[kind]().patch(**(inputs | {"model": patched}))
        elif kind == "KSampler":
            sampling = patched.get_model_object("model_sampling"), inputs["scheduler"]
            levels = load("comfy.samplers").calculate_sigmas(*sampling, inputs["steps"])
        elif kind == "Flux2Scheduler":
            (levels,) = nodes.NODE_CLASS_MAPPINGS[kind].execute(**inputs).args
    valid, *_, problems = asyncio.run(load("execution").validate_prompt("dog", graph, None))
    assert valid, problems
    torch.testing.assert_close(levels[:-1], comfy_levels(graph))


def test_comfyui_adds_a_hooked_lora_to_each_prompt_at_its_strength(monkeypatch, tmp_path):
    """Run the nodes of a workflow with guidance from another model, in the miniature's sizes."""
    monkeypatch.setattr(sys, "path", [*sys.path, COMFYUI])
    load("comfy.cli_args").args.cpu = True
    nodes = nodes_reading(tmp_path, monkeypatch)
    samplers = load("comfy.samplers")
    unet = pipeline_of(SDXL).unet
    add_adapters(unet, AdapterSpec(rank=2, alpha=1, target_modules=("to_q", "to_v")))
    save_diffusers(tmp_path / "dog", {"unet": unet}, base_model="some/base", kohya=True)
    (tmp_path / "dog" / "dog.safetensors").rename(tmp_path / "dog.safetensors")
    # ComfyUI embeds each of the six sizes in 256 numbers, in addition to 16 numbers of the text
    # here, and treats a model with more than four channels as an inpainting model.
    sizes = MODELS[SDXL]["config"] | {
        "adm_in_channels": 6 * 256 + 16,
        "in_channels": 4,
        "out_channels": 4,
    }
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu")
    model = load("comfy.supported_models").SDXL(sizes).get_model({}, device=device)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05, generator=generator)
    patcher = load("comfy.model_patcher").ModelPatcher(model, device, device)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    prompts = torch.randn(2, 1, 7, 192, generator=generator)
    pooled = torch.randn(1, 16, generator=generator)

    def predictions(patcher, strengths=(0.0, 0.0)):
        """Return the first step's conditional and unconditional prediction at hook strengths."""
        conditions = []
        for prompt, strength in zip(prompts, strengths, strict=True):
            condition = [[prompt, {"pooled_output": pooled}]]
            if strength:
                create = nodes.NODE_CLASS_MAPPINGS["CreateHookLoraModelOnly"]()
                (hooks,) = create.create_hook_model_only("dog.safetensors", strength)
                attach = nodes.NODE_CLASS_MAPPINGS["ConditioningSetProperties"]()
                (condition,) = attach.set_properties(condition, 1.0, "default", hooks=hooks)
            conditions.append(condition)
        first_step = []

        def record(arguments):
            first_step.extend([arguments["cond_denoised"], arguments["uncond_denoised"]])
            return arguments["denoised"]

        patcher = patcher.clone()
        patcher.set_model_sampler_post_cfg_function(record)
        guider = samplers.CFGGuider(patcher)
        guider.set_conds(*conditions)
        guider.set_cfg(3.0)
        sigmas = torch.tensor([5.0, 0.0])
        guider.sample(noise, torch.zeros_like(noise), samplers.ksampler("euler"), sigmas, seed=0)
        return first_step

    def adapted_predictions(strength):
        load_lora = nodes.LoraLoaderModelOnly().load_lora_model_only
        return predictions(*load_lora(patcher, "dog.safetensors", strength))

    base = predictions(patcher)
    adapted = adapted_predictions(1.0)
    assert (adapted[1] - base[1]).abs().max() > 1e-3
    # The hook changes only the conditional prediction; without a hook, both were changed.
    hooked = predictions(patcher, (1.0, 0.0))
    torch.testing.assert_close(hooked[0], adapted[0])
    torch.testing.assert_close(hooked[1], base[1])
    # Two hooks of the same file each have their own strength.
    hooked = predictions(patcher, (1.0, 0.5))
    torch.testing.assert_close(hooked[0], adapted[0])
    torch.testing.assert_close(hooked[1], adapted_predictions(0.5)[1])
