"""Benchmarks and their settings: those of the paper's Table 3, any other task of
lm-evaluation-harness, and metrics that training recorded on held-out data.

The paper does not give the prompts of its benchmarks. For Llama 3.1, it refers to INSTRUCTEVAL
(Chia et al. 2023, https://arxiv.org/abs/2306.04757). INSTRUCTEVAL gives 5 examples for MMLU, 3 for
DROP and BBH, and none for HumanEval, without a chain of thought; these are the defaults here.
Prompts and answer matching come from the harness. INSTRUCTEVAL's own code differs: it accepts any
answer that begins with the label, and skips DROP's questions with several answers. GSM8K and
MT-Bench get no examples and the template of the run's training, as in LoRA-GA (Wang et al. 2024,
https://arxiv.org/abs/2407.05000) on the same data.
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
# Value of `Benchmark.template` for the template used in training
TEMPLATE_OF_RUN = "run"
# Metric: largest change of the probe's logits by the adapter
EFFECT = "effect of adapter"
# Metric: number of items without a readable answer
UNPARSED = "without an answer"
# Maximum number of characters of an answer in the result
ANSWER_LETTERS = 200


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and its settings."""

    # Name on the command line
    name: str
    # Title in tables
    title: str
    # Engine that scores it: "harness", "mtbench", or "heldout" for metrics recorded in training
    engine: str = HARNESS
    # Name of the task in the harness
    task: str = ""
    # Number of examples in the prompt; None for the task's own number
    num_fewshot: int | None = None
    # Score, as "metric,filter" in the harness; None for the task's first metric
    metric: str | None = None
    # Template around each prompt: "run" for the template of training, "none" for the bare prompt
    template: str = NO_TEMPLATE
    # Factor of the score in tables: 100 for a share, 1 for points
    scale: float = 100.0
    # Generation arguments that override those of the task
    generation: Mapping[str, Any] = field(default_factory=dict)
    # Whether the task runs programs that the model writes
    runs_code: bool = False

    @property
    def is_recorded(self) -> bool:
        """Whether the benchmark consists of metrics recorded in training."""
        return self.engine == HELDOUT


@dataclass(frozen=True)
class Item:
    """The result of one question."""

    # Identifies the question in all runs, so that scores can be paired
    id: str
    # Score of the answer; None if the question has no score of its own
    score: float | None
    # Whether an answer (or the judge's rating) could be read
    parsed: bool = True
    # Beginning of the model's answer
    answer: str = ""


