"""A run as the viewer's lists have it: its name by method and seed, and the pair to see first."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.errors import UserError

CONTROL, OURS = "lora", "bilora"
"""The pair that is shown before anything is chosen."""
MOST_IMAGES = 10_000
"""Images of one step; a page holds no more."""


@dataclass(frozen=True)
class RunItem:
    """A run folder.

    Args:
        path: of the folder.
        name: what lists and legends show, such as "Bi-LoRA, seed 0"; unique.
        record: ``run.json``.
        weights: file of the exported LoRA, or the folder of whole models; None while there is none.
        steps: at which validation images were made, in order.
        checkpoints: steps of the checkpoints that are there, in order.
    """

    path: str
    name: str
    record: dict[str, Any]
    weights: str | None
    steps: tuple[int, ...] = ()
    checkpoints: tuple[int, ...] = ()

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.record["method"]

    @property
    def seed(self) -> int | None:
        """The seed of training, where the record has one."""
        return self.record.get("seed")

    @property
    def status(self) -> str:
        """ "running", "finished", "interrupted" or "failed"."""
        return self.record["status"]

    @property
    def is_text(self) -> bool:
        """Test that it trains a language model."""
        return "model_name_or_path" in self.record["config"]

    @cached_property
    def images(self) -> dict[tuple[str, int], int]:
        """The number of each validation image, by its prompt and how many of it come before."""
        config = self.record["config"]
        prompts, count = config.get("validation_prompts"), config.get("num_validation_images")
        asked = (prompt for prompt in prompts or () for _ in range(count or 0))
        numbers: dict[tuple[str, int], int] = {}
        before: Counter[str] = Counter()
        for number, prompt in enumerate(itertools.islice(asked, MOST_IMAGES)):
            numbers[prompt, before[prompt]] = number
            before[prompt] += 1
        return numbers

    def image(self, step: int, number: int) -> str:
        """A validation image, relative to the root."""
        return str(PurePosixPath(self.path) / "validation" / f"step-{step}" / f"{number:03d}.png")


def title(method: str) -> str:
    """A method's title; its name where this version does not know it."""
    try:
        return methods.get(method).title
    except UserError:
        return method


def short(value: float | str) -> str:
    """A radius in few letters: a number, or the word for one that sets itself."""
    return value if isinstance(value, str) else f"{value:g}"


def named(runs: Sequence[RunItem]) -> list[RunItem]:
    """The runs, named by method and seed, by rho where it tells runs of one method apart, and by
    the folder where two would still be called alike.

    Args:
        runs: the names they have are their folders'.
    """

    def rho(run: RunItem) -> str:
        value = run.record["config"].get("rho")
        others = [other for other in runs if other.method == run.method]
        if value is None or all(other.record["config"].get("rho") == value for other in others):
            return ""
        return f", ρ {short(value)}"

    names = [f"{title(run.method)}{rho(run)}, seed {run.seed}" for run in runs]
    count = Counter(names)
    return [
        replace(run, name=name if count[name] == 1 else f"{name} ({run.name})")
        for run, name in zip(runs, names, strict=True)
    ]


def ordered(runs: Sequence[RunItem]) -> list[RunItem]:
    """The runs as they are listed: plain LoRA first, as the control, then by method and seed."""
    return sorted(runs, key=lambda run: (run.method != CONTROL, run.method, str(run.seed)))


def pair(runs: Sequence[RunItem]) -> list[RunItem]:
    """LoRA and Bi-LoRA of one seed, best in one folder; else the first two runs there are."""
    controls = [run for run in ordered(runs) if run.method == CONTROL]
    ours = [run for run in ordered(runs) if run.method == OURS]
    couples = [(a, b) for a in controls for b in ours if a.seed == b.seed]
    if not couples:
        return ordered(runs)[:2]
    return list(min(couples, key=lambda two: len({PurePosixPath(one.path).parent for one in two})))
