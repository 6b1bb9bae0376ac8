"""Whole runs on 4-bit weights: they resume exactly, and their file serves the unquantized base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from bilora_diffusion import adapters, mini
from bilora_diffusion.run import runlog
from tests.scripts.runs import column, difference, weights

Train = Callable[..., Path]
NF4 = {"quantize": "nf4", "method": "bilora", "max_train_steps": 2, "checkpointing_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True, "train_text_encoder": True, "text_encoder_lr": 1e-3},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=["dora with text encoders", "bf16 with checkpointing"],
)
def test_resumed_equals_uninterrupted(train: Train, tmp_path: Path, values: dict[str, Any]) -> None:
    whole = train(tmp_path / "whole", **NF4, **values)
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    train(parts, **NF4, **values, resume_from_checkpoint=parts / "checkpoints" / "step-1")
    assert difference(whole, parts) == 0
    assert column(whole, "loss") == column(parts, "loss")
    assert runlog.read_run(whole)["results"]["export"]["auxiliary_keys"] == 0


@pytest.mark.slow
def test_the_file_serves_the_unquantized_pipeline(train: Train, tmp_path: Path) -> None:
    folder = train(
        tmp_path / "run",
        **NF4,
        validation_prompt="a TOK icon of a rabbit",
        num_validation_images=1,
    )
    assert len(list((folder / "validation").rglob("*.png"))) == 1
    plain = train(tmp_path / "plain", **{**NF4, "quantize": "none"})
    assert weights(folder).keys() == weights(plain).keys()
    losses = [column(run, "loss") for run in (folder, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        mini.pipeline_dir(), dtype=torch.float32
    )
    pipeline.load_lora_weights(folder)
    loaded = adapters.layers(pipeline.unet)
    assert len(loaded) == runlog.read_run(folder)["results"]["export"]["layers"]
    (name,) = adapters.names(pipeline.unet)
    file = weights(folder)
    for path, layer in loaded:
        down, up = (file[f"unet.{path}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(adapters.weight_delta(layer, name), up @ down)
