"""How a tuned comparison is shown: its metrics, and its report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .. import report as parts
from ..sweep import findings as sweep
from ..sweep.findings import HELDOUT, SECONDS, is_finished, suffix
from ..table import Metric, Result

CHOSEN, BEST, TRIAL = f"chosen {HELDOUT}", f"best {HELDOUT}", f"trial {HELDOUT}"
EQUAL = f"equal_training {HELDOUT}"
RELATIVE, TO_CHOSEN = "relative_step_time", "seconds_to_chosen"


def metrics(result: Result) -> dict[str, Metric]:
    """Those of a sweep, and what is at the chosen step."""
    shown = sweep.metrics(result)
    loss = shown[HELDOUT]
    return shown | {
        CHOSEN: replace(loss, title="at the chosen step"),
        BEST: replace(loss, title="lowest of each run"),
        TRIAL: replace(loss, title="of the trials"),
        RELATIVE: Metric("step time / control's", form=".3f"),
        TO_CHOSEN: Metric("s to the chosen step"),
    }


def report(result: Result) -> str:
    """``report.md``."""
    settings = result.settings
    first, second = settings["parts"]
    counts = {len(own) for own in settings["trials"].values()}
    seeds, tests = len(settings["trial_seeds"]), len(settings["seeds"])
    return parts.page(
        f"`{HELDOUT}`{suffix(result)} of {settings['recipe']}, lower is better. Each method was"
        f" tuned with {max(counts)} trials of {seeds} seed{'s' if seeds > 1 else ''} on part"
        f" {first} of the held-out set, and is judged with {tests} fresh"
        f" seed{'s' if tests > 1 else ''} on part {second}. Difference: to"
        f" {parts.escaped(result.control)}, paired by seed, with {parts.INTERVALS} and the number"
        " of seeds in which the method is better.",
        parts.comparison(
            result,
            [
                *(parts.Column(name, "", True, False) for name in (CHOSEN, BEST, EQUAL)),
                *(parts.Column(own, interval=False) for own in (SECONDS, RELATIVE, TO_CHOSEN)),
            ],
            {"seeds": lambda group: _finished(result, group)},
        ),
        parts.section("Chosen", parts.table(*_chosen(result))),
        parts.pictures(result),
        parts.listed([*map(parts.escaped, result.notes), *parts.origin(result.provenance)]),
    )


def _finished(result: Result, group: str) -> str:
    runs = result.members(group)
    return f"{sum(map(is_finished, runs))}/{len(runs)}"


def _chosen(result: Result) -> tuple[list[str], list[list[str]]]:
    """What was chosen for each method, by how much, and its options."""
    head = ["method", "trial", "step", f"{HELDOUT}{suffix(result)} of the trial", "options"]
    return head, list(_choices(result))


def _choices(result: Result) -> Iterator[list[str]]:
    for method, choice in result.settings["chosen"].items():
        options = result.settings["trials"][method][choice["trial"] - 1]
        yield [
            method,
            str(choice["trial"]),
            str(choice["step"]),
            parts.number(choice["loss"], result.metric(TRIAL)),
            ", ".join(f"{name}={value}" for name, value in options.items()),
        ]
