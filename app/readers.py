"""The files that the catalog reads, checked as far as the viewer relies on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bilora_diffusion import runlog
from bilora_diffusion.errors import UserError
from eval.scores.schema import METRICS, ScoresResult

FIGURES = {f"{kind}.json": kind for kind in ("landscape", "dynamics", "generalization", "sweep")}
"""Result files with figures, and their kinds."""
FIGURES_VERSION = 1
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


def scores(path: Path) -> ScoresResult:
    """``scores.json``, its positions and scores checked.

    Raises:
        UserError: it is damaged or of another version.
    """
    result = ScoresResult.read(path.parent)
    again = f"{path.name} is damaged: run python -m eval.clip_scores again"
    for entry in (*result.adapters, *result.prompts):
        text = getattr(entry, "label", None) or getattr(entry, "text", None)
        if not isinstance(text, str):
            raise UserError(again)
    for row in result.images:
        positions = ((row.adapter, result.adapters), (row.prompt, result.prompts))
        if not all(isinstance(at, int) and 0 <= at < len(rows) for at, rows in positions):
            raise UserError(again)
        values = [getattr(row, metric, None) for metric in METRICS]
        if not all(value is None or isinstance(value, int | float) for value in values):
            raise UserError(again)
        if not isinstance(row.file, str) or not isinstance(row.seed, int):
            raise UserError(again)
    return result


def figures(path: Path) -> dict[str, Any]:
    """The JSON of a result with figures.

    Raises:
        UserError: it is damaged or of another version.
    """
    kind = FIGURES[path.name]
    again = f"run python -m eval.{kind} again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name} is damaged: {again}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path.name} is damaged: {again}")
    version = record.get("schema_version")
    if version != FIGURES_VERSION or record.get("kind", kind) != kind:
        raise UserError(
            f"{path.name} is {record.get('kind')!r} of schema version {version!r}, not {kind!r} of"
            f" {FIGURES_VERSION}: {again}"
        )
    pictures = record.get("figures", [])
    if not isinstance(pictures, list) or not all(_plain(name) for name in pictures):
        raise UserError(f"{path.name} is damaged: {again}")
    return record


def _plain(name: object) -> bool:
    """Whether a figure's name is that of a file beside the result."""
    return isinstance(name, str) and name == Path(name).name
