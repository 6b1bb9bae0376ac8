"""What a scoring of texts leaves: ``text_scores.json``, typed and versioned.

    result = TextScores.read(folder)            # refuses another version in one sentence
    result.write(folder)

Shares are in [0, 1] and points are as they are; reports show shares times 100.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import TEXT_SCORES
from ..statistics import Interval

PERCENT, POINTS = "%", "points"


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        id: the same for every run; pairs are made by it.
        score: None where it is not a number of its own.
        parsed: whether an answer was found in what the model or the judge wrote.
        answer: its beginning.
    """

    id: str
    score: float | None
    parsed: bool = True
    answer: str = ""


@dataclass(frozen=True)
class Measured:
    """One run on one benchmark.

    Args:
        value: a share, or points.
        items: empty for a figure that was recorded during training.
        others: further metrics by name.
        details: what else a reader has to know, such as the protection in force.
    """

    value: float
    items: list[Item]
    others: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def unparsed(self) -> int:
        """Items without an answer that could be read."""
        return sum(not item.parsed for item in self.items)


@dataclass(frozen=True)
class RunEntry:
    """One thing that was scored.

    Args:
        name: unique.
        group: the row of the table; runs that differ in the seed only share it.
        kind: "base", "run" or "adapter".
        source: the argument, without machine paths.
        method: of training, where known.
        cost: gradient steps per training iteration, where the method is known.
        seed: of training, where known.
        training_set: where known.
        digest: of the weights; "" for the base model.
        base_model: without machine paths.
        quantize: "nf4" or "none".
        peak_memory: bytes, of training, where known: the accelerator's, on a CPU the process's.
    """

    name: str
    group: str
    kind: str
    source: str
    method: str | None
    cost: int | None
    seed: int | None
    training_set: str | None
    digest: str
    base_model: str
    quantize: str
    peak_memory: int | None = None


@dataclass(frozen=True)
class BenchmarkEntry:
    """One column.

    Args:
        name: unique; as it was asked for.
        title: for tables.
        metric: what the value is.
        unit: "%" or "points".
        higher_is_better: False for a loss.
        settings: few-shot examples, limit, template, decoding, versions, digests.
    """

    name: str
    title: str
    metric: str
    unit: str
    higher_is_better: bool
    settings: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """Positions of a run and a benchmark, and what was measured."""

    run: int
    benchmark: int
    measured: Measured


@dataclass(frozen=True)
class Summary:
    """A cell of the table: mean over seeds and its standard error (0 for one seed)."""

    group: str
    benchmark: int
    mean: float
    error: float
    runs: int


@dataclass(frozen=True)
class Comparison:
    """A group minus the control on one benchmark.

    Args:
        over: what is paired: "seeds", or "items" where there are not two common seeds.
        pairs: how many.
        mean: of the differences, in the benchmark's unit (a share or points).
        interval: 95 %, of that mean; None for a single pair.
        better: pairs in which the group is better; a tie is not.
    """

    group: str
    control: str
    benchmark: int
    over: str
    pairs: int
    mean: float
    interval: Interval | None
    better: int


@dataclass(frozen=True)
class TextScores:
    """Everything that a report shows."""

    runs: list[RunEntry]
    benchmarks: list[BenchmarkEntry]
    scores: list[Score]
    summaries: list[Summary]
    comparisons: list[Comparison]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for score in self.scores:
            if not (0 <= score.run < len(self.runs)) or not (
                0 <= score.benchmark < len(self.benchmarks)
            ):
                raise ValueError("a position is out of range")

    def write(self, folder: Path) -> None:
        """Write ``text_scores.json`` in one piece."""
        TEXT_SCORES.write(self, folder)

    @classmethod
    def read(cls, folder: Path) -> TextScores:
        """The result in a folder.

        Raises:
            UserError: there is none, it is damaged, or another version wrote it.
        """
        return TEXT_SCORES.read(cls, folder)
