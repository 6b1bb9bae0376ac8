"""The report: a table of each space, figures, and what has to be known to read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .. import report as parts
from ..table import Result

TITLES = {"lora": "LoRA space (A and B)", "full": "full space (weights without the adapters)"}


def grounds(result: Result) -> str:
    """Which loss it is."""
    return "training" if result.settings["split"] == "train" else "held-out"


def report(result: Result) -> str:
    """``report.md``."""
    settings = result.settings
    return parts.page(
        "# Flatness",
        f"Mean {grounds(result)} loss of {settings['images']} images at {settings['levels']} noise"
        " levels each, with the same noise for every run. Lower is flatter. Each figure is a mean"
        f" over runs with {parts.INTERVALS}, and its difference to"
        f" {parts.escaped(result.control)}, paired by seed, with its interval and the number of"
        " seeds in which it is lower.",
        *(_space(result, space) for space in settings["spaces"]),
        parts.pictures(result),
        parts.listed([*_notes(result), *parts.origin(result.provenance)]),
    )


def _space(result: Result, space: str) -> str:
    sizes = {row.subject: int(row.value or 0) for row in result.select("parameters", item=space)}
    there = replace(result, subjects=[one for one in result.subjects if one.label in sizes])
    names = ["rise", "sharpness", *(["eigenvalue"] if result.settings["eigenvalue"] else [])]
    compared = [(name, space) for name in names]
    numbers = " or ".join(f"{size:,}" for size in sorted(set(sizes.values())))
    return parts.section(
        f"{TITLES[space]}, {numbers} numbers",
        parts.comparison(there, compared, [("loss", space)], intervals=True),
    )


def _notes(result: Result) -> Iterator[str]:
    settings = result.settings
    radii = [f"{own[-1]:g} ({space})" for space, own in settings["positions"].items()]
    yield (
        "Directions are filter-normalized (Li et al. 2018): at radius t every filter has moved by"
        " t times its norm. Filters are the rows of A, the columns of B, and the outputs of a"
        " weight. Biases, norms and DoRA's magnitudes stay where they are. Every run is looked at"
        " along the same directions."
    )
    full = {
        "all": "all weight matrices and convolutions of the trained models",
        "adapted": "the weights that the adapters sit on",
    }[settings["full_weights"]]
    yield f"The full space is {full}; the adapter acts and is not moved."
    yield (
        f"Rise: loss at radius {' and '.join(radii)}, minus the loss at 0, mean over both ends of"
        f" {settings['directions']} directions."
    )
    yield (
        f"SAM sharpness: highest L(w + e) - L(w) with ||e|| <= {settings['rho']:g} over all weights"
        f" of the space together, found by {settings['ascent_steps']} steps of projected gradient"
        f" ascent ({settings['restarts']} restarts): a lower bound. A and B have the scale of"
        " training, W the model's own."
    )
    if settings["eigenvalue"]:
        yield (
            "Top eigenvalue: the algebraically largest of the Hessian, by Lanczos to a relative"
            " accuracy of 1 %; n/a where it did not converge."
        )
    if any(1 < len(result.members(group)) < 10 for group in result.groups):
        yield "With fewer than ten seeds a bootstrap interval is too narrow."
