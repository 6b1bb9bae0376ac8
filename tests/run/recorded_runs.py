"""Run folders like those that training writes, created without training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, Factors
from bilora_diffusion.run import checkpoint, snapshots
from bilora_diffusion.run.checkpoint import Checkpoint
from bilora_diffusion.run.runlog import RunLog
from bilora_diffusion.train.dynamics import FIRST_ORDER, GAIN, PRODUCT, TERMS, alignment

CONFIG = {
    "learning_rate": 1e-3,
    "auxiliary_learning_rate": None,
    "rank": 2,
    "auxiliary_rank": None,
    "rho": 0.05,
    "rho_norm": "scaled",
}
SHAPES = {"unet.down.to_q": (6, 5), "unet.down.to_k": (6, 5), "unet.up.to_out": (4, 7)}
SCALE = 1.5
Share = Callable[[int], float]


def factors(generator: torch.Generator, rank: int = 2) -> list[Factors]:
    """Return random factors for every layer."""
    layers = []
    for name, (m, n) in SHAPES.items():
        A = torch.randn(rank, n, generator=generator)
        B = torch.randn(m, rank, generator=generator)
        layers.append(Factors(name, A, B, SCALE))
    return layers


def interpolate(start: Sequence[Factors], end: Sequence[Factors], share: float) -> list[Factors]:
    """Return factors on the straight line from ``start`` to ``end``, at ``share`` of the way."""
    layers = []
    for first, last in zip(start, end, strict=True):
        A = first.A + share * (last.A - first.A)
        B = first.B + share * (last.B - first.B)
        layers.append(first._replace(A=A, B=B))
    return layers


def make(
    folder: Path,
    method: str = "bilora",
    seed: int = 0,
    steps: Sequence[int] = range(11),
    config: Mapping[str, Any] | None = None,
    course: Mapping[str, Share] | None = None,
    losses: Mapping[int, tuple[float, float]] | None = None,
    ratio: Sequence[float] = (100.0, 200.0, 300.0),
) -> Path:
    """Write a finished run and return its folder.

    Args:
        folder: folder to write.
        method: method whose adapters and values are written.
        seed: seed of the weights, which the record has too.
        steps: steps that have a snapshot; () for a run without snapshots.
        config: options that replace those of `CONFIG`.
        course: adapter -> share of the way to its final weights, as a function of the step.
        losses: step -> training and held-out loss, for each measured step.
        ratio: ratio of Figure 2b in each layer, for LoRA-SAM.
    """
    log = RunLog(folder)
    log.start({**CONFIG, **(config or {})}, method=method, seed=seed, resume_step=None)
    generator = torch.Generator().manual_seed(seed)
    names = (PRIMARY, AUXILIARY) if method == "bilora" else (PRIMARY,)
    # Each adapter moves on a straight line between two sets of random factors.
    ends = {name: (factors(generator), factors(generator)) for name in names}
    measured = dict(losses or {})
    for step in sorted(set(steps) | set(measured)):
        if step:
            log.metric(step, loss=1.0, digest=f"{seed}-{step}", auxiliary_norm=0.05)
        if step in measured:
            training, heldout = measured[step]
            log.metric(step, heldout_loss=heldout, train_grid_loss=training)
        if step in steps:
            adapters: dict[str, list[Factors]] = {}
            for name in names:
                if course is not None and name in course:
                    share = course[name](step)
                else:
                    share = step / max(steps)
                start, end = ends[name]
                adapters[name] = interpolate(start, end, share)
            layers = layer_values(adapters, method, step, ratio)
            snapshots.write(folder, snapshots.Snapshot(step, adapters, layers))
    log.close("finished", steps=max(steps, default=0))
    return folder


def layer_values(
    adapters: Mapping[str, list[Factors]], method: str, step: int, ratio: Sequence[float]
) -> dict[str, Tensor]:
    """Return the values of each layer that training writes with the factors."""
    unit = torch.ones(len(SHAPES), dtype=torch.float64)
    if method == "bilora":
        values = alignment(adapters[PRIMARY], adapters[AUXILIARY])
        if step:  # no step has been taken before the first snapshot
            values = {**values, GAIN: unit * 0.5}
        return values
    if method != "lora-sam" or step == 0:
        return {}
    ratios = torch.tensor(ratio, dtype=torch.float64)
    values = dict.fromkeys((*TERMS, FIRST_ORDER, PRODUCT), unit)
    values |= {TERMS[1]: ratios, FIRST_ORDER: ratios}
    return {name: value.clone() for name, value in values.items()}


def save(folder: Path, step: int = 1, value: float = 0.0, **parts: Any) -> Path:
    """Save a checkpoint whose default parts contain ``value``, and return its folder."""
    default_parts: dict[str, Any] = {
        "tensors": {"unet.default.a": torch.full((3, 2), value)},
        "optimizer": {"state": {0: {"step": torch.tensor(value)}}, "param_groups": []},
        "scheduler": {},
        "scaler": None,
        "extra": {"value": value},
    }
    return checkpoint.save(folder, Checkpoint(step, **{**default_parts, **parts}))
