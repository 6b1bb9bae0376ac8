"""What GPUs measured: the table of docs/models.md, from the files of benchmarks/gpu_day.py."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import gpu_result

FOLDER = Path(__file__).resolve().parents[1] / "results" / "gpu"


@functools.cache
def results() -> tuple[dict[str, Any], ...]:
    """The files of GPUs, by name; those of CPUs are not measurements of models."""
    files = [gpu_result.read_results(file) for file in sorted(FOLDER.glob("*.json"))]
    return tuple(content for content in files if content.get("device", {}).get("gpu"))


def tested_on(model: str, usual: str) -> str:
    """What a model was tested on: the GPUs that measured it at full size, else ``usual``."""
    gpus = []
    for content in results():
        for row in content["parts"].values():
            if row["title"] == model and row["outcome"] == gpu_result.MEASURED:
                gpus.append(content["device"]["gpu"])
    if not gpus:
        return usual
    return f"full size, random weights, on {', '.join(dict.fromkeys(gpus))}"


def measured_tables() -> Iterable[str]:
    """The table of each GPU; a sentence where there is none."""
    if not results():
        yield "There are no measurements on GPUs yet."
    for content in results():
        yield gpu_result.table(content).strip()