@dataclass(frozen=True)
class Measurement:
    """The result of a model on a benchmark."""

    # Score: a share, or points
    value: float
    items: list[Item]
    # Further metrics by name
    metrics: dict[str, float] = field(default_factory=dict)
    # Settings of the benchmark that are known only after the measurement
    settings: dict[str, Any] = field(default_factory=dict)

    def all_metrics(self) -> dict[str, float]:
        """Return the further metrics, with counts of the items if there are any."""
        if not self.items:
            return self.metrics
        unparsed = sum(not item.parsed for item in self.items)
        return {"items": len(self.items), UNPARSED: unparsed, **self.metrics}

    def to_json(self) -> dict[str, Any]:
        """Return the values to store in the cache."""
        return {
            "value": self.value,
            "items": [asdict(item) for item in self.items],
            "others": self.metrics,  # this key keeps the caches of earlier versions valid
            "settings": self.settings,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Measurement:
        """Make a measurement from the return value of `to_json`."""
        items = [Item(**item) for item in stored["items"]]
        return cls(stored["value"], items, stored["others"], stored["settings"])


class Engine(Protocol):
    """Asks a model the questions of a benchmark."""

    def settings(self) -> dict[str, Any]:
        """Return everything that a score depends on, except the model."""
        ...

    def measure(
        self, model: LoadedModel, template: str, batch_size: int, cache_for: CacheFor
    ) -> Measurement:
        """Ask the questions and score the answers.

        Args:
            model: the model under test.
            template: name of the template around the prompts.
            batch_size: number of prompts per batch.
            cache_for: returns the cache for given settings; see `CacheFor`.
        """
        ...


BENCHMARKS = (
    # Without examples, as in LoRA-GA
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
    # The harness's task "bbh" uses a chain of thought, "bbh_fewshot" does not.
    Benchmark("bbh", "BBH", task="bbh_fewshot", num_fewshot=3, metric="exact_match,none"),
    # The model completes a function signature; with a template, it would answer in prose.
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
    """Read the benchmark names given with ``--benchmarks``."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--benchmarks names no benchmark: give some of {', '.join(PAPER)}.")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'--benchmarks names "{name}" twice: keep one.')
    return names


def choose(names: Sequence[str], harness_tasks: Collection[str]) -> list[Benchmark]:
    """Return the benchmarks with these names.

    Args:
        names: names of benchmarks.
        harness_tasks: tasks and groups of the harness, for names that are not in `PAPER`.

    Raises:
        UserError: there is no benchmark with one of the names.
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
                " lm-evaluation-harness, or a task of your own with --include_path."
            )
    return chosen


def tasks_of_harness(names: Sequence[str]) -> list[str]:
    """Return the harness's tasks for these benchmarks; a name that is not in `PAPER` is a task."""
    tasks = []
    for name in names:
        benchmark = PAPER.get(name)
        if benchmark is None:
            tasks.append(name)
        elif benchmark.engine == HARNESS:
            tasks.append(benchmark.task)
    return tasks


# Recorded metric -> its title
TITLES = {
    "matthews_correlation": "Matthews",
    "exact_match": "exact match",
    "answer_match": "answer match",
    "f1": "F1",
    "loss": "held-out loss",
}


@dataclass(frozen=True)
class RecordedColumn:
    """A metric that training recorded, for the runs on one training set."""

    name: str
    metric: Metric
    settings: dict[str, Any]
    # Label of a subject -> (step, value)
    values: dict[str, tuple[int, float]]


def recorded_columns(
    subjects: Sequence[Subject], benchmarks: Collection[str]
) -> list[RecordedColumn]:
    """Return a column for each training set and metric, with losses last.

    Args:
        subjects: runs, and the base model as its subjects with the runs' folders.
        benchmarks: with HELDOUT, the columns are all metrics except the loss; a training set that
            has only the loss gets the loss. HELDOUT_LOSS adds the loss of each training set.
    """
    values: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for subject in subjects:
        for metric, value in recorded_metrics(subject).items():
            values.setdefault((training_set(subject), metric), {})[subject.label] = value
    has_many_sets = len({name for name, _ in values}) > 1
    # A training set without a score such as accuracy shows its loss instead.
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
    """Return the metrics "heldout_..." of ``metrics.jsonl``: name -> (step, value).

    For a run, each value is the last one up to the step whose weights were exported. For a
    checkpoint, it is the value at its step. For the base model, it is the value before the first
    step, if there is one.
    """
    if subject.folder is None:
        raise UserError(
            f"{subject.source} has no recorded metrics for --benchmarks heldout: give run folders;"
            " with them, base can be given if no other benchmark is."
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
            f"{subject.folder} recorded no held-out metric: train it with --validation_file or a"
            " task that has a validation set."
        )
    return metrics


def _recorded_column(
    training_set: str, metric: str, prefix: str, values: dict[str, tuple[int, float]]
) -> RecordedColumn:
    name = metric.removeprefix(HELDOUT_PREFIX)
    title = prefix + TITLES.get(name, name)
    # Losses are shown unscaled, and shares in percent.
    if metric == HELDOUT_LOSS:
        form = Metric(title, "", False, 1.0, ".4f")
    else:
        form = Metric(title, "", True, 100.0, ".2f")
    settings = {"metric": metric, "training_set": training_set}
    return RecordedColumn(f"heldout:{training_set}:{name}", form, settings, values)
