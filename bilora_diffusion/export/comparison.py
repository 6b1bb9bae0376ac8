"""What a file holds against what it was to hold, layer by layer: the one check of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TrainingError
from .layers import Layer

TOLERANCE = 1e-6  # relative, of each layer; rounding s * B to fp32 makes 6e-8


@dataclass
class Differences:
    """The largest of all layers: absolute by weight, relative by Frobenius norms."""

    layers: int = 0
    absolute: float = 0.0
    relative: float = 0.0


def compare(
    path: Path, expected: Mapping[str, Sequence[Layer]], held: Mapping[str, Sequence[Layer]]
) -> Differences:
    """Compare B @ A and DoRA's magnitude of every layer, in fp64.

    Args:
        path: of the file, for the sentence.
        expected, held: the layers of each model, with the scale in B.

    Raises:
        TrainingError: a model or a layer is missing or too many, or one differs by more than 1e-6.
    """
    if odd := sorted(expected.keys() ^ held.keys()):
        raise TrainingError(f"{path} holds {', '.join(held)} and not {odd[0]} as it was to.")
    largest = Differences()
    for component, layers in expected.items():
        own, others = ({_key(layer): layer for layer in side} for side in (layers, held[component]))
        if odd := sorted(own.keys() ^ others.keys()):
            raise TrainingError(f"{path} and its source do not agree on {component}.{odd[0]}.")
        for name, layer in own.items():
            absolute, relative = difference(layer, others[name])
            if not relative <= TOLERANCE:
                raise TrainingError(f"{path} differs in {component}.{name} by {relative:.1e}.")
            largest.layers += 1
            largest.absolute = max(largest.absolute, absolute)
            largest.relative = max(largest.relative, relative)
    return largest


def difference(one: Layer, other: Layer) -> tuple[float, float]:
    """The largest difference of two layers' weights, and the relative one of the whole.

    That of the product is relative to the norms of its rank-one terms: where these nearly cancel,
    as those of an init that was hardly trained, each is rounded on its own.
    """
    (A, B), (C, D) = (
        [side.to("cpu", torch.float64).flatten(1) for side in (layer.A, layer.B)]
        for layer in (one, other)
    )
    fit = A.shape[1] == C.shape[1] and len(B) == len(D)
    if not fit or (one.magnitude is None) != (other.magnitude is None):
        return float("inf"), float("inf")
    gaps = [(0.0, 0.0)]
    if not (torch.equal(A, C) and torch.equal(B, D)):  # which spares most files the products
        gaps.append(_gap(B @ A, D @ C, float((B.norm(dim=0) * A.norm(dim=1)).sum())))
    if one.magnitude is not None and other.magnitude is not None:
        m, n = (
            side.to("cpu", torch.float64).flatten() for side in (one.magnitude, other.magnitude)
        )
        gaps.append(_gap(m, n, float(m.norm())))
    absolute, relative = zip(*gaps, strict=True)
    return max(absolute), max(relative)


def _gap(one: Tensor, other: Tensor, size: float) -> tuple[float, float]:
    gap = one - other
    relative = float(gap.norm()) / max(size, torch.finfo(torch.float64).tiny)
    return float(gap.abs().max()), relative


def _key(layer: Layer) -> str:
    """A layer's name whatever the version of Transformers."""
    return layer.name.removeprefix("text_model.")
