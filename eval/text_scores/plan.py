"""Benchmarks: chosen and checked before a model is loaded, then measured; scores are cached."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from tqdm import tqdm

from bilora_diffusion.core.errors import UserError

from ..cache import Cache
from ..subjects import Subject
from ..table import Metric
from . import benchmarks, harness, humaneval, mtbench
from .bases import Base
from .benchmarks import EFFECT, HARNESS, MTBENCH, OF_RUN, Benchmark, Measured
from .harness import Harness
from .humaneval import HumanEval
from .models import Decoding, Models
from .mtbench import MTBench
from .sandbox import Sandbox

HUMANEVAL_TOKENS, MTBENCH_TOKENS = 512, 1024
SCORE = "score"


@dataclass(frozen=True)
class Asked:
    """A benchmark, with what asks it and all that its score depends on beside the subject."""

    benchmark: Benchmark
    engine: Harness | HumanEval | MTBench
    settings: dict[str, Any]

    def template(self, base: Base) -> str:
        """The template around its prompts."""
        return base.template if self.benchmark.template == OF_RUN else self.benchmark.template

    def described(self, measured: Measured) -> tuple[Metric, dict[str, Any]]:
        """Its metric and its settings, with those that are known only after it was asked."""
        settings = self.settings | measured.settings
        higher = bool(settings.pop("higher_is_better", True))
        return Metric(self.benchmark.title, "", higher, self.benchmark.scale, ".2f"), settings


def choose(args: argparse.Namespace) -> tuple[list[Benchmark], Any]:
    """The benchmarks that are asked for, and the harness's task manager where it knows one."""
    tasks = benchmarks.harness_tasks(args.benchmarks)
    manager = harness.manager(tasks, args.include_path) if tasks else None
    known = list(manager.all_tasks) if manager else []
    return benchmarks.choose(args.benchmarks, known), manager


def asked(
    chosen: Sequence[Benchmark],
    args: argparse.Namespace,
    manager: Any,
    models: int,
    dtype: torch.dtype,
) -> dict[str, Asked]:
    """The benchmarks that training did not record, ready to be asked of so many models."""
    ready = {}
    for benchmark in chosen:
        if not benchmark.recorded:
            engine = _engine(benchmark, args, manager, models)
            named = {"template": benchmark.template, "limit": args.limit}
            numbers = {"dtype": str(dtype).removeprefix("torch.")}
            ready[benchmark.name] = Asked(benchmark, engine, named | numbers | engine.settings())
    return ready


def _engine(benchmark: Benchmark, args: argparse.Namespace, manager: Any, models: int) -> Any:
    if benchmark.engine == HARNESS:
        return Harness(benchmark, manager, args.limit, args.include_path)
    if benchmark.engine == MTBENCH:
        rater = mtbench.connect(args.judge_base_url, args.judge_model)
        decoding = Decoding(args.max_new_tokens or MTBENCH_TOKENS, seed=args.seed)
        return MTBench(mtbench.questions(args.mtbench_questions, args.limit), rater, decoding)
    problems = humaneval.problems(args.limit)
    if not args.allow_code_execution:
        raise UserError(
            f"humaneval runs programs that the models write: {len(problems)} problems x {models}"
            " models, each in a fresh process without network, environment and other folders; add"
            " --allow_code_execution if they may."
        )
    decoding = Decoding(args.max_new_tokens or HUMANEVAL_TOKENS)
    return HumanEval(problems, Sandbox.tried(), decoding)


def dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Dtype of the models: the named one, else bfloat16 where a GPU has it."""
    if name is not None:
        return getattr(torch, name)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def measured(
    asked: Mapping[str, Asked],
    subject: Subject,
    base: Base,
    models: Models,
    folder: Path,
    batch_size: int,
) -> dict[str, Measured]:
    """Every benchmark's score of a subject; its model is loaded only if one is missing."""
    caches = {name: partial(_cache, folder, subject, base, one) for name, one in asked.items()}
    scores = {name: caches[name](one.settings) for name, one in asked.items()}
    missing = [name for name, cache in scores.items() if SCORE not in cache]
    if missing:
        with models.ready(subject, base) as loaded:
            for name in tqdm(missing, desc=subject.label, unit="score"):
                template = asked[name].template(base)
                score = asked[name].engine.measure(loaded, template, batch_size, caches[name])
                if loaded.effect is not None:
                    score.others[EFFECT] = loaded.effect
                scores[name].put(SCORE, asdict(score))
    adapter = TypeAdapter(Measured)
    return {name: adapter.validate_python(cache.get(SCORE)) for name, cache in scores.items()}


def _cache(
    folder: Path, subject: Subject, base: Base, asked: Asked, about: Mapping[str, Any]
) -> Cache:
    under = base.identity() | {"template": asked.template(base), "dtype": asked.settings["dtype"]}
    of_subject = {"benchmark": asked.benchmark.name, "digest": subject.digest, "base": under}
    return Cache(folder, of_subject | {"about": dict(about)})
