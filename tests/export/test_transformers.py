"""Transformers: their files in pipelines, ComfyUI and conversions, and runs that leave them."""

import json
import re
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
from bilora_diffusion.export.reader import verify
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


def trained(kind, layers="attention", **options):
    """A tiny pipeline whose transformer has a primary and an auxiliary of random values."""
    pipeline = make_pipeline(kind)
    places = select_layers([layers], family_of(pipeline), pipeline.transformer)
    spec = AdapterSpec(target_modules=places, **{"rank": 2, "alpha": 3, **options})
    model = add_adapters(pipeline.transformer, spec)
    with torch.no_grad():
        for parameter in adapters.parameters(model, PRIMARY):
            parameter.mul_(0.3 if parameter.dim() > 1 else 1)
    return pipeline


def exported(folder, pipeline):
    models = {"transformer": pipeline.transformer}
    return save_diffusers(folder, models, base_model="some/base", extra_metadata=FACTS)


@torch.no_grad()
def output(pipeline):
    """The transformer's prediction for latents of noise and two prompts."""
    family, random = family_of(pipeline), torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 64, 64, generator=random)
    space = family.latent_space(pipeline.vae)
    latents = space.encode(space.distribution(pipeline.vae, pixels)[0])
    embeddings = family.embed(pipeline, ["a fox", "an icon of a cat"])
    pipeline.transformer.eval()
    return family.predict(pipeline.transformer, latents, torch.tensor([0.3, 0.8]), embeddings)


@pytest.mark.parametrize(
    ("kind", "layers", "dora"),
    [
        *(pytest.param(k, "all", False, marks=[pytest.mark.slow] * (k not in FAST)) for k in FILES),
        (SD3, "attention", True),
    ],
)
def test_the_pipeline_loads_what_was_trained(kind, layers, dora, tmp_path):
    source, untrained = trained(kind, layers, use_dora=dora), make_pipeline(kind)
    if not hasattr(untrained, "load_lora_weights"):
        pytest.skip(f"diffusers' {kind} has no load_lora_weights")
    # As PEFT leaves it: torch takes another kernel for a weight that requires gradients.
    untrained.transformer.requires_grad_(False)
    with adapters.only(source.transformer, [PRIMARY]):
        expected = output(source)
    exported(tmp_path, source)
    models = {"transformer": source.transformer}
    assert verify(tmp_path, models)["max_relative_difference"] < 2e-7
    before = output(untrained)
    untrained.load_lora_weights(tmp_path)
    size = (expected - before).abs().max()
    assert size > 1e-2
    torch.testing.assert_close(output(untrained), expected, rtol=1e-5, atol=3e-5)
    untrained.unload_lora_weights()
    assert torch.equal(output(untrained), before)


@pytest.mark.parametrize("kind", FILES)
def test_keys_and_metadata_are_diffusers_and_those_that_the_docs_name_for_comfyui(kind, tmp_path):
    pipeline = trained(kind)
    file = exported(tmp_path / "run", pipeline)
    layers = [factor.name for factor in adapters.factors(pipeline.transformer, PRIMARY)]
    sides = [f"transformer.{name}.lora_{side}.weight" for name in layers for side in "AB"]
    assert set(load_file(file)) == set(sides)
    contents = inspect(file)
    assert (contents.format, contents.auxiliary) == ("diffusers", False)
    assert contents.layers == {"transformer": len(layers)}
    described = json.loads(contents.metadata["lora_adapter_metadata"])
    assert all(name.startswith("transformer.") for name in described)
    assert described["transformer.r"] == described["transformer.lora_alpha"] == 2
    assert contents.metadata["ss_network_dim"] == "2"
    # kohya's module reads other keys
    assert not {"ss_network_module", "modelspec.architecture"} & contents.metadata.keys()
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|", page, re.MULTILINE)
    reads = {title: comfyui for title, _, comfyui in rows}
    model = type(pipeline.transformer).__name__
    assert reads[family_of(pipeline).title] == ("yes" if model in NAMES else "no")
    places = {place(model, name) for name in layers if model in NAMES}
    assert len(places) == (len(layers) if model in NAMES else 0)  # no two of them in one place
    # PEFT's keys, and those that diffusers' `save_lora_adapter` writes, do not say the model.
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    for prefix in ("", "base_model.model."):
        foreign = tmp_path / f"foreign{len(prefix)}.safetensors"
        stored = load_file(file).items()
        save_file({prefix + k.removeprefix("transformer."): v for k, v in stored}, foreign)
        assert equal(convert(foreign, "diffusers", foreign.with_name(f"back-{foreign.name}")), file)


