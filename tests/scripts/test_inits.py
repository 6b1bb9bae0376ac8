"""Whole runs from inits that change the base weights: resume, pairs, processes, exported files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from bilora_diffusion import mini
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.run import runlog
from bilora_diffusion.run.checkpoint import ADAPTERS
from tests.scripts.runs import column, difference, flags, weights

pytestmark = pytest.mark.slow

Train = Callable[..., Path]
PROMPT = "a TOK icon of a rabbit"
GA = {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}
VALUES: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa", "use_dora": True, "lora_alpha": 6, "use_ema": True},
    {"init_lora_weights": "pissa", "mixed_precision": "bf16"},
    {**GA, "method": "lora", "train_text_encoder": True, "gradient_checkpointing": True},
]


def named(values: dict[str, Any]) -> str:
    return "-".join(str(value) for value in values.values())


@pytest.mark.parametrize("values", VALUES, ids=named)
def test_resumed_equals_uninterrupted(train: Train, tmp_path: Path, monkeypatch, values) -> None:
    shared = {"max_train_steps": 2, "checkpointing_steps": 1, **values}
    whole = train(tmp_path / "whole", **shared)
    again = tmp_path / "again"
    shutil.copytree(whole, again)

    def computed(*args: object, **kwargs: object) -> None:
        raise AssertionError("a resumed run computed its init anew")

    for name in ("compute", "mean_gradients"):
        monkeypatch.setattr(f"bilora_diffusion.train.gradients.{name}", computed)
    train(again, **shared, resume_from_checkpoint=again / "checkpoints" / "step-1")
    assert difference(whole, again) == 0
    for key in ("loss", "digest", "grad_norm"):
        assert column(whole, key) == column(again, key)
    assert {value.shape[0] for key, value in weights(whole).items() if "lora_A" in key} == {8}
    assert runlog.read_run(whole)["results"]["export"]["max_relative_difference"] < 1e-6
    assert "| rank of the file | 8 |" in (whole / "README.md").read_text()


@pytest.mark.parametrize("values", [VALUES[0], GA], ids=named)
def test_the_file_on_the_unchanged_pipeline_draws_the_runs_image(
    train: Train, tmp_path: Path, values
) -> None:
    drawn = {"validation_prompt": PROMPT, "num_validation_images": 1, "max_train_steps": 4}
    folder = train(tmp_path / "run", **values, **drawn)
    (file,) = (folder / "validation" / "step-4").glob("*.png")
    pipeline = StableDiffusionXLPipeline.from_pretrained(mini.pipeline_dir(), dtype=torch.float32)
    images = [np.asarray(Image.open(file), dtype=int)]
    (before,) = generate(pipeline, [PROMPT], [0], size=64)
    pipeline.load_lora_weights(str(folder))
    (after,) = generate(pipeline, [PROMPT], [0], size=64)
    images += [np.asarray(image, dtype=int) for image in (after, before)]
    assert np.abs(images[0] - images[1]).max() <= 2  # of 255, after 25 steps
    assert np.abs(images[0] - images[2]).max() > 10


def test_methods_start_alike_and_see_the_data_of_other_inits(train: Train, tmp_path: Path) -> None:
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


def test_two_processes_start_as_one(
    train: Train,
    script: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = {**GA, "train_batch_size": 1, "learning_rate": 2e-4, "max_train_steps": 2}
    one = train(tmp_path / "one", **shared, gradient_accumulation_steps=4)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    argv = flags(tmp_path / "two", **shared, gradient_accumulation_steps=2)
    said = script(argv, ["-m", "torch.distributed.run", "--nproc_per_node", "2"])
    assert said.returncode == 0, said.stderr
    assert column(one, "digest") == column(tmp_path / "two", "digest")
    assert column(one, "loss") == pytest.approx(column(tmp_path / "two", "loss"), abs=1e-5)
    assert difference(one, tmp_path / "two") < 1e-5
