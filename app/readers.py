"""The files that the catalog reads, checked as far as the viewer relies on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bilora_diffusion.errors import UserError
from bilora_diffusion.run import runlog
from eval import table

from .scored import Scored, scored

SCORES = "clip_scores"
WEIGHTS = ("pytorch_lora_weights.safetensors", "unet", "adapter_model.safetensors")
"""What a run exports: a diffusers LoRA, whole models, or a PEFT adapter of a text model."""


def run(path: Path) -> dict[str, Any]:
    """``run.json``, with a method, a status and a config.

    Raises:
        UserError: it is damaged or of another version.
    """
    record = runlog.read_run(path.parent)
    for key, kind in (("method", str), ("status", str), ("config", dict)):
        if not isinstance(record.get(key), kind):
            raise UserError(f"{path.name} has no {key}: train the run again")
    return record


def steps(folder: Path) -> tuple[int, ...]:
    """The steps at which a run made validation images, in order."""
    found = (folder / "validation").glob("step-*/000.png")
    names = [path.parent.name.removeprefix("step-") for path in found]
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def scores(path: Path) -> Scored:
    """The images of a result of ``eval.clip_scores``.

    Raises:
        UserError: it is damaged or of another version.
    """
    try:
        return scored(table.read(path.parent))
    except (ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: run python -m eval.{SCORES} again") from error


def result(path: Path) -> Scored | dict[str, Any]:
    """A result: its images, or of another command what ``result.json`` says.

    Raises:
        UserError: it is damaged or of another version.
    """
    record = table.head(path.parent)
    if record["kind"] == SCORES:
        return scores(path)
    pictures = record.get("figures")
    if not isinstance(pictures, list) or not all(_plain(name) for name in pictures):
        raise UserError(f"{path} is damaged: run python -m eval.{record['kind']} again")
    return record


def _plain(name: object) -> bool:
    """Whether a figure's name is that of a file beside the result."""
    return isinstance(name, str) and name == Path(name).name
