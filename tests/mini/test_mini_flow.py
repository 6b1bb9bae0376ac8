"""mini-flow as shipped: small, loadable by diffusers alone, and it draws what it is told to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from bilora_diffusion import mini
from bilora_diffusion.mini import scorer
from tools.mini.scorer_figures import read_heldout

FOLDER = mini.flow_dir()
ICONS = 24


def test_the_folder_is_small_and_shares_encoders_and_autoencoder_with_the_miniature():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 30e6
    for path in (path for path in files if path.suffix == ".safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    for part in ("vae", "text_encoder", "text_encoder_2"):
        own, original = (
            load_file(next((folder / part).glob("*.safetensors")))
            for folder in (FOLDER, mini.pipeline_dir())
        )
        added = {name for name in own if name.startswith("text_projection")} - original.keys()
        assert len(own) - len(added) == len(original)
        for name, value in original.items():
            named = name if name in own else f"text_model.{name}"
            assert torch.equal(own[named], value), name


@pytest.mark.slow
@torch.no_grad()
def test_it_draws_icons_that_the_scorer_recognizes():
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        FOLDER, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    _, labels = read_heldout()
    labels = labels[:ICONS]
    drawn = pipeline(
        [f"a flat icon of a {label}" for label in labels],
        guidance_scale=4.0,
        num_inference_steps=20,
        height=64,
        width=64,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(number) for number in range(ICONS)],
    ).images
    loaded: Any = scorer.load()
    encoder, preprocess, tokenize = loaded
    seen = encoder.encode_image(torch.stack([preprocess(image) for image in drawn]), normalize=True)
    told = encoder.encode_text(tokenize([f"a flat icon of a {label}" for label in labels]), True)
    found = (seen @ told.T).argmax(dim=1)
    right = float((found == torch.arange(ICONS)).float().mean())
    assert right > 0.9  # chance: 1 / 24
