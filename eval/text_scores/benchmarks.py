"""The benchmarks of the paper's Table 3 and how each is set, any other task of the harness, and
figures that training recorded on held-out data.

The paper says where its numbers come from and not with which prompts. For the Llama 3.1 half it
names INSTRUCTEVAL (Chia et al. 2023, https://arxiv.org/abs/2306.04757), which asks MMLU with 5
examples, DROP and BBH with 3, all without a chain of thought, and HumanEval with none; these are
the defaults. Prompts and matching are the harness's; INSTRUCTEVAL's own code takes any answer that
begins with the label, and leaves out DROP's questions with several answers. GSM8K, HumanEval and
MT-Bench get no examples and the template that the run was trained with, as LoRA-GA (Wang et al.
2024, https://arxiv.org/abs/2407.05000) did on the same data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.run.record import last_measured

from ..subjects import BASE, Subject
from ..table import Metric
from .bases import training_set

HARNESS, HUMANEVAL, MTBENCH, HELDOUT = "harness", "humaneval", "mtbench", "heldout"
HELDOUT_LOSS = "heldout_loss"
OF_RUN, NONE = "run", "none"
EFFECT = "effect of adapter"
"""Largest change of a probe's logits by it."""
UNPARSED = "without an answer"
"""Items in which no answer could be read."""
SHOWN = 200
"""Letters of an answer that the result shows."""


@dataclass(frozen=True)
class Benchmark:
    """Settings of a benchmark.

    Args:
        name: as asked for.
        title: for tables.
        engine: what scores it.
        task: the harness's name for it.
        num_fewshot: examples in the prompt; None is the task's own number.
        metric: the harness's "metric,filter"; None is the task's first.
        template: around each prompt: "run" is that of training, "none" the bare prompt.
        scale: of its value in tables: 100 for a share, 1 for points.
        generation: overrides the task's arguments of generation.
    """

    name: str
    title: str
    engine: str = HARNESS
    task: str = ""
    num_fewshot: int | None = None
    metric: str | None = None
    template: str = NONE
    scale: float = 100.0
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recorded(self) -> bool:
        """True for what training measured."""
        return self.engine == HELDOUT


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
    """A model on a benchmark.

    Args:
        value: a share, or points.
        others: further figures by name.
        settings: how the benchmark was asked, as far as it is known only now.
    """

    value: float
    items: list[Item]
    others: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def further(self) -> dict[str, float]:
        """Figures beside the value; none of items where there is none."""
        unparsed = sum(not item.parsed for item in self.items)
        counts = {"items": len(self.items), UNPARSED: unparsed} if self.items else {}
        return counts | self.others


PAPER: Mapping[str, Benchmark] = {
    entry.name: entry
    for entry in (
        Benchmark(
            "gsm8k",
            "GSM8K",
            task="gsm8k",
            num_fewshot=0,
            metric="exact_match,flexible-extract",
            template=OF_RUN,
            generation={"max_gen_toks": 512},
        ),
        Benchmark("mmlu", "MMLU", task="mmlu", num_fewshot=5, metric="acc,none"),
        Benchmark("drop", "DROP", task="drop", num_fewshot=3, metric="em,none"),
        Benchmark("bbh", "BBH", task="bbh_fewshot", num_fewshot=3, metric="exact_match,none"),
        Benchmark("humaneval", "HumanEval", HUMANEVAL, metric="pass@1", template=OF_RUN),
        Benchmark("mtbench", "MT-Bench", MTBENCH, metric="score", template=OF_RUN, scale=1.0),
        Benchmark(HELDOUT, "held-out", HELDOUT),
        Benchmark(HELDOUT_LOSS, "held-out loss", HELDOUT),
    )
}


def choose(names: str, known: Sequence[str]) -> list[Benchmark]:
    """The benchmarks that a command line names.

    Args:
        names: comma-separated.
        known: the harness's tasks and groups; asked only where a name is none of ``PAPER``.
    """
    words = [word.strip() for word in names.split(",") if word.strip()]
    if not words:
        raise UserError(f"--benchmarks names none: give some of {', '.join(PAPER)}.")
    if repeated := [word for word in words if words.count(word) > 1]:
        raise UserError(f'--benchmarks names "{repeated[0]}" twice: keep one.')
    return [_one(word, known) for word in words]


