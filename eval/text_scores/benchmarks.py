"""Benchmarks and their settings: those of the paper's Table 3, any other task of the harness, and
metrics that training recorded on held-out data.

The paper does not give the prompts of its benchmarks. For the Llama 3.1 half it
names INSTRUCTEVAL (Chia et al. 2023, https://arxiv.org/abs/2306.04757), which asks MMLU with 5
examples, DROP and BBH with 3, all without a chain of thought, and HumanEval with none; these are
the defaults. Prompts and matching are the harness's; INSTRUCTEVAL's own code takes any answer that
begins with the label, and leaves out DROP's questions with several answers. GSM8K and MT-Bench get
no examples and the template that the run was trained with, as LoRA-GA (Wang et al. 2024,
https://arxiv.org/abs/2407.05000) did on the same data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from bilora_diffusion.core.errors import UserError, did_you_mean
from bilora_diffusion.core.values import HELDOUT_LOSS, HELDOUT_PREFIX
from bilora_diffusion.run.record import last_measured

from ..results.table import Metric
from ..subjects import BASE, Subject
from .base_models import NO_TEMPLATE, training_set

if TYPE_CHECKING:  # they need torch
    from .models import CacheFor, LoadedModel

# Engines
HARNESS, MTBENCH, HELDOUT = "harness", "mtbench", "heldout"
HUMANEVAL = "humaneval"
# Name of the template that training used
TEMPLATE_OF_RUN = "run"
# Largest change of a probe's logits by it
EFFECT = "effect of adapter"
# Items in which no answer could be read
UNPARSED = "without an answer"
# Maximum characters of an answer in the result
ANSWER_LETTERS = 200


@dataclass(frozen=True)
class Benchmark:
    """Settings of a benchmark."""

    # Name on the command line
    name: str
    # Title in tables
    title: str
    # Engine that scores it: harness, mtbench, or heldout for metrics that training recorded
    engine: str = HARNESS
    # Name of the harness's task
    task: str = ""
    # Examples in the prompt; None is the task's own number
    num_fewshot: int | None = None
    # The harness's "metric,filter"; None is the task's first
    metric: str | None = None
    # Template around each prompt: "run" is that of training, "none" the bare prompt
    template: str = NO_TEMPLATE
    # Factor of its value in tables: 100 for a share, 1 for points
    scale: float = 100.0
    # Overrides the task's arguments of generation
    generation: Mapping[str, Any] = field(default_factory=dict)
    # The task runs programs that the model writes
    runs_code: bool = False

    @property
    def is_recorded(self) -> bool:
        """True for metrics that training recorded."""
        return self.engine == HELDOUT


@dataclass(frozen=True)
class Item:
    """One question."""

    # The same for every run: pairs of runs are made by it
    id: str
    # None where the item has no number of its own
    score: float | None
    # An answer was found in the text of the model or of the judge
    parsed: bool = True
    # Beginning of the answer
    answer: str = ""


@dataclass(frozen=True)
class Measurement:
    """A model on a benchmark."""

    # A share, or points
    value: float
    items: list[Item]
    # Further metrics by name
    metrics: dict[str, float] = field(default_factory=dict)
    # How the benchmark was asked, as far as it is known only now
    settings: dict[str, Any] = field(default_factory=dict)

    def all_metrics(self) -> dict[str, float]:
        """Values in addition to the score, with the counts of the items where there are any."""
        if not self.items:
            return self.metrics
        # Recorded metrics have no items, so they have no counts of them either.
        unparsed = sum(not item.parsed for item in self.items)
        return {"items": len(self.items), UNPARSED: unparsed, **self.metrics}

    def to_json(self) -> dict[str, Any]:
        """The form in the cache."""
        return {
            "value": self.value,
            "items": [asdict(item) for item in self.items],
            "others": self.metrics,  # the key of earlier caches
            "settings": self.settings,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Measurement:
        """Read what `to_json` wrote."""
        items = [Item(**item) for item in stored["items"]]
        return cls(stored["value"], items, stored["others"], stored["settings"])


class Engine(Protocol):
    """Asks a model the questions of a benchmark."""

    def settings(self) -> dict[str, Any]:
        """All that a score depends on, except the model."""
        ...

    def measure(
        self, model: LoadedModel, template: str, batch_size: int, cache_for: CacheFor
    ) -> Measurement:
        """Ask and score."""
        ...


BENCHMARKS = (
    # As LoRA-GA asks it, without examples
    Benchmark(
        "gsm8k",
        "GSM8K",
        task="gsm8k",
        num_fewshot=0,
        metric="exact_match,flexible-extract",
        template=TEMPLATE_OF_RUN,
        generation={"max_gen_toks": 512},
    ),
    Benchmark("mmlu", "MMLU", task="mmlu", num_fewshot=5, metric="acc,none"),
    Benchmark("drop", "DROP", task="drop", num_fewshot=3, metric="em,none"),
    # The harness's "bbh" asks for a chain of thought.
    Benchmark("bbh", "BBH", task="bbh_fewshot", num_fewshot=3, metric="exact_match,none"),
    # The model completes a function's head; a template would make it answer in prose.
    Benchmark(
        HUMANEVAL,
        "HumanEval",
        task="humaneval",
        num_fewshot=0,
        metric="pass@1,create_test",
        generation={"max_gen_toks": 512},
        runs_code=True,
    ),
    Benchmark("mtbench", "MT-Bench", MTBENCH, metric="score", template=TEMPLATE_OF_RUN, scale=1.0),
    Benchmark(HELDOUT, "held-out", HELDOUT),
    Benchmark(HELDOUT_LOSS, "held-out loss", HELDOUT),
)
PAPER: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def read_names(text: str) -> list[str]:
    """The names of ``--benchmarks``."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--benchmarks names none: give some of {', '.join(PAPER)}.")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'--benchmarks names "{name}" twice: keep one.')
    return names


