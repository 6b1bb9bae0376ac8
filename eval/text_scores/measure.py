"""Ask each benchmark of each subject; what is finished is kept."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from tqdm import tqdm

from ..kept import Kept
from ..subjects import Subject
from ..table import Metric
from .bases import Base
from .benchmarks import EFFECT, OF_RUN, Benchmark, Measured
from .models import Models
from .plan import Engine, dtype

SCORE = "score"


class Asked:
    """Benchmarks, ready to be asked of subjects, one base model in memory at a time.

    Args:
        engines: name -> a benchmark and what asks it.
        args: of the command line.
        folder: where what is measured is kept.
        device: of the models.
    """

    def __init__(
        self,
        engines: Mapping[str, tuple[Benchmark, Engine]],
        args: argparse.Namespace,
        folder: Path,
        device: torch.device,
    ) -> None:
        self._engines, self._args, self._folder = engines, args, folder
        self._dtype = dtype(args.dtype, device)
        self._models = Models(device, self._dtype)

    def measured(self, subject: Subject, base: Base) -> dict[str, Measured]:
        """Every benchmark's score of a subject; its model is loaded only if one is missing.

        Raises:
            UserError: something can't be loaded or asked; what was measured is kept.
        """
        keepers = {
            name: partial(self._kept, subject, base, benchmark)
            for name, (benchmark, _) in self._engines.items()
        }
        kept = {name: keepers[name](self.settings(name)) for name in keepers}
        missing = [name for name, pieces in kept.items() if SCORE not in pieces]
        if missing:
            with self._models.ready(subject, base) as loaded:
                for name in tqdm(missing, desc=subject.label, unit="score"):
                    benchmark, engine = self._engines[name]
                    template = _template(benchmark, base)
                    size = self._args.eval_batch_size
                    measured = engine.measure(loaded, template, size, keepers[name])
                    if loaded.effect is not None:
                        measured.others[EFFECT] = loaded.effect
                    kept[name].put(SCORE, asdict(measured))
        adapter = TypeAdapter(Measured)
        return {name: adapter.validate_python(pieces.get(SCORE)) for name, pieces in kept.items()}

    def settings(self, name: str) -> dict[str, Any]:
        """All that a benchmark's score depends on beside the subject."""
        benchmark, engine = self._engines[name]
        return {
            "template": benchmark.template,
            "limit": self._args.limit,
            "dtype": str(self._dtype).removeprefix("torch."),
            **engine.settings(),
        }

    def described(self, name: str, measured: Measured) -> tuple[Metric, dict[str, Any]]:
        """How a benchmark is shown and was asked, with what only asking it told."""
        benchmark, _ = self._engines[name]
        settings = self.settings(name) | measured.settings
        higher = bool(settings.pop("higher_is_better", True))
        return Metric(benchmark.title, "", higher, benchmark.scale, ".2f"), settings

    def _kept(
        self, subject: Subject, base: Base, benchmark: Benchmark, about: Mapping[str, Any]
    ) -> Kept:
        under = base.identity() | {
            "template": _template(benchmark, base),
            "dtype": str(self._dtype),
        }
        name, digest = benchmark.name, subject.digest
        whole = {"benchmark": name, "digest": digest, "base": under, "about": dict(about)}
        return Kept(self._folder, whole)


def _template(benchmark: Benchmark, base: Base) -> str:
    return base.template if benchmark.template == OF_RUN else benchmark.template
