"""Tables of measurements on GPUs in docs/models.md, from the files of benchmarks/gpu_day.py."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import gpu_result

FOLDER = Path(__file__).resolve().parents[1] / "results" / "gpu"


@functools.cache
def results() -> tuple[dict[str, Any], ...]:
    """Read the files that were measured on GPUs, in order of their names; skip those of CPUs."""
    files = [gpu_result.read_results(file) for file in sorted(FOLDER.glob("*.json"))]
    return tuple(content for content in files if content.get("device", {}).get("gpu"))


def tested_on(model: str, usual: str) -> str:
    """Return the GPUs on which a model was measured at full size, or ``usual`` if there is none."""
    gpus = []
    for content in results():
        for row in content["parts"].values():
            if row["title"] == model and row["outcome"] == gpu_result.MEASURED:
                gpus.append(content["device"]["gpu"])
    if not gpus:
        return usual
    return f"full size, random weights, on {', '.join(dict.fromkeys(gpus))}"


def measured_tables() -> Iterable[str]:
    """Generate one table per GPU, or a sentence if there are no measurements."""
    if not results():
        yield "There are no measurements on GPUs yet."
    for content in results():
        yield gpu_result.table(content).strip()
