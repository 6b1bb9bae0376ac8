"""Pipelines that load but can't be trained: one sentence with the model, the part and the fix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.base_model import describe
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.mini import pipeline_dir
from tests.image.tiny import made_part, shared
from tests.scripts.runs import train

Damage = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path):
    """The miniature's pipeline with copies of its small files and links to its weights."""
    copy = tmp_path / "model"
    for file in sorted(pipeline_dir().rglob("*")):
        target = copy / file.relative_to(pipeline_dir())
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            target.symlink_to(file)
        elif file.is_file():
            shutil.copy(file, target)
    return copy


def configured(file, **values):
    """Other values in a configuration; None takes one out."""

    def damage(folder):
        path = folder / file
        config = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def weighed(part, change):
    """Other weights; ``change`` is told the name of one of them."""

    def damage(folder):
        (path,) = (folder / part).glob("*.safetensors")
        tensors = load_file(path)
        path.unlink()
        change(tensors, sorted(tensors)[5])
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def pickled(part):
    def damage(folder):
        (path,) = (folder / part).glob("*.safetensors")
        path.unlink()
        torch.save({}, path.with_name("pytorch_model.bin"))

    return damage


def written(file, content):
    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        if content is not None:
            (folder / file).write_text(content)

    return damage


def drop(tensors, name):
    del tensors[name]


def spoil(tensors, name):
    tensors[name][..., 0] = float("-inf")


def inpainting(folder):
    configured("unet/config.json", in_channels=17)(folder)
    wide = {"conv_in.weight": torch.zeros(128, 17, 3, 3)}
    weighed("unet", lambda tensors, _: tensors.update(wide))(folder)


INDEX = json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "part-1.bin"}})
DDPM, FLOW = ["diffusers", "DDPMScheduler"], "FlowMatchEulerDiscreteScheduler"
SCHEDULER = "scheduler/scheduler_config.json"


def channels_of_another(folder):
    shutil.rmtree(folder / "vae")
    vae = made_part("StableDiffusion3Pipeline", "vae", latent_channels=8)
    vae.save_pretrained(folder / "vae")


CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "inpainting": (inpainting, ("17",)),
    "unet lacks": (weighed("unet", drop), ("unet", "lacks weights")),
    "unet infinite": (weighed("unet", spoil), ("not finite",)),
    "pickled": (pickled("vae"), ("vae", "pytorch_model.bin", "convert")),
    "index of pickles": (  # which libraries would read
        written("unet/diffusion_pytorch_model.safetensors.index.json", INDEX),
        ("unet", "part-1.bin", "convert"),
    ),
    "cut": (written("text_encoder_2/model.safetensors", "1234"), ("text_encoder_2", "again")),
    "no noise": (configured(SCHEDULER, beta_start=0.0, beta_end=0.0), ("noise levels",)),
    "flow": (configured("model_index.json", scheduler=["diffusers", FLOW]), (FLOW,)),
    "index": (written("model_index.json", "[1]"), ("JSON object",)),
    "time ids": (configured("unet/config.json", addition_time_embed_dim=16), ("288", "192")),
    "no tokenizer": (written("tokenizer_2/tokenizer.json", None), ("tokenizer_2", "no words")),
    "SD3, channels": (channels_of_another, ("8 channels",)),
    "SD3, SDXL's levels": (configured("model_index.json", scheduler=DDPM), ("DDPMScheduler",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_that_cannot_be_trained_is_a_sentence(name, folder, tmp_path):
    damage, parts = CASES[name]
    if name.startswith("SD3"):
        folder = Path(shutil.copytree(shared("StableDiffusion3Pipeline"), tmp_path / "flow"))
    damage(folder)
    with pytest.raises(UserError) as refusal:
        train(tmp_path / "run", pretrained_model_name_or_path=folder)
    for part in (*parts, str(folder)):
        assert part in str(refusal.value)
    assert str(refusal.value).endswith(".")
    assert not (tmp_path / "run" / "run.json").exists()


def test_another_autoencoder_has_to_fit_and_is_of_the_models_class(tmp_path):
    AutoencoderKL(latent_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match=r'"mini" can.t be trained .*channels'):
        train(tmp_path / "run", pretrained_vae_model_name_or_path=tmp_path / "four")
    made_part("QwenImagePipeline", "vae").save_pretrained(tmp_path / "video")
    for folder in (tmp_path / "video", pipeline_dir()):
        with pytest.raises(UserError, match=f'the autoencoder "{folder}"'):
            load_pipeline("mini", dtype=torch.float32, vae=str(folder))


def test_a_gated_model_is_told_how_to_get_it(monkeypatch):
    def gated(*_, **__):
        raise GatedRepoError("403", response=cast(Any, SimpleNamespace(headers={}, request=None)))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", gated)
    for load in (describe, lambda name: load_pipeline(name, dtype=torch.float32)):
        with pytest.raises(UserError, match=r'"org/gated".*accept its terms.*hf auth login'):
            load("org/gated")


def test_a_variant_is_taken_where_there_is_one(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load_pipeline(str(folder), dtype=torch.float32, variant="fp16").unet
    with pytest.raises(UserError, match='--variant "fp32" is of no file'):
        load_pipeline(str(folder), dtype=torch.float32, variant="fp32")
