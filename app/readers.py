"""The files that the catalog reads, checked as far as the viewer relies on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bilora_diffusion.errors import UserError
from bilora_diffusion.run import runlog
from eval.records import FIGURES as KINDS
from eval.records import SCORES, SWEEP, TEXT_SCORES, Format
from eval.scores.schema import ScoresResult

FIGURES = {kind.file: kind for kind in (*KINDS, TEXT_SCORES)}
"""Result files with a report, and most with figures."""
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


def scores(path: Path) -> ScoresResult:
    """``scores.json``.

    Raises:
        UserError: it is damaged or of another version.
    """
    return SCORES.read(ScoresResult, path.parent)


def figures(path: Path) -> dict[str, Any] | None:
    """The JSON of a result with figures; None for a sweep's own list of its cells.

    Raises:
        UserError: it is damaged or of another version.
    """
    kind = FIGURES[path.name]
    record = kind.load(path.parent)
    if kind is SWEEP and "cells" in record and "arms" not in record:
        return None
    pictures = record.get("figures", [])
    if not isinstance(pictures, list) or not all(_plain(name) for name in pictures):
        raise kind.damaged(path.parent)
    return record


def report(kind: Format) -> str:
    """Name of the report beside a result's JSON."""
    return "report.md" if kind is TEXT_SCORES else f"{kind.module}.md"


def _plain(name: object) -> bool:
    """Whether a figure's name is that of a file beside the result."""
    return isinstance(name, str) and name == Path(name).name