def test_kohyas_format_is_refused_in_one_sentence(tmp_path, capsys):
    pipeline = trained(SD3)
    models = {"transformer": pipeline.transformer}
    with pytest.raises(UserError, match="SDXL only"):
        save_diffusers(tmp_path / "run", models, base_model="some/base", kohya=True)
    assert not (tmp_path / "run").exists()
    source = exported(tmp_path / "run", pipeline)
    assert main([str(source), "--to", "kohya"]) == 2
    assert "diffusers' format" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]
    key = "lora_unet_double_blocks_0_img_attn_proj"
    foreign = {f"{key}.lora_down.weight": torch.ones(2, 4)}
    foreign[f"{key}.lora_up.weight"] = torch.ones(4, 2)
    save_file(foreign, tmp_path / "flux.safetensors")
    assert main([str(tmp_path / "flux.safetensors")]) == 0  # a look at it needs no names
    with pytest.raises(UserError, match="double_blocks_0_img_attn_proj is no layer of SDXL"):
        convert(tmp_path / "flux.safetensors", "diffusers")


RUNS: dict[str, dict[str, Any]] = {"lora": {"checkpointing_steps": 1}, "whole": {"method": "full"}}


def run(name):
    """Of Bi-LoRA, or of full fine-tuning; shared."""
    base = {"pretrained_model_name_or_path": shared(SD3), "resolution": 64}
    return train_once(name, **base, **RUNS[name])


@pytest.mark.slow
def test_a_run_leaves_diffusers_file_alone_and_its_checkpoints_the_same(tmp_path):
    folder = copied(run("lora"), tmp_path / "lora")
    assert not list(folder.glob("lora*.safetensors"))  # kohya's would be named after the run
    workflow = (folder / "lora.comfy.json").read_text(encoding="utf-8")
    assert {"base.safetensors", "lora.safetensors"} <= {*re.findall(r'"([\w.]+)"', workflow)}
    by_base = (folder / "lora.base.comfy.json").read_text(encoding="utf-8")
    assert "CreateHookLoraModelOnly" in by_base
    assert "CreateHookLoraModelOnly" not in workflow
    assert "`lora.base.comfy.json`" in (folder / "README.md").read_text(encoding="utf-8")
    assert "`lora.comfy.json`" in (folder / "README.md").read_text(encoding="utf-8")
    assert not list(run("whole").glob("*.comfy.json"))
    contents = inspect(folder / FILE_NAME)
    assert set(contents.layers) == {"transformer"}
    assert contents.metadata["modelspec.title"] == "lora"
    assert main([str(folder), "--step", "2"]) == 0
    (exported_file,) = (folder / "exports" / "step-2").iterdir()
    assert equal(exported_file, folder / FILE_NAME)
    assert main([str(folder), "--step", "2", "--to", "kohya"]) == 2


def test_the_weights_are_refused_on_another_kind_of_model():
    mini = load_pipeline("mini", dtype=torch.float32)
    for name, word in (("lora", "can't be loaded"), ("whole", "has no")):
        with pytest.raises(UserError, match=word), applied(mini, find(str(run(name)))):
            pass


def test_a_fresh_start_deletes_a_runs_own_transformer_only(tmp_path):
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="not of a run of full fine-tuning"):
        guard(tmp_path, None, exports_weights=True)
    (tmp_path / "run.json").write_text((run("whole") / "run.json").read_text())
    for ending in ("comfy.json", "base.comfy.json"):
        (tmp_path / f"{tmp_path.name}.{ending}").touch()
    clear(tmp_path, overwrite=True)
    assert not list(tmp_path.iterdir())
