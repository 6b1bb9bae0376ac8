"""Ask each benchmark of a subject; what is finished is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tqdm import tqdm

from ..kept import Kept
from ..subjects import Subject
from .bases import Base
from .benchmarks import EFFECT, Measured
from .models import Models
from .plan import Asked

SCORE = "score"


def measured(
    asked: Mapping[str, Asked],
    subject: Subject,
    base: Base,
    models: Models,
    folder: Path,
    batch_size: int,
) -> dict[str, Measured]:
    """Every benchmark's score of a subject; its model is loaded only if one is missing.

    Args:
        asked: by name.
        folder: where what is measured is kept.

    Raises:
        UserError: something can't be loaded or asked; what was measured is kept.
    """
    keepers = {name: partial(_kept, folder, subject, base, one) for name, one in asked.items()}
    scores = {name: keepers[name](one.settings) for name, one in asked.items()}
    missing = [name for name, kept in scores.items() if SCORE not in kept]
    if missing:
        with models.ready(subject, base) as loaded:
            for name in tqdm(missing, desc=subject.label, unit="score"):
                template = asked[name].template(base)
                score = asked[name].engine.measure(loaded, template, batch_size, keepers[name])
                if loaded.effect is not None:
                    score.others[EFFECT] = loaded.effect
                scores[name].put(SCORE, asdict(score))
    adapter = TypeAdapter(Measured)
    return {name: adapter.validate_python(kept.get(SCORE)) for name, kept in scores.items()}


def _kept(
    folder: Path, subject: Subject, base: Base, asked: Asked, about: Mapping[str, Any]
) -> Kept:
    under = base.identity() | {
        "template": asked.template(base),
        "dtype": asked.settings["dtype"],
    }
    of_subject = {"benchmark": asked.benchmark.name, "digest": subject.digest, "base": under}
    return Kept(folder, of_subject | {"about": dict(about)})