def choose(names: Sequence[str], harness_tasks: Collection[str]) -> list[Benchmark]:
    """The benchmarks with these names.

    Args:
        harness_tasks: the harness's tasks and groups, for names that are none of `PAPER`.
    """
    chosen = []
    for name in names:
        if name in PAPER:
            chosen.append(PAPER[name])
        elif name in harness_tasks:
            chosen.append(Benchmark(name, name, task=name))
        else:
            hint = did_you_mean(name, [*PAPER, *harness_tasks])
            raise UserError(
                f'there is no benchmark "{name}"{hint}: give {", ".join(PAPER)}, a task of'
                " lm-evaluation-harness, or one of your own by --include_path."
            )
    return chosen


def tasks_of_harness(names: Sequence[str]) -> list[str]:
    """The harness's tasks among names of benchmarks; a name that is none of `PAPER` is a task."""
    tasks = []
    for name in names:
        benchmark = PAPER.get(name)
        if benchmark is None:
            tasks.append(name)
        elif benchmark.engine == HARNESS:
            tasks.append(benchmark.task)
    return tasks


# Recorded figure -> its title
TITLES = {
    "matthews_correlation": "Matthews",
    "exact_match": "exact match",
    "answer_match": "answer match",
    "f1": "F1",
    "loss": "held-out loss",
}


@dataclass(frozen=True)
class RecordedColumn:
    """A metric that training recorded on one training set: subject -> (step, value)."""

    name: str
    metric: Metric
    settings: dict[str, Any]
    values: dict[str, tuple[int, float]]


def recorded_columns(
    subjects: Sequence[Subject], benchmarks: Collection[str]
) -> list[RecordedColumn]:
    """A column per training set and metric, losses last.

    Args:
        subjects: runs, and the base model as they met it.
        benchmarks: HELDOUT for all metrics, and the loss where a training set has no other;
            HELDOUT_LOSS for the loss of each.
    """
    values: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for subject in subjects:
        for metric, value in recorded_metrics(subject).items():
            values.setdefault((training_set(subject), metric), {})[subject.label] = value
    has_many_sets = len({name for name, _ in values}) > 1
    # A training set without an accuracy or the like shows its loss instead.
    sets_with_a_score = {name for name, metric in values if metric != HELDOUT_LOSS}

    columns = []
    for name, metric in sorted(values, key=lambda key: key[1] == HELDOUT_LOSS):
        if metric == HELDOUT_LOSS:
            stands_in = HELDOUT in benchmarks and name not in sets_with_a_score
            is_shown = stands_in or HELDOUT_LOSS in benchmarks
        else:
            is_shown = HELDOUT in benchmarks
        if is_shown:
            prefix = f"{name} " if has_many_sets else ""
            columns.append(_recorded_column(name, metric, prefix, values[name, metric]))
    return columns


def recorded_metrics(subject: Subject) -> dict[str, tuple[int, float]]:
    """Metric -> (step, value), "heldout_..." of ``metrics.jsonl``.

    The last value of a run, up to the step whose weights it left; of a checkpoint that of its step;
    of the base model the values before the first step, if there are any.
    """
    if subject.folder is None:
        raise UserError(
            f"{subject.source} has no recorded metrics, which --benchmarks heldout shows: name run"
            " folders, and base beside no other benchmark."
        )
    checkpoint_step = subject.about.get("step")
    last_step = math.inf if subject.best_step is None else subject.best_step
    if subject.kind == BASE:
        last_step = 0  # measured before the training
    elif checkpoint_step:
        last_step = checkpoint_step

    metrics = {}
    for name, (step, value) in last_measured(subject.folder, last_step).items():
        is_chosen = name.startswith(HELDOUT_PREFIX) and checkpoint_step in (None, step)
        if is_chosen and value is not None:
            metrics[name] = (step, float(value))
    if not metrics and subject.kind != BASE and checkpoint_step is None:
        raise UserError(
            f"{subject.folder} recorded no held-out figure: train it with --validation_file or a"
            " task that has a validation set."
        )
    return metrics


def _recorded_column(
    training_set: str, metric: str, prefix: str, values: dict[str, tuple[int, float]]
) -> RecordedColumn:
    name = metric.removeprefix(HELDOUT_PREFIX)
    title = prefix + TITLES.get(name, name)
    # Losses are shown as they are, shares in percent.
    if metric == HELDOUT_LOSS:
        form = Metric(title, "", False, 1.0, ".4f")
    else:
        form = Metric(title, "", True, 100.0, ".2f")
    settings = {"metric": metric, "training_set": training_set}
    return RecordedColumn(f"heldout:{training_set}:{name}", form, settings, values)
