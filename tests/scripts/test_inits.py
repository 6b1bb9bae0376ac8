"""Whole runs whose base weights are changed, by an init or to 4 bits: what they see and leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from bilora_diffusion import adapters, mini
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.run import runlog
from bilora_diffusion.run.checkpoint import ADAPTERS
from tests.scripts.runs import column, train, weights

pytestmark = pytest.mark.slow

PROMPT = "a TOK icon of a rabbit"
DRAWN = {"validation_prompt": PROMPT, "num_validation_images": 1}
PISSA = {"init_lora_weights": "pissa", "use_dora": True, "lora_alpha": 6, "use_ema": True}
GA = {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}


def whole_pipeline() -> Any:
    return StableDiffusionXLPipeline.from_pretrained(mini.pipeline_dir(), dtype=torch.float32)


@pytest.mark.parametrize("values", [PISSA, GA])
def test_the_file_on_the_unchanged_pipeline_draws_the_runs_image(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = train(tmp_path / "run", **values, **DRAWN, max_train_steps=4)
    (file,) = (folder / "validation" / "step-4").glob("*.png")
    pipeline = whole_pipeline()
    images = [np.asarray(Image.open(file), dtype=int)]
    (before,) = generate(pipeline, [PROMPT], [0], size=64)
    pipeline.load_lora_weights(str(folder))
    (after,) = generate(pipeline, [PROMPT], [0], size=64)
    images += [np.asarray(image, dtype=int) for image in (after, before)]
    assert np.abs(images[0] - images[1]).max() <= 2  # of 255, after 25 steps
    assert np.abs(images[0] - images[2]).max() > 10


def test_methods_start_alike_and_see_the_data_of_other_inits(tmp_path: Path) -> None:
    other_cut = {"method": "lora", "train_batch_size": 4, "gradient_accumulation_steps": 1}
    runs = [
        train(tmp_path / str(number), checkpointing_steps=1, **values)
        for number, values in enumerate(({}, GA, {**GA, **other_cut}))
    ]
    digests = [column(run, "digest") for run in runs]
    assert digests[0] == digests[1] == digests[2]
    first = [column(run, "loss")[0] for run in runs]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)  # each starts as the base
    held = [load_file(run / "checkpoints" / "step-1" / ADAPTERS) for run in runs[1:]]
    initial = [key for key in held[0] if "/initial/" in key]
    assert initial
    for key in initial:  # the gradient was cut otherwise, so not to the bit
        torch.testing.assert_close(held[0][key], held[1][key], rtol=1e-3, atol=1e-3)


def test_the_file_of_4_bit_weights_serves_the_unquantized_pipeline(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", quantize="nf4", **DRAWN)
    assert len(list((folder / "validation").rglob("*.png"))) == 1
    plain = train(tmp_path / "plain")
    assert weights(folder).keys() == weights(plain).keys()
    losses = [column(run, "loss") for run in (folder, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    pipeline = whole_pipeline()
    pipeline.load_lora_weights(folder)
    loaded = adapters.layers(pipeline.unet)
    assert len(loaded) == runlog.read_run(folder)["results"]["export"]["layers"]
    (name,) = adapters.names(pipeline.unet)
    file = weights(folder)
    for path, layer in loaded:
        down, up = (file[f"unet.{path}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(adapters.weight_delta(layer, name), up @ down)
