"""Score text runs by benchmarks: GSM8K, MMLU, DROP, BBH, HumanEval, MT-Bench, and recorded metrics.

    python -m eval.text_scores runs/lora runs/bilora base --benchmarks gsm8k,mmlu
    python -m eval.text_scores runs/*-cola-* runs/*-mrpc-* --benchmarks heldout    # Tables 1 and 2
    python -m eval.text_scores runs/*-rte-* base --benchmarks heldout,heldout_loss
    python -m eval.text_scores runs/bilora --steps all       # every checkpoint's held-out metrics
    python -m eval.text_scores runs/bilora --benchmarks humaneval --allow_code_execution
    python -m eval.text_scores adapter base --model_name_or_path meta-llama/Llama-3.1-8B \\
        --benchmarks mmlu,drop,bbh --limit 20                                      # a trial
    python -m eval.text_scores runs/lora runs/bilora --benchmarks mtbench \\
        --judge_base_url http://localhost:8000/v1 --judge_model judge --mtbench_questions q.jsonl

A run is a run folder or a folder with a PEFT adapter; `base` is the model without one, and among
recorded metrics (heldout) what the runs measured before their first step. Runs of one method that
differ in the seed only are one row. Scores are cached: the same command goes on where it was
interrupted. Writes report.md, rows.csv, summary.csv and result.json.

Settings: MMLU with 5 examples, DROP and BBH with 3 and no chain of thought, as INSTRUCTEVAL;
HumanEval with none, as a completion; GSM8K and MT-Bench with none, under the template of training.
Any other task of lm-evaluation-harness (such as bbh_cot_fewshot) is taken as it is there, and so
are those of --include_path. The judge's key is read from the environment variable JUDGE_API_KEY
only.

HumanEval runs programs that the model writes, with all rights of this process. Start it in a
container without network.
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

# Packages whose versions the result names too
PACKAGES = ("lm_eval", "datasets")
# Longest answer by default, as in MT-Bench's own program
MTBENCH_TOKENS = 1024
# Key of a measurement in its cache
SCORE = "score"


@dataclass(frozen=True)
class BenchmarkOptions:
    """Benchmarks, and the models that they are asked of."""

    section = "benchmarks and models"
    benchmarks: str = option("", "Names with commas; see below.")
    steps: str | None = option(None, checkpoints.HELP)
    control: str | None = option(None, "Compare with this row (default: LoRA, or the first).")
    model_name_or_path: str | None = option(None, "Base model (default: that of the runs).")
    quantize: str | None = option(
        None, "The base model (default: as in training).", choices=("none", "nf4")
    )
    trust_remote_code: bool = option(False, "Let the model's own code run.")
    include_path: list[Path] = option([], "Folders with tasks of the harness.")  # noqa: RUF009
    limit: int | None = option(None, "First items of each task, for a trial.", range=COUNTS)
    eval_batch_size: int = option(8, "Prompts in one call of the model.", range=BATCHES)
    max_new_tokens: int | None = option(
        None, "Of HumanEval (default: 512) and MT-Bench (default: 1024).", range=TOKENS
    )
    seed: int = option(0, "Seed of sampled answers.")
    device: str | None = option(None, "cpu, cuda, cuda:1 (default: a GPU if there is one).")
    dtype: str | None = option(
        None,
        "Of the models (default: the device's best).",
        choices=("float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True)
class HumanEvalOptions:
    """Programs of a model."""

    section = "HumanEval"
    allow_code_execution: bool = option(
        False, "Run what the model writes; only in a container without network."
    )


@dataclass(frozen=True)
class JudgeOptions:
    """Questions and their judge."""

    section = "MT-Bench"
    mtbench_questions: str | None = option(None, "JSONL file (default: the hub's set).")
    judge_base_url: str | None = option(None, "OpenAI-compatible, as http://localhost:8000/v1.")
    judge_model: str | None = option(None, "Its name at the endpoint.")


@dataclass(frozen=True)
class PreparedBenchmark:
    """A benchmark with its engine."""

    benchmark: Benchmark
    engine: Engine
    # All that its score depends on, except the subject
    settings: dict[str, Any]

    def template(self, model: BaseModel) -> str:
        """The template around its prompts."""
        if self.benchmark.template == TEMPLATE_OF_RUN:
            return model.template
        return self.benchmark.template

    def metric_and_settings(self, measurement: Measurement) -> tuple[Metric, dict[str, Any]]:
        """Its metric and its settings, with those that are known only after it was asked."""
        settings = self.settings | measurement.settings
        higher_is_better = bool(settings.pop("higher_is_better", True))
        title, scale = self.benchmark.title, self.benchmark.scale
        metric = settings.get("metric")
        if self.benchmark.metric is None and metric is not None:
            # A task's first metric, which may be no share of right answers
            title += f" ({metric.partition(',')[0]})"
            if "perplexity" in metric or "bits_per_byte" in metric:
                scale = 1.0
        return Metric(title, "", higher_is_better, scale, ".2f"), settings


class TextScores(OverSteps):
    """A benchmark is a metric. Its rows without an item are scores, those with one are questions.

    The result's settings have "benchmarks": name -> how it was asked, in the order of the tables.
    """

    name = "text_scores"
    options = (BenchmarkOptions, HumanEvalOptions, JudgeOptions)
    runs = "run folders, folders with a PEFT adapter, or base"

    def subjects(self) -> Sequence[Subject]:
        """Runs, adapters, and the base model."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from bilora_diffusion.run.console import quiet

        from . import harness

        quiet()
        args = self.args
        names = benchmarks.read_names(args.benchmarks or benchmarks.HELDOUT)
        # The curves over checkpoints always show the loss.
        if args.steps is not None and benchmarks.HELDOUT_LOSS not in names:
            names.append(benchmarks.HELDOUT_LOSS)
        tasks = benchmarks.tasks_of_harness(names)
        self.manager = harness.task_manager(tasks, args.include_path) if tasks else None
        known_tasks = list(self.manager.all_tasks) if self.manager else []
        self.benchmarks = benchmarks.choose(names, known_tasks)

        # Weights are needed for benchmarks, not for recorded metrics.
        only_heldout = all(benchmark.is_recorded for benchmark in self.benchmarks)
        pairs = base_models.read_subjects(args, only_heldout)
        self.base_models = {subject.label: model for subject, model in pairs}
        return [subject for subject, _ in pairs]

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Check everything that can be checked without a model."""
        from .models import Models

        control = self.args.control or checkpoints.last_group(subjects)
        self.control = compare.control(subjects, control)
        if self.args.steps is not None:
            self.notes += checkpoints.left_out(subjects, self.args.steps)
        self.device = open_device(self.args.device)
        dtype = choose_dtype(self.args.dtype, self.device)
        self.models = Models(self.device, dtype)

        # Figures that training recorded need no model.
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
            # Other tasks of the harness keep their own length of answers.
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
        """Recorded metrics, then each benchmark's score, questions and further metrics."""
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
        """Every benchmark's score of a subject; its model is loaded only if one is missing."""
        from tqdm import tqdm

        # A benchmark's score is cached as a whole, its answers one by one in the engine.
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
        """The cache of a subject and a benchmark; ``about`` has further circumstances."""
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
        """Differences over seeds, or over items where there are not two common seeds."""
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
            report.section("How it was asked", reporting.settings_of_benchmarks(result)),
            report.closing(replace(result, notes=[]), packages, report.sources(result)),
        ]


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Dtype of the models: the named one, else bfloat16 where a GPU has it."""
    import torch

    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


main = TextScores.main
