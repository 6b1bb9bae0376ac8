"""Score text runs: GSM8K, MMLU, DROP, BBH, HumanEval, MT-Bench, and recorded held-out metrics.

    python -m eval.text_scores runs/lora runs/bilora base --benchmarks gsm8k,mmlu
    python -m eval.text_scores runs/*-cola-* runs/*-mrpc-* --benchmarks heldout    # Tables 1 and 2
    python -m eval.text_scores runs/*-rte-* base --benchmarks heldout,heldout_loss
    python -m eval.text_scores runs/bilora --steps all       # held-out metrics of its checkpoints
    python -m eval.text_scores runs/bilora --benchmarks humaneval --allow_code_execution
    python -m eval.text_scores adapter base --model_name_or_path meta-llama/Llama-3.1-8B \\
        --benchmarks mmlu,drop,bbh --limit 20                                      # a trial
    python -m eval.text_scores runs/lora runs/bilora --benchmarks mtbench \\
        --judge_base_url http://localhost:8000/v1 --judge_model judge --mtbench_questions q.jsonl

A run is a run folder or a folder with a PEFT adapter; `base` is the model without an adapter. If
only recorded metrics (heldout, heldout_loss) are shown, `base` has the values that the runs
measured before their first step. Runs of one method that differ only in the seed share a row.
Scores are cached: after an interruption, the same command resumes. The command writes report.md,
rows.csv, summary.csv and result.json.

Settings: as in INSTRUCTEVAL, MMLU gets 5 examples in the prompt, DROP and BBH get 3, and none of
them uses a chain of thought. HumanEval gets no examples and is asked as a completion. GSM8K and
MT-Bench get no examples and the template of training. Any other task of lm-evaluation-harness (such
as bbh_cot_fewshot) keeps its own settings, and so do the tasks in --include_path. The judge's key
is read only from the environment variable JUDGE_API_KEY.

HumanEval runs programs that the model writes, with all permissions of this process. Start it in a
container without network access.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_diffusion.core.fields import option
from bilora_diffusion.core.values import BATCHES, TOKENS

from .. import checkpoints
from ..cache import Cache
from ..checkpoints import OverSteps
from ..command import COUNTS, open_device
from ..results import compare, report
from ..results.report import Column
from ..results.table import Metric, Result, Row, provenance_of_this_process
from ..subjects import Subject
from . import base_models, benchmarks, reporting
from .base_models import BaseModel
from .benchmarks import (
    EFFECT,
    HARNESS,
    HUMANEVAL,
    MTBENCH,
    TEMPLATE_OF_RUN,
    Benchmark,
    Engine,
    Measurement,
)

if TYPE_CHECKING:  # imported where it is used, so that --help does not wait for it
    import torch

# Additional packages whose versions are recorded in the result
PACKAGES = ("lm_eval", "datasets")
# Default maximum number of tokens in an answer, as in MT-Bench's own code
MTBENCH_TOKENS = 1024
# Key of the measurement in a benchmark's cache
SCORE = "score"


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the benchmarks and the models."""

    section = "benchmarks and models"
    benchmarks: str = option("", "Benchmark names separated by commas; see below.")
    steps: str | None = option(None, checkpoints.HELP)
    control: str | None = option(
        None,
        "Row to compare with (default: LoRA; the first run if there is no LoRA; with --steps, the"
        " first run's last step).",
    )
    model_name_or_path: str | None = option(
        None, "Base model (default: the base model of the runs)."
    )
    quantize: str | None = option(
        None, "Quantization of the base model (default: as in training).", choices=("none", "nf4")
    )
    trust_remote_code: bool = option(False, "Allow the model's repository to run its own code.")
    include_path: list[Path] = option(  # noqa: RUF009
        [], "Folders with additional tasks for lm-evaluation-harness."
    )
    limit: int | None = option(
        None, "Maximum number of items of each task, for a trial.", range=COUNTS
    )
    eval_batch_size: int = option(8, "Prompts per batch.", range=BATCHES)
    max_new_tokens: int | None = option(
        None,
        "Maximum length of answers to HumanEval (default: 512) and MT-Bench (default: 1024), in"
        " tokens.",
        range=TOKENS,
    )
    seed: int = option(0, "Seed of sampled answers.")
    device: str | None = option(None, "cpu, cuda, cuda:1 (default: a GPU if there is one).")
    dtype: str | None = option(
        None,
        "Dtype of the models (default: the best one for the device).",
        choices=("float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True)
class HumanEvalOptions:
    """Options of HumanEval."""

    section = "HumanEval"
    allow_code_execution: bool = option(
        False,
        "Run programs that the model writes; use it only in a container without network access.",
    )


@dataclass(frozen=True)
class JudgeOptions:
    """Options of MT-Bench."""

    section = "MT-Bench"
    mtbench_questions: str | None = option(
        None, "JSONL file with the questions (default: the dataset on the hub)."
    )
    judge_base_url: str | None = option(
        None, "OpenAI-compatible endpoint of the judge, such as http://localhost:8000/v1."
    )
    judge_model: str | None = option(None, "Name of the judge's model at the endpoint.")


@dataclass(frozen=True)
class PreparedBenchmark:
    """A benchmark with its engine."""

    benchmark: Benchmark
    engine: Engine
    # Everything that the score depends on, except the subject
    settings: dict[str, Any]

    def template(self, model: BaseModel) -> str:
        """Return the name of the template around the prompts."""
        if self.benchmark.template == TEMPLATE_OF_RUN:
            return model.template
        return self.benchmark.template

    def metric_and_settings(self, measurement: Measurement) -> tuple[Metric, dict[str, Any]]:
        """Return the benchmark's metric and settings, including those known after measuring."""
        settings = self.settings | measurement.settings
        higher_is_better = bool(settings.pop("higher_is_better", True))
        title, scale = self.benchmark.title, self.benchmark.scale
        metric = settings.get("metric")
        if self.benchmark.metric is None and metric is not None:
            # A task's first metric may be something other than a share of correct answers.
            title += f" ({metric.partition(',')[0]})"
            if "perplexity" in metric or "bits_per_byte" in metric:
                scale = 1.0
        return Metric(title, "", higher_is_better, scale, ".2f"), settings


class TextScores(OverSteps):
    """The command.

    Each benchmark is a metric. A row without an item has the score of a benchmark or a further
    metric; a row with an item has the score of a single question, and its note is the answer.

    Settings of the result: "benchmarks" maps each name to the benchmark's settings, in the order of
    the tables.
    """

    name = "text_scores"
    options = (BenchmarkOptions, HumanEvalOptions, JudgeOptions)
    runs = "run folders, folders with a PEFT adapter, or base"

    def subjects(self) -> Sequence[Subject]:
        """Choose the benchmarks, and read the runs, the adapters and the base model."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from bilora_diffusion.run.console import quiet

        from . import harness

        quiet()
        args = self.args
        names = benchmarks.read_names(args.benchmarks or benchmarks.HELDOUT)
        # Curves over checkpoints always include the held-out loss.
        if args.steps is not None and benchmarks.HELDOUT_LOSS not in names:
            names.append(benchmarks.HELDOUT_LOSS)
        tasks = benchmarks.tasks_of_harness(names)
        self.manager = harness.task_manager(tasks, args.include_path) if tasks else None
        known_tasks = list(self.manager.all_tasks) if self.manager else []
        self.benchmarks = benchmarks.choose(names, known_tasks)

        # Recorded metrics alone change the rows: training sets share one, and "base" has a seed.
        only_heldout = all(benchmark.is_recorded for benchmark in self.benchmarks)
        pairs = base_models.read_subjects(args, only_heldout)
        self.base_models = {subject.label: model for subject, model in pairs}
        return [subject for subject, _ in pairs]

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Check everything that can be checked without loading a model."""
        from .models import Models

        control = self.args.control or checkpoints.last_group(subjects)
        self.control = compare.control(subjects, control)
        if self.args.steps is not None:
            self.notes += checkpoints.left_out(subjects, self.args.steps)
        self.device = open_device(self.args.device)
        dtype = choose_dtype(self.args.dtype, self.device)
        self.models = Models(self.device, dtype)

        # Metrics that training recorded need no model.
        recorded_names = [entry.name for entry in self.benchmarks if entry.is_recorded]
        self.recorded: list[benchmarks.RecordedColumn] = []
        if recorded_names:
            self.recorded = benchmarks.recorded_columns(subjects, recorded_names)
        self.shown_metrics = {column.name: column.metric for column in self.recorded}
        self.settings["benchmarks"] = {column.name: column.settings for column in self.recorded}

        self.prepared: dict[str, PreparedBenchmark] = {}
        for benchmark in self.benchmarks:
            if not benchmark.is_recorded:
                engine = self._engine(benchmark)
                settings = {
                    "template": benchmark.template,
                    "limit": self.args.limit,
                    "dtype": str(dtype).removeprefix("torch."),
                    **engine.settings(),
                }
                self.prepared[benchmark.name] = PreparedBenchmark(benchmark, engine, settings)

    def _engine(self, benchmark: Benchmark) -> Engine:
        from . import mtbench
        from .harness import Harness
        from .models import Decoding

        args = self.args
        if benchmark.engine == HARNESS:
            # The option does not change the other tasks of the harness.
            if benchmark.name == HUMANEVAL and args.max_new_tokens:
                generation = {**benchmark.generation, "max_gen_toks": args.max_new_tokens}
                benchmark = replace(benchmark, generation=generation)
            return Harness(
                benchmark, self.manager, args.limit, args.include_path, args.allow_code_execution
            )
        assert benchmark.engine == MTBENCH
        judge = mtbench.connect(args.judge_base_url, args.judge_model)
        decoding = Decoding(args.max_new_tokens or MTBENCH_TOKENS, seed=args.seed)
        questions = mtbench.questions(args.mtbench_questions, args.limit)
        return mtbench.MTBench(questions, judge, decoding)

    def rows(self, subject: Subject) -> Iterator[Row]:
        """Yield recorded metrics, then each benchmark's score, questions and further metrics."""
        for column in self.recorded:
            if subject.label in column.values:
                step, value = column.values[subject.label]
                yield subject.row(column.name, value, note=f"step {step}")
        for name, measurement in self._measure_benchmarks(subject).items():
            metric, settings = self.prepared[name].metric_and_settings(measurement)
            self.shown_metrics[name] = metric
            self.settings["benchmarks"][name] = settings
            yield subject.row(name, measurement.value)
            for item in measurement.items:
                yield subject.row(name, item.score, item=item.id, note=item.answer)
            for metric_name, value in measurement.all_metrics().items():
                yield subject.row(f"{name} {metric_name}", value)

    def _measure_benchmarks(self, subject: Subject) -> dict[str, Measurement]:
        """Return a subject's measurements; its model is loaded only if one is not cached."""
        from tqdm import tqdm

        # Each measurement is cached here as a whole; the engine caches single answers.
        caches: dict[str, Cache] = {}
        missing = []
        for name, prepared in self.prepared.items():
            caches[name] = self._cache(subject, prepared, prepared.settings)
            if SCORE not in caches[name]:
                missing.append(name)
        if missing:
            spec = self.base_models[subject.label]
            with self.models.load(subject, spec) as model:
                for name in tqdm(missing, desc=subject.label, unit="score"):
                    prepared = self.prepared[name]
                    measurement = prepared.engine.measure(
                        model,
                        prepared.template(spec),
                        self.args.eval_batch_size,
                        partial(self._cache, subject, prepared),
                    )
                    if model.effect is not None:
                        measurement.metrics[EFFECT] = model.effect
                    caches[name].put(SCORE, measurement.to_json())
        return {name: Measurement.from_json(cache.get(SCORE)) for name, cache in caches.items()}

    def _cache(
        self, subject: Subject, prepared: PreparedBenchmark, about: Mapping[str, Any]
    ) -> Cache:
        """Return the cache for a subject, a benchmark and the settings in ``about``."""
        spec = self.base_models[subject.label]
        base = spec.identity() | {
            "template": prepared.template(spec),
            "dtype": prepared.settings["dtype"],
        }
        return Cache(
            self.folder,
            {
                "benchmark": prepared.benchmark.name,
                "digest": subject.digest,
                "base": base,
                "about": dict(about),
            },
        )

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        """Add differences over seeds, or over items if there are fewer than two common seeds."""
        self.notes += reporting.notes(rows, self.shown_metrics, self.args.limit)
        summarize = partial(reporting.summaries, benchmarks=list(self.shown_metrics))
        result = self.result(
            subjects,
            rows,
            summarize(rows, control=self.control),
            self.control,
            metrics=self.shown_metrics,
            provenance=provenance_of_this_process(self.command, self.device, PACKAGES),
        )
        return self.over_steps(result, summarize)

    def introduction(self, result: Result) -> str:
        return reporting.introduction(result)

    def facts(self, result: Result) -> Mapping[str, Callable[[str], str]]:
        return {
            "training seeds": lambda group: str(
                len({entry.seed for entry in result.members(group)})
            ),
            "cost": partial(reporting.cost, result),
            "peak memory": partial(reporting.memory, result),
        }

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        names = result.settings["benchmarks"]
        return {"Scores": [Column(name, difference=True) for name in names]}

    def further(self, result: Result) -> list[str]:
        assert result.provenance is not None
        packages = [name for name, version in result.provenance.versions.items() if version]
        return [
            report.section("Average", reporting.averages(result)),
            self.best_steps(result),
            report.section("Settings", reporting.settings_of_benchmarks(result)),
            report.closing(replace(result, notes=[]), packages, report.sources(result)),
        ]


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of the models: the given one, or bfloat16 on a GPU that supports it.

    Without either, it is float32.
    """
    import torch

    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


main = TextScores.main
