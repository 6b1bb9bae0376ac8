"""Diffusion transformers: exported files in pipelines, ComfyUI, conversions and run folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.export.__main__ import main
from bilora_diffusion.export.conversion import convert
from bilora_diffusion.export.lorafile import inspect
from bilora_diffusion.export.writer import save_diffusers
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.pipeline import load_pipeline, select_layers
from bilora_diffusion.run.folder import clear, guard
from eval.load import applied
from eval.sources import find
from tests.export.comfy_names import NAMES, place
from tests.export.export_models import FACTS, add_adapters, equal
from tests.image.tiny import FILES, make_pipeline, shared
from tests.scripts.runs import copied, train_once

SD3 = "StableDiffusion3Pipeline"
FAST = (SD3, "FluxPipeline")
ROOT = Path(__file__).resolve().parents[2]


def trained_pipeline(kind, layers="attention", **options):
    """Return a tiny pipeline whose transformer has a random primary and auxiliary."""
    pipeline = make_pipeline(kind)
    places = select_layers([layers], family_of(pipeline), pipeline.transformer)
    spec = AdapterSpec(rank=2, alpha=3, target_modules=places, **options)
    model = add_adapters(pipeline.transformer, spec)
    with torch.no_grad():
        for parameter in adapters.parameters(model, PRIMARY):
            if parameter.dim() > 1:  # not DoRA's magnitudes
                parameter.mul_(0.3)
    return pipeline


def export(folder, pipeline):
    """Export a pipeline's adapters and return the report of the writer's check."""
    models = {"transformer": pipeline.transformer}
    return save_diffusers(folder, models, base_model="some/base", extra_metadata=FACTS)


@torch.no_grad()
def output(pipeline):
    """Return the transformer's prediction for latents of two random images and two prompts."""
    family = family_of(pipeline)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    space = family.latent_space(pipeline.vae)
    latents = space.encode(space.distribution(pipeline.vae, pixels)[0])
    embeddings = family.embed(pipeline, ["a fox", "an icon of a cat"])
    pipeline.transformer.eval()
    return family.predict(pipeline.transformer, latents, torch.tensor([0.3, 0.8]), embeddings)


def slow_kinds():
    """Return cases of all kinds with adapters on all layers; all but two kinds are slow."""
    parameters = []
    for kind in FILES:
        marks = [] if kind in FAST else [pytest.mark.slow]
        parameters.append(pytest.param(kind, "all", False, marks=marks))
    return parameters


@pytest.mark.parametrize(("kind", "layers", "dora"), [*slow_kinds(), (SD3, "attention", True)])
def test_a_pipeline_with_the_exported_file_predicts_like_the_trained_model(
    kind, layers, dora, tmp_path
):
    source = trained_pipeline(kind, layers, use_dora=dora)
    untrained = make_pipeline(kind)
    if not hasattr(untrained, "load_lora_weights"):
        pytest.skip(f"diffusers' {kind} has no load_lora_weights")
    # As in the trained model: torch uses another kernel if a weight requires gradients.
    untrained.transformer.requires_grad_(False)
    with adapters.only(source.transformer, [PRIMARY]):
        expected = output(source)
    assert export(tmp_path, source)["max_relative_difference"] < 2e-7
    before = output(untrained)
    untrained.load_lora_weights(tmp_path)
    size = (expected - before).abs().max()
    assert size > 1e-2
    torch.testing.assert_close(output(untrained), expected, rtol=1e-5, atol=3e-5)
    untrained.unload_lora_weights()
    assert torch.equal(output(untrained), before)


@pytest.mark.parametrize("kind", FILES)
def test_keys_and_metadata_follow_diffusers_format(kind, tmp_path):
    pipeline = trained_pipeline(kind)
    export(tmp_path / "run", pipeline)
    file = tmp_path / "run" / FILE_NAME
    layers = [factor.name for factor in adapters.factors(pipeline.transformer, PRIMARY)]
    keys = [f"transformer.{name}.lora_A.weight" for name in layers]
    keys += [f"transformer.{name}.lora_B.weight" for name in layers]
    assert set(load_file(file)) == set(keys)
    contents = inspect(file)
    assert (contents.format, contents.auxiliary) == ("diffusers", False)
    assert contents.layers == {"transformer": len(layers)}
    config = json.loads(contents.metadata["lora_adapter_metadata"])
    assert all(name.startswith("transformer.") for name in config)
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 2
    assert contents.metadata["ss_network_dim"] == "2"
    # kohya's module reads other keys
    assert not {"ss_network_module", "modelspec.architecture"} & contents.metadata.keys()


