"""Prompt embeddings and images, against diffusers' own pipeline."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bilora_diffusion.core.errors import TrainingError
from bilora_diffusion.image.captions import PromptCache
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.disk_cache import DiskCache
from bilora_diffusion.image.families.lumina2 import Lumina2
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.image.latents import Encoder, LatentSpace
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import embed, embed_negative, generate
from bilora_diffusion.image.script import missing_class_images
from bilora_diffusion.image.stream import TrainingStream
from bilora_diffusion.image.task import DreamBooth
from tests.scripts.runs import flags

PROMPTS = ["a TOK icon of a rabbit, in the style of TOK", ""]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("mini", dtype=torch.float32)


def picture(name, pixels=None) -> Any:
    """A draw of an image, black by default."""
    pixels = torch.zeros(3, 64, 64) if pixels is None else pixels
    return SimpleNamespace(name=name, content=(name,), read=lambda: (pixels, None))


def test_embeddings_equal_the_pipelines(pipeline):
    theirs = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    ours, cached = embed(pipeline, PROMPTS), PromptCache(pipeline, torch.device("cpu"))(PROMPTS)
    for name, part in {"sequence": theirs[0], "pooled": theirs[2]}.items():
        assert torch.equal(ours[name], part)
        torch.testing.assert_close(cached[name], part)  # each is embedded on its own
    negative = embed_negative(pipeline, 2)
    assert torch.equal(negative["sequence"], theirs[1])
    assert torch.equal(negative["pooled"], theirs[3])


@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_caption_is_what_guidance_leads_away_from(zeros, tmp_path):
    pipeline = load_pipeline("mini", dtype=torch.float32)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    images = open_images("mini", caption_column="prompt")
    inputs: dict[str, Any] = {
        "latents": torch.randn(2, 8, 8, 8),
        "noise": torch.randn(2, 8, 8, 8),
        "level_index": torch.tensor([300, 300]),
        "is_instance": torch.ones(2, dtype=torch.bool),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    }
    losses = []
    for trained in (None, True):
        options = {"train_text_encoder": trained, "caption_dropout": 0.5}
        cfg = resolve(flags(tmp_path, **options))
        task = DreamBooth(cfg, pipeline, TrainingStream(cfg, images))
        if not trained:
            task.embed(torch.device("cpu"))
            conditions, negative = task.condition(PROMPTS), embed_negative(pipeline, 1)
            assert (negative["pooled"] == 0).all() == zeros
            for name, values in negative.items():
                torch.testing.assert_close(conditions[name][1], values[0])
                assert (conditions[name][0] != 0).any()
        with torch.no_grad():
            losses.append(task.module.sample_losses({**inputs, **task.condition(PROMPTS)}))
    torch.testing.assert_close(*losses)


def test_an_image_does_not_depend_on_its_batch(pipeline):
    prompts, seeds, before = [PROMPTS[0]] * 3, [1, 2, 3], torch.get_rng_state()
    batched = generate(pipeline, prompts, seeds, size=64, steps=2, batch=3)
    single = generate(pipeline, prompts, seeds, size=64, steps=2, batch=1)
    for a, b in zip(batched, single, strict=True):
        difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
        assert difference.max() <= 1
    assert torch.equal(before, torch.get_rng_state())


def test_an_image_that_is_not_finite_is_refused_by_its_name(pipeline, tmp_path):
    space, device = LatentSpace.from_config(pipeline.vae), torch.device("cpu")
    sample = picture("a.png")
    disk = DiskCache(tmp_path)
    nan = torch.full((4, 8, 8), math.nan)
    disk.put({"mean": nan, "std": nan.clone()}, *sample.content)
    with pytest.raises(TrainingError, match=r"'a.png' is not finite.*--disk_cache"):
        Encoder(pipeline.vae, space, device, lambda _: True, disk)([sample])
    sample.read = lambda: (torch.full((3, 64, 64), math.inf), None)
    with pytest.raises(TrainingError, match=r"'a.png' is not finite"):
        Encoder(pipeline.vae, space, device)([sample])
    overflowing = pipeline.unet.conv_out.register_forward_hook(
        lambda *options: options[2] * math.inf
    )
    with pytest.raises(TrainingError, match=r"'an icon' with seed 5 is not finite.*bf16"):
        generate(pipeline, ["an icon"], [5], size=64, steps=1)
    overflowing.remove()


@pytest.mark.parametrize("family", [StableDiffusionXL, Lumina2])
@pytest.mark.parametrize("bf16", [True, False])
def test_flow_models_make_their_images_in_no_fp16(family, bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    half = torch.float16 if family is StableDiffusionXL else torch.bfloat16
    expected = half if bf16 or family is StableDiffusionXL else torch.float32
    assert family().precision(torch.device("cuda")) == expected
    assert family().precision(torch.device("cpu")) == torch.float32


def test_the_numbers_of_missing_class_images_are_those_that_none_has(tmp_path):
    def missing(*names, count):
        return missing_class_images([tmp_path / name for name in names], count)

    hashed = "{}-0123456789ab.png".format
    assert missing(count=3) == [0, 1, 2]
    assert missing(hashed(0), hashed(1), count=4) == [2, 3]
    # Two processes were interrupted, one of them ahead of the other.
    assert missing(*map(hashed, (0, 1, 2, 3, 4, 6)), count=8) == [5, 7]
    assert missing("mine.jpg", "my 2.png", count=3) == [2]
    assert missing(hashed(0), "mine.jpg", count=1) == []