def harness_tasks(names: str) -> list[str]:
    """Tasks of the harness among the names."""
    words = [word.strip() for word in names.split(",") if word.strip()]
    return [
        PAPER[word].task if word in PAPER else word
        for word in words
        if word not in PAPER or PAPER[word].engine == HARNESS
    ]


def _one(word: str, known: Sequence[str]) -> Benchmark:
    if word in PAPER:
        return PAPER[word]
    if word not in known:
        raise UserError(
            f'there is no benchmark "{word}"{did_you_mean(word, [*PAPER, *known])}: give'
            f" {', '.join(PAPER)}, a task of lm-evaluation-harness, or one of your own by"
            " --include_path."
        )
    return Benchmark(word, word, task=word)


PREFIX = "heldout_"
TITLES = {
    "matthews_correlation": "Matthews",
    "exact_match": "exact match",
    "answer_match": "answer match",
    "f1": "F1",
    "loss": "held-out loss",
}


@dataclass(frozen=True)
class RecordedColumn:
    """A training set's metric."""

    name: str
    metric: Metric
    settings: dict[str, Any]
    values: dict[str, tuple[int, float]]


def columns(subjects: Sequence[Subject], wanted: Collection[str]) -> list[RecordedColumn]:
    """A column per training set and metric, losses last.

    Args:
        subjects: runs, and the base model as they met it.
        wanted: HELDOUT for all metrics, and the loss where a training set has no other;
            HELDOUT_LOSS for the loss of each.
    """
    values: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for subject in subjects:
        for metric, value in recorded(subject).items():
            values.setdefault((training_set(subject), metric), {})[subject.label] = value
    judged = {name for name, metric in values if metric != HELDOUT_LOSS}
    several = len({name for name, _ in values}) > 1
    return [
        _recorded_column(name, metric, several, values[name, metric])
        for name, metric in sorted(values, key=lambda key: key[1] == HELDOUT_LOSS)
        if (HELDOUT_LOSS if metric == HELDOUT_LOSS else HELDOUT) in wanted
        or (HELDOUT in wanted and name not in judged)
    ]


def recorded(subject: Subject) -> dict[str, tuple[int, float]]:
    """Metric -> (step, value), "heldout_..." of ``metrics.jsonl``: the last of a run, up to the
    step whose weights it left; of a checkpoint that of its step; of the base model what was
    measured before the first step, which may be nothing.
    """
    if subject.folder is None:
        raise UserError(
            f"{subject.source} has no recorded figures, which --benchmarks heldout shows: name run"
            " folders, and base beside no other benchmark."
        )
    best = subject.record.get("results", {}).get("best_step")
    at = subject.about.get("step")  # of a checkpoint
    last = 0 if subject.kind == BASE else at or (math.inf if best is None else best)
    values = {
        key: (step, float(value))
        for key, (step, value) in last_measured(subject.folder, last).items()
        if key.startswith(PREFIX) and value is not None and at in (None, step)
    }
    if not values and subject.kind != BASE and at is None:
        raise UserError(
            f"{subject.folder} recorded no held-out figure: train it with --validation_file or a"
            " task that has a validation set."
        )
    return values


def _recorded_column(
    name: str, metric: str, several: bool, values: dict[str, tuple[int, float]]
) -> RecordedColumn:
    plain = metric.removeprefix(PREFIX)
    title = TITLES.get(plain, plain)
    title = f"{name} {title}" if several else title
    loss = metric == HELDOUT_LOSS
    shown = Metric(title, "", not loss, 1.0 if loss else 100.0, ".4f" if loss else ".2f")
    return RecordedColumn(
        f"heldout:{name}:{plain}", shown, {"metric": metric, "training_set": name}, values
    )
