"""Memory of the image models as ``--dry_run`` has it, from their published configurations."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers

from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.dry_run import moments
from bilora_diffusion.image.families import named
from bilora_diffusion.methods import Target
from bilora_diffusion.train.dry_run import BEFORE, STEP, attached
from bilora_diffusion.train.empty import empty

FOLDER = Path(__file__).resolve().parents[1] / "results" / "dry_run_memory"
MODELS = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
"""Denoisers and text encoders at full size, by the models' names."""


def row(name: str, weights: str, *words: str) -> dict[str, int]:
    """Bytes of a step of LoRA and of Bi-LoRA on one image of 1024 pixels with what it holds beside
    weights and adapters, and the text encoders that are there before it; without CUDA's own.

    Args:
        weights: bf16, or how they are quantized.
        words: more of a command line.
    """
    held = ["--quantize", "none" if weights == "bf16" else weights]
    taken = moments(_task(name, "lora", *held, *words), torch.device("cuda"))
    step = {"activations": taken[STEP]["activations"], "encoders": sum(taken[BEFORE].values())}
    for method in ("lora", "bilora"):
        step[method] = sum(taken[STEP].values()) + _trained(name, method)
    return step


@functools.cache
def _trained(name: str, method: str) -> int:
    return sum(attached(_task(name, method), 1)[1].values())


def _task(name: str, method: str, *words: str) -> Any:
    """What a dry run looks at of a task."""
    with TemporaryDirectory() as folder:
        given = ["--dataset", "mini", "--resolution", "1024", "--mixed_precision", "bf16"]
        given += ["--validation_dataset", "none", "--num_validation_images", "0", "--dry_run"]
        given += ["--method", method, "--train_batch_size", "1", "--output_dir", folder, *words]
        cfg = resolve(given)
    family: Any = named(MODELS[name]["pipeline"], name)()
    denoiser = _denoiser(name)
    spec = AdapterSpec(cfg.rank, cfg.lora_alpha or cfg.rank, target_modules=family.targets)
    encoders = dict(zip(family.encoders, _encoders(name), strict=True))
    vae = SimpleNamespace(config={"block_out_channels": [128]})  # its weights are left out
    return SimpleNamespace(
        cfg=cfg,
        family=family,
        pipeline=SimpleNamespace(**encoders, **{family.denoiser: denoiser}, vae=vae),
        models={family.denoiser: denoiser},
        sample_names=[""],
        targets=lambda: [Target(family.denoiser, denoiser, spec, cfg.learning_rate)],
    )


def _denoiser(name: str) -> Any:
    kind, config = MODELS[name]["denoiser"]
    return empty(lambda: getattr(diffusers, kind)(**config), torch.bfloat16)


@functools.cache
def _encoders(name: str) -> list[Any]:
    return [
        empty(lambda: getattr(transformers, kind)(_config(*config)), torch.bfloat16)  # noqa: B023
        for kind, *config in MODELS[name]["encoders"]
    ]


def _config(kind: str, values: dict[str, Any]) -> Any:
    return getattr(transformers, kind)(**values)
