"""Pipelines that cannot be trained are refused in a sentence with model, part and fix."""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from bilora_diffusion.core.errors import UserError, run_cli
from bilora_diffusion.image.base_model import read_base_model
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.task import DreamBooth
from bilora_diffusion.mini import pipeline_dir
from tests.image.tiny import made_part, shared
from tests.scripts.runs import train


@pytest.fixture
def folder(tmp_path):
    """Return a pipeline with copies of the miniature's small files and links to its weights."""
    copy = tmp_path / "model"
    for file in sorted(pipeline_dir().rglob("*")):
        target = copy / file.relative_to(pipeline_dir())
        target.parent.mkdir(parents=True, exist_ok=True)
        # Weights are large and only read.
        if file.suffix == ".safetensors":
            target.symlink_to(file)
        elif file.is_file():
            shutil.copy(file, target)
    return copy


def set_config(file, **values):
    """Return a function that changes values in a configuration file."""

    def damage(folder):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))

    return damage


def write_file(file, content):
    """Return a function that replaces a file, or a link to one, by a file with this content."""

    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_text(content)

    return damage


def change_weights(folder, part, change):
    """Call `change` with a part's weights and the name of one of them, and save the result."""
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    change(tensors, sorted(tensors)[5])
    save_file(tensors, path, metadata={"format": "pt"})


def lacks_weights(folder):
    change_weights(folder, "unet", lambda tensors, name: tensors.pop(name))


def has_infinite_weights(folder):
    change_weights(folder, "unet", lambda tensors, name: tensors[name][..., 0].fill_(-torch.inf))


def is_for_inpainting(folder):
    set_config("unet/config.json", in_channels=17)(folder)
    # The latents, the masked image's latents, and the mask: 8 + 8 + 1 channels.
    wide = {"conv_in.weight": torch.zeros(128, 17, 3, 3)}
    change_weights(folder, "unet", lambda tensors, _: tensors.update(wide))


def has_pickled_weights(folder):
    (path,) = (folder / "vae").glob("*.safetensors")
    path.unlink()
    torch.save({}, path.with_name("pytorch_model.bin"))


def lacks_words(folder):
    (folder / "tokenizer_2" / "tokenizer.json").unlink()


def has_latents_of_8_channels(folder):
    shutil.rmtree(folder / "vae")
    vae = made_part("StableDiffusion3Pipeline", "vae", latent_channels=8)
    vae.save_pretrained(folder / "vae")


INDEX_OF_PICKLES = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "part-1.bin"}})
DDPM, FLOW = "DDPMScheduler", "FlowMatchEulerDiscreteScheduler"
SCHEDULER = "scheduler/scheduler_config.json"
CASES = {
    "inpainting": (is_for_inpainting, ["17"]),
    "unet lacks": (lacks_weights, ["unet", "lacks weights"]),
    "unet infinite": (has_infinite_weights, ["not finite"]),
    "pickled": (has_pickled_weights, ["vae", "pytorch_model.bin", "convert"]),
    "index of pickles": (  # libraries would load it
        write_file("unet/diffusion_pytorch_model.safetensors.index.json", INDEX_OF_PICKLES),
        ["unet", "part-1.bin", "convert"],
    ),
    "cut": (write_file("text_encoder_2/model.safetensors", "1234"), ["text_encoder_2", "again"]),
    "no noise": (set_config(SCHEDULER, beta_start=0.0, beta_end=0.0), ["noise levels"]),
    "flow": (set_config("model_index.json", scheduler=["diffusers", FLOW]), [FLOW]),
    "index": (write_file("model_index.json", "[1]"), ["JSON object"]),
    "time ids": (set_config("unet/config.json", addition_time_embed_dim=16), ["288", "192"]),
    "no tokenizer": (lacks_words, ["tokenizer_2", "no words"]),
    "SD3, channels": (has_latents_of_8_channels, ["8 channels"]),
    "SD3, SDXL's levels": (set_config("model_index.json", scheduler=["diffusers", DDPM]), [DDPM]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_that_cannot_be_trained_is_refused_in_one_sentence(name, folder, tmp_path):
    damage, parts = CASES[name]
    if name.startswith("SD3"):
        folder = Path(shutil.copytree(shared("StableDiffusion3Pipeline"), tmp_path / "flow"))
    damage(folder)
    with pytest.raises(UserError) as refusal:
        train(tmp_path / "run", pretrained_model_name_or_path=folder)
    sentence = str(refusal.value)
    for part in [*parts, str(folder)]:
        assert part in sentence
    assert sentence.endswith(".")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_separate_autoencoder_must_fit_the_model_and_have_its_class(tmp_path):
    AutoencoderKL(latent_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match=r'"mini" can.t be trained .*channels'):
        train(tmp_path / "run", pretrained_vae_model_name_or_path=tmp_path / "four")
    made_part("QwenImagePipeline", "vae").save_pretrained(tmp_path / "video")
    for folder in (tmp_path / "video", pipeline_dir()):
        with pytest.raises(UserError, match=f'the autoencoder "{folder}"'):
            load_pipeline("mini", dtype=torch.float32, vae=str(folder))


def test_the_error_for_a_gated_model_says_how_to_get_access(monkeypatch):
    def gated(*_, **__):
        raise GatedRepoError("403", response=cast(Any, SimpleNamespace(headers={}, request=None)))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", gated)
    for load in (read_base_model, lambda name: load_pipeline(name, dtype=torch.float32)):
        with pytest.raises(UserError, match=r'"org/gated".*accept its terms.*hf auth login'):
            load("org/gated")


def test_an_existing_variant_is_loaded_and_a_missing_one_is_refused(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load_pipeline(str(folder), dtype=torch.float32, variant="fp16").unet
    with pytest.raises(UserError, match='--variant "fp32" is not among the files'):
        load_pipeline(str(folder), dtype=torch.float32, variant="fp32")


@pytest.mark.parametrize("kind", [AttributeError, NameError, KeyError])
@pytest.mark.parametrize("place", ["micro_batches", "to_device"])
def test_a_bug_during_setup_is_not_reported_as_bad_input(
    tmp_path, monkeypatch, capsys, place, kind
):
    """The message names the exception and the file with its traceback."""

    def defect(*args, **kwargs):
        raise kind("unett")

    monkeypatch.setattr(DreamBooth, place, defect)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_cli(lambda: train(tmp_path / "run")) == 1  # type: ignore[arg-type, return-value]
    (trace,) = tmp_path.rglob("error*.txt")
    assert f"in {defect.__name__}" in trace.read_text()
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert line.startswith(f"error: unexpected {kind.__name__}: ")
    assert str(trace) in line
