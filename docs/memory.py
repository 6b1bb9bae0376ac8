"""Memory of the image models as ``--dry_run`` has it, from their published configurations: for the
tables, and for the heads of the recipes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers

from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.config.command_line import RECIPES, read_options
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.families import family_class
from bilora_diffusion.image.pipeline import memory_by_phase
from bilora_diffusion.methods import Target
from bilora_diffusion.train.dry_run import (
    BEFORE,
    CUDA_CONTEXT_BYTES,
    STEP,
    attached,
    complete,
    empty,
)

FOLDER = Path(__file__).resolve().parents[1] / "results" / "dry_run_memory"
MODELS = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
"""Denoisers and text encoders at full size, by the models' names."""
VAE = {
    "AutoencoderKL": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": 4 * ("DownEncoderBlock2D",),
        "up_block_types": 4 * ("UpDecoderBlock2D",),
    }
}
"""Autoencoders that are not made at full size by default."""
LINE = re.compile(r"^# (\d+) GB (?:as it stands|with `(.+)`): .*$", re.MULTILINE)
"""In the head of a recipe: a GPU's memory, and what to add to the recipe for it."""


def row(name: str, weights: str, *words: str) -> dict[str, int]:
    """Bytes of a step of LoRA and of Bi-LoRA on one image of 1024 pixels with what it holds beside
    weights and adapters, and the text encoders that are there before it; without CUDA's own.

    Args:
        weights: bf16, or how they are quantized.
        words: more of a command line.
    """
    quantized = ["--quantize", "none" if weights == "bf16" else weights]
    phases = memory_by_phase(_bare(name, *quantized, *words), torch.device("cuda"))
    step_bytes, trained = sum(phases[STEP].values()), _trained(name)
    step = {"activations": phases[STEP]["activations"], "encoders": sum(phases[BEFORE].values())}
    # The auxiliary is as large as the primary, with its gradients and moments.
    return step | {"lora": step_bytes + trained, "bilora": step_bytes + 2 * trained}


@functools.cache
def _trained(name: str) -> int:
    return sum(attached(_bare(name), 1)[1].values())


def _bare(name: str, *words: str) -> Any:
    """A run without images, and without the weights of its autoencoder."""
    argv = ["--resolution", "1024", "--mixed_precision", "bf16", "--train_batch_size", "1"]
    argv += ["--num_validation_images", "0", "--method", "lora", *words]
    run = task(name, *argv)
    run.pipeline.vae = SimpleNamespace(config=run.pipeline.vae.config)
    return run


def task(name: str, *words: str) -> Any:
    """The task as a dry run reads it."""
    with TemporaryDirectory() as folder:
        argv = ["--dataset", "mini", "--validation_dataset", "none", "--dry_run"]
        argv += ["--output_dir", folder, *words]
        cfg = resolve([*argv, "--pretrained_model_name_or_path", "mini"])  # without the hub
    family: Any = family_class(MODELS[name]["pipeline"], name)()
    part, config = MODELS[name]["denoiser"]
    denoiser = empty(lambda: getattr(diffusers, part)(**config), torch.bfloat16)
    spec = AdapterSpec(cfg.rank, cfg.lora_alpha or cfg.rank, target_modules=family.targets)
    encoders = dict(zip(family.encoders, _encoders(name), strict=True))
    kind = family.parts["vae"]
    vae = empty(lambda: getattr(diffusers, kind)(**VAE.get(kind, {})), torch.bfloat16)
    return SimpleNamespace(
        cfg=cfg,
        family=family,
        pipeline=SimpleNamespace(**encoders, **{family.denoiser: denoiser}, vae=vae),
        models={family.denoiser: denoiser},
        sample_names=[""],
        targets=lambda: [Target(family.denoiser, denoiser, spec, cfg.learning_rate)],
    )


@functools.cache
def _encoders(name: str) -> list[Any]:
    return [
        empty(lambda: getattr(transformers, kind)(_config(*config)), torch.bfloat16)  # noqa: B023
        for kind, *config in MODELS[name]["encoders"]
    ]


def _config(kind: str, values: dict[str, Any]) -> Any:
    return getattr(transformers, kind)(**values)


def models(examples: Mapping[str, str]) -> dict[Path, str]:
    """The recipes that are for a model of the tables and say what it takes -> its name there."""
    names = {hub: name for name, hub in examples.items()}
    return {
        path: names[read_options(path, path.name, "--config")["pretrained_model_name_or_path"]]
        for path in sorted(RECIPES.glob("*.yaml"))
        if LINE.search(path.read_text(encoding="utf-8"))
    }


def page(path: Path, model: str) -> str:
    """A recipe with its memory made anew."""

    def line(match: re.Match[str]) -> str:
        needed = peak(model, "--config", str(path), *(match[2] or "").split())
        return f"{match[0].rpartition(':')[0]}: {needed / 1e9:.1f} GB"

    return LINE.sub(line, path.read_text(encoding="utf-8"))


def peak(model: str, *words: str) -> int:
    """Bytes of a run on a GPU when it takes most, validation images included."""
    run = task(model, "--validation_prompt", "a photo of TOK", *words)
    phases = complete(
        memory_by_phase(run, torch.device("cuda")), attached(run, 1)[1], CUDA_CONTEXT_BYTES
    )
    return max(sum(parts.values()) for parts in phases.values())
