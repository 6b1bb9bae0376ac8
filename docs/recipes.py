"""Memory that recipes of image models take, as ``--dry_run`` has it, in their heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from bilora_diffusion.config.command_line import RECIPES, read_options
from bilora_diffusion.image.dry_run import memory_by_phase
from bilora_diffusion.train.dry_run import CUDA_CONTEXT_BYTES, attached, complete

from .memory import task

LINE = re.compile(r"^# (\d+) GB (?:as it stands|with `(.+)`): .*$", re.MULTILINE)
"""In the head of a recipe: a GPU's memory, and what to add to the recipe for it."""


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
