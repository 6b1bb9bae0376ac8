"""What is asked, decided and checked before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bilora_diffusion.errors import UserError, did_you_mean

from ..subjects import Subject
from ..table import Metric
from . import benchmarks, harness, humaneval, judge, mtbench
from .bases import Base
from .benchmarks import GIVEN_TEMPLATES, HARNESS, MTBENCH, NONE, OF_RUN, Benchmark, Measured
from .generate import Decoding, Keeper
from .harness import Harness
from .humaneval import HumanEval
from .models import Loaded
from .mtbench import MTBench
from .sandbox import Sandbox

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUMANEVAL_TOKENS, MTBENCH_TOKENS = 512, 1024
POSITIVE = ("limit", "eval_batch_size", "num_samples", "max_new_tokens", "execution_timeout")


class Engine(Protocol):
    """A benchmark, ready to be asked of models."""

    def settings(self) -> dict[str, Any]:
        """What a score depends on beside the model."""
        ...

    def measure(self, loaded: Loaded, template: str, batch_size: int, kept: Keeper) -> Measured:
        """Ask and score a model; what is kept is not asked again."""
        ...


@dataclass(frozen=True)
class Asked:
    """A benchmark, with what asks it and all that its score depends on beside the subject."""

    benchmark: Benchmark
    engine: Engine
    settings: dict[str, Any]

    def template(self, base: Base) -> str:
        """The template around its prompts."""
        return base.template if self.benchmark.template == OF_RUN else self.benchmark.template

    def described(self, measured: Measured) -> tuple[Metric, dict[str, Any]]:
        """How it is shown and was asked, with what only asking it told."""
        settings = self.settings | measured.settings
        higher = bool(settings.pop("higher_is_better", True))
        return Metric(self.benchmark.title, "", higher, self.benchmark.scale, ".2f"), settings


def check(args: argparse.Namespace) -> None:
    """Refuse options out of range.

    Raises:
        UserError: it names the value.
    """
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}: give a number above 0, or leave it out.")
    if args.temperature < 0:
        raise UserError(f"--temperature is {args.temperature:g}: give 0 (greedy) or more.")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p is {args.top_p:g}: give a number above 0 and up to 1.")
    if args.num_samples > 1 and args.temperature == 0:
        raise UserError(
            f"--num_samples {args.num_samples} at temperature 0 would be the same program each"
            " time: give --temperature, such as 0.2 for pass@1 or 0.8 for pass@10."
        )
    if args.template not in (None, *GIVEN_TEMPLATES):
        raise UserError(
            f'--template "{args.template}"{did_you_mean(args.template, GIVEN_TEMPLATES)} is none:'
            f" give one of {', '.join(GIVEN_TEMPLATES)}."
        )


def choose(args: argparse.Namespace) -> tuple[list[Benchmark], Any]:
    """The benchmarks that are asked for, and the harness's task manager where it knows one.

    Raises:
        UserError: an unknown name, or a bad number of examples.
    """
    tasks = benchmarks.harness_tasks(args.benchmarks)
    manager = harness.manager(tasks, args.include_path) if tasks else None
    known = list(manager.all_tasks) if manager else []
    return benchmarks.choose(args.benchmarks, known, args.num_fewshot, args.template), manager


def asked(
    chosen: Sequence[Benchmark],
    args: argparse.Namespace,
    manager: Any,
    subjects: Sequence[Subject],
    dtype: torch.dtype,
) -> dict[str, Asked]:
    """The benchmarks that training did not record, ready to be asked.

    Raises:
        UserError: what one needs is not there, or was not allowed; or a subject writes no text.
    """
    found = {}
    for benchmark in chosen:
        if not benchmark.recorded:
            engine = _engine(benchmark, args, manager, len(subjects))
            named = {"template": benchmark.template, "limit": args.limit}
            numbers = {"dtype": str(dtype).removeprefix("torch.")}
            found[benchmark.name] = Asked(benchmark, engine, named | numbers | engine.settings())
    for subject in subjects if found else ():
        if subject.option("task_type") == "classification":
            raise UserError(
                f"{subject.source} is a classifier, which writes no text: use --benchmarks heldout."
            )
    return found


def _engine(benchmark: Benchmark, args: argparse.Namespace, manager: Any, models: int) -> Engine:
    if benchmark.engine == HARNESS:
        return Harness(benchmark, manager, args.limit, args.include_path)
    if benchmark.engine == MTBENCH:
        rater = judge.connect(args.judge_base_url, args.judge_model)
        decoding = Decoding(args.max_new_tokens or MTBENCH_TOKENS, seed=args.seed)
        return MTBench(mtbench.questions(args.mtbench_questions, args.limit), rater, decoding)
    problems = humaneval.problems(args.limit)
    if not args.allow_code_execution:
        raise UserError(
            f"humaneval runs programs that the models write: {len(problems)} problems x"
            f" {args.num_samples} samples x {models} models, each in a fresh process without"
            " network, environment and other folders; add --allow_code_execution if they may."
        )
    decoding = Decoding(
        args.max_new_tokens or HUMANEVAL_TOKENS,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stops=humaneval.STOPS if benchmark.template == NONE else (),
    )
    return HumanEval(problems, Sandbox.tried(args.execution_timeout), decoding, args.num_samples)


def dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Of the models: the named one, else bfloat16 where a GPU has it."""
    if name is not None:
        return DTYPES[name]
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32
