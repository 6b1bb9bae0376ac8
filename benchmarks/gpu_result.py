"""The result file of gpu_day.py, its table, and the peak speeds of GPUs.

This module does not import torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilora_diffusion.core.files import bytes_for_people
from eval.results import report

# Outcomes of a part
MEASURED, OUT_OF_MEMORY, TIMED_OUT = "measured", "out of memory", "time limit"
SKIPPED, FAILED = "skipped", "failed"
# A part with one of these outcomes is not measured again.
FINAL = (MEASURED, OUT_OF_MEMORY, TIMED_OUT)
# Word in a GPU's name -> peak speed in 10^12 operations per second, for dense bf16 matrix products
# with fp32 accumulation, from NVIDIA's data sheets and white papers. The first match counts.
PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX A6000": 155,
    "RTX 6000 Ada": 364,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
}
# Words in the names of GPUs that are slower than the card whose name they contain
REDUCED = re.compile(r"Laptop|MIG|Max-Q|\b4090 D\b")
HEADS = (
    "model",
    "px",
    "batch",
    "weights",
    "method",
    "a step (s)",
    "images/s",
    "share of the peak",
    "peak of a step",
    "by `--dry_run`",
    "peak of sampling",
    "an image (s)",
)


def peak_of(gpu: str | None) -> float | None:
    """Return a GPU's peak speed in operations per second, or None if it is not known."""
    if gpu is None or REDUCED.search(gpu):
        return None
    for name, tera_operations in PEAKS.items():
        # A suffix may follow after a hyphen, as in "A100-SXM4"; "L40" must not match "L40S".
        if re.search(rf"\b{name}\b", gpu):
            return 1e12 * tera_operations
    return None


def share_of_peak(row: Mapping[str, Any], gpu: str | None) -> float | None:
    """Compute a step's operations as a share of what the GPU's peak speed allows in its time.

    Operations that gradient checkpointing repeats are counted.
    """
    peak = peak_of(gpu)
    if peak is None or not row.get("operations"):
        return None
    return row["operations"] / row["step_seconds"] / peak


def read_results(file: Path) -> dict[str, Any]:
    """Read a result file."""
    return json.loads(file.read_text(encoding="utf-8"))


def table(results: Mapping[str, Any]) -> str:
    """Format all parts of a file as Markdown, unmeasured ones with the reason."""
    gpu = results["device"]["gpu"]
    rows = []
    for row in results["parts"].values():
        rows.append(table_row(row, gpu))
    lines = [report.table(HEADS, rows)]
    device, versions = results["device"], results["versions"]
    lines.append(
        f"{device['name']}, torch {versions['torch']}, diffusers {versions['diffusers']}. Random"
        " weights, bf16, rank 4, gradient checkpointing, no text encoders. The time of a step is"
        " the median, with the lowest and highest value. The share of the peak counts operations of"
        " matrix products, convolutions and attention, including those that checkpointing repeats."
    )
    return "\n\n".join(lines) + "\n"


def table_row(row: Mapping[str, Any], gpu: str | None) -> Sequence[str]:
    """Return the cells of a part's row."""
    if row.get("text"):  # another command, with its own table or report
        return (row["title"], *[""] * 4, row["text"], *[""] * (len(HEADS) - 6))
    part = row["part"]
    weights = part["quantize"].replace("none", "bf16").replace("nf4", "NF4")
    method = part["method"] + (", compiled" if part["compile"] else "")
    cells = [row["title"], f"{part['pixels']}", f"{part['batch']}", weights, method]
    if row["outcome"] != MEASURED:
        reason = f": {row['reason']}" if row.get("reason") else ""
        return (*cells, f"{row['outcome']}{reason}", *[""] * (len(HEADS) - 6))
    times = row["seconds"]
    share = share_of_peak(row, gpu)
    sampling = row.get("sampling", {})
    image_seconds = sampling_peak = sampling.get("outcome", "")
    if sampling.get("outcome") == MEASURED:
        image_seconds = f"{sampling['seconds']:.1f} in {sampling['sampler_steps']} steps"
        sampling_peak = bytes_for_people(sampling["peak_bytes"])
    cells += [
        f"{row['step_seconds']:.3g} ({min(times):.3g} to {max(times):.3g})",
        f"{row['images_per_second']:.3g}",
        "" if share is None else f"{share:.0%}",
        bytes_for_people(row["peak_bytes"]),
        bytes_for_people(row["estimated_bytes"]),
        sampling_peak,
        image_seconds,
    ]
    return cells
