"""Comparison of a file with what it should hold, layer by layer: the one check of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import INITIAL, PRIMARY, factors, state_dict
from ..core.errors import TrainingError
from ..core.lora_names import FILE_NAME, kohya_file_name
from .layers import Layer, plain_name
from .lorafile import inspect
from .reader import read

TOLERANCE = 1e-6  # relative, of each layer; rounding s * B to fp32 makes 6e-8


def verify(folder: str | Path, models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Prove that `save_diffusers` wrote the primary of `models` into `folder`, and nothing else.

    s * B @ A of every layer, and DoRA's magnitude, are compared in fp64.

    Args:
        folder: where the files are.
        models: the trained models, as given to `save_diffusers`.

    Returns:
        "layers", "max_abs_difference", "max_relative_difference", "auxiliary_keys" (always 0) and,
        with a kohya file, "kohya_max_abs_difference" and "kohya_max_relative_difference".

    Raises:
        TrainingError: an auxiliary is inside, a layer is missing or too many, or one differs by
            more than 1e-6 of its norm.
        UserError: a file can't be read.
    """
    expected = {component: trained(model) for component, model in models.items()}
    report: dict[str, float] = {"auxiliary_keys": 0}
    for prefix, name in (("", FILE_NAME), ("kohya_", kohya_file_name(folder))):
        path = Path(folder) / name
        if prefix and not path.exists():
            continue
        contents = inspect(path)
        if contents.auxiliary or contents.other_tensors:
            raise TrainingError(
                f"{path} must hold the primary alone. {' '.join(contents.evidence)}"
            )
        report |= {
            f"{prefix if 'max' in key else ''}{key}": value
            for key, value in compare(path, expected).items()
        }
    return report


def require_equal(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a file whose tensors are other ones, have other values, or are not finite."""
    if odd := sorted(stored.keys() ^ expected.keys()):
        raise TrainingError(f"{path} does not hold what was trained alone: look at {odd[0]}.")
    for key, value in expected.items():
        if not value.isfinite().all():
            raise TrainingError(f"{key} is not finite, so nothing is exported: take a checkpoint.")
        if not stored[key].equal(value.detach().cpu()):
            raise TrainingError(f"{key} of {path} differs from the model: export it again.")


def trained(model: nn.Module) -> list[Layer]:
    """A model's primary by the definition of what it adds, W + s * (B @ A - B0 @ A0), in fp64."""
    tensors, taken = state_dict(model, PRIMARY), state_dict(model, INITIAL)
    made = []
    for name, _, _, scale in factors(model, PRIMARY):
        A, B = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        if f"{name}.lora_A.weight" in taken:
            A0, B0 = (taken[f"{name}.lora_{side}.weight"].double() for side in "AB")
            A, B = torch.cat((A, A0)), torch.cat((B, -B0), dim=1)
        magnitude = tensors.get(f"{name}.lora_magnitude_vector")
        made.append(Layer(plain_name(name), A, scale * B, magnitude))
    return made


def compare(path: Path, expected: Mapping[str, Sequence[Layer]]) -> dict[str, float]:
    """Read a file and compare B @ A and DoRA's magnitude of every layer, in fp64; see `verify`."""
    held = {name: part.layers for name, part in read(path).parts.items()}
    if odd := sorted(expected.keys() ^ held.keys()):
        raise TrainingError(f"{path} holds {', '.join(held)} and not {odd[0]} as it was to.")
    gaps = [(0.0, 0.0)]
    for component, layers in expected.items():
        own, others = ({layer.name: layer for layer in side} for side in (layers, held[component]))
        if odd := sorted(own.keys() ^ others.keys()):
            raise TrainingError(f"{path} and its source do not agree on {component}.{odd[0]}.")
        for name, layer in own.items():
            gaps.append(difference(layer, others[name]))
            if not (relative := gaps[-1][1]) <= TOLERANCE:
                raise TrainingError(f"{path} differs in {component}.{name} by {relative:.1e}.")
    absolutes, relatives = zip(*gaps, strict=True)
    return {
        "layers": len(gaps) - 1,
        "max_abs_difference": max(absolutes),
        "max_relative_difference": max(relatives),
    }


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