@pytest.mark.parametrize("kind", FILES)
def test_exactly_the_families_with_comfyui_support_have_its_layer_names(kind):
    pipeline = trained_pipeline(kind)
    model = type(pipeline.transformer).__name__
    assert (family_of(pipeline).comfyui is not None) == (model in NAMES)
    if model in NAMES:
        layers = [factor.name for factor in adapters.factors(pipeline.transformer, PRIMARY)]
        # No two layers share a place.
        assert len({place(model, name) for name in layers}) == len(layers)


@pytest.mark.parametrize("kind", FILES)
def test_files_whose_keys_do_not_name_the_model_are_converted(kind, tmp_path):
    """These are PEFT's keys and the keys that diffusers' `save_lora_adapter` writes."""
    export(tmp_path / "run", trained_pipeline(kind))
    file = tmp_path / "run" / FILE_NAME
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    for name, prefix in (("diffusers", ""), ("peft", "base_model.model.")):
        tensors = {}
        for key, tensor in load_file(file).items():
            tensors[prefix + key.removeprefix("transformer.")] = tensor
        foreign = tmp_path / f"{name}.safetensors"
        save_file(tensors, foreign)
        assert equal(convert(foreign, "diffusers", tmp_path / f"back-{name}.safetensors"), file)


def test_kohyas_format_is_refused(tmp_path, capsys):
    pipeline = trained_pipeline(SD3)
    models = {"transformer": pipeline.transformer}
    with pytest.raises(UserError, match="SDXL only"):
        save_diffusers(tmp_path / "run", models, base_model="some/base", kohya=True)
    assert not (tmp_path / "run").exists()
    export(tmp_path / "run", pipeline)
    source = tmp_path / "run" / FILE_NAME
    assert main([str(source), "--to", "kohya"]) == 2
    assert "diffusers' format" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]
    foreign = tmp_path / "flux.safetensors"
    tensors = {
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 4),
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(4, 2),
    }
    save_file(tensors, foreign)
    assert main([str(foreign)]) == 0  # inspection needs no layer names
    with pytest.raises(UserError, match="double_blocks_0_img_attn_proj is not a layer of SDXL"):
        convert(foreign, "diffusers")


# Name of a run -> its options; the first run is Bi-LoRA, the second full fine-tuning
RUNS: dict[str, dict[str, Any]] = {"lora": {"checkpointing_steps": 1}, "whole": {"method": "full"}}


def run(name):
    """Return the folder of a run from RUNS on Stable Diffusion 3, which all tests share."""
    options = RUNS[name]
    return train_once(name, pretrained_model_name_or_path=shared(SD3), resolution=64, **options)


@pytest.mark.slow
def test_a_run_writes_only_the_diffusers_file_and_its_checkpoint_exports_the_same(tmp_path):
    folder = copied(run("lora"), tmp_path / "lora")
    assert not list(folder.glob("lora*.safetensors"))  # a kohya file would be named after the run
    workflow = (folder / "lora.comfy.json").read_text(encoding="utf-8")
    assert '"base.safetensors"' in workflow
    assert '"lora.safetensors"' in workflow
    assert "CreateHookLoraModelOnly" not in workflow
    # The workflow with guidance from the base model
    by_base = (folder / "lora.base.comfy.json").read_text(encoding="utf-8")
    assert "CreateHookLoraModelOnly" in by_base
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "`lora.base.comfy.json`" in readme
    assert "`lora.comfy.json`" in readme
    assert not list(run("whole").glob("*.comfy.json"))
    contents = inspect(folder / FILE_NAME)
    assert set(contents.layers) == {"transformer"}
    assert contents.metadata["modelspec.title"] == "lora"
    assert main([str(folder), "--step", "2"]) == 0
    (exported_file,) = (folder / "exports" / "step-2").iterdir()
    assert equal(exported_file, folder / FILE_NAME)
    assert main([str(folder), "--step", "2", "--to", "kohya"]) == 2


@pytest.mark.slow
def test_the_weights_are_refused_on_another_kind_of_model():
    mini = load_pipeline("mini", dtype=torch.float32)
    for name, word in (("lora", "does not fit the base model"), ("whole", "has no")):
        with pytest.raises(UserError, match=word), applied(mini, find(str(run(name)))):
            pass


@pytest.mark.slow
def test_a_fresh_start_deletes_only_a_runs_own_transformer(tmp_path):
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="was not written by full fine-tuning"):
        guard(tmp_path, None, exports_weights=True)
    (tmp_path / "run.json").write_text((run("whole") / "run.json").read_text())
    for ending in ("comfy.json", "base.comfy.json"):
        (tmp_path / f"{tmp_path.name}.{ending}").touch()
    clear(tmp_path, overwrite=True)
    assert not list(tmp_path.iterdir())
