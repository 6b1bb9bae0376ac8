"""Comparison of a file with what it should hold, layer by layer: the one check of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import TrainingError
from ..core.lora_names import FILE_NAME, kohya_file_name
from .layers import Layer, trained_layers
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
    expected = {component: trained_layers(model) for component, model in models.items()}
    differences = _compare_primary(Path(folder) / FILE_NAME, expected)
    report: dict[str, float] = {"auxiliary_keys": 0, **differences}
    kohya_file = Path(folder) / kohya_file_name(folder)
    if kohya_file.exists():
        differences = _compare_primary(kohya_file, expected)
        for name in ("max_abs_difference", "max_relative_difference"):
            report[f"kohya_{name}"] = differences[name]
    return report


def _compare_primary(path: Path, expected: Mapping[str, Sequence[Layer]]) -> dict[str, float]:
    """`compare`, where nothing else is in the file."""
    file = inspect(path)
    if file.auxiliary or file.other_tensors:
        raise TrainingError(f"{path} must hold the primary alone. {' '.join(file.evidence)}")
    return compare(path, expected)


def require_equal(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a file whose tensors are other ones, have other values, or are not finite."""
    differing_keys = sorted(stored.keys() ^ expected.keys())
    if differing_keys:
        raise TrainingError(
            f"{path} does not hold what was trained alone: look at {differing_keys[0]}."
        )
    for key, value in expected.items():
        if not value.isfinite().all():
            raise TrainingError(f"{key} is not finite, so nothing is exported: take a checkpoint.")
        if not stored[key].equal(value.detach().cpu()):
            raise TrainingError(f"{key} of {path} differs from the model: export it again.")


def compare(path: Path, expected: Mapping[str, Sequence[Layer]]) -> dict[str, float]:
    """Read a file and compare B @ A and DoRA's magnitude of every layer, in fp64; see `verify`."""
    parts = read(path).parts
    differing_models = sorted(expected.keys() ^ parts.keys())
    if differing_models:
        holds = ", ".join(parts)
        raise TrainingError(f"{path} holds {holds} and not {differing_models[0]} as it was to.")
    count, largest_absolute, largest_relative = 0, 0.0, 0.0
    for component, layers in expected.items():
        expected_layers = {layer.name: layer for layer in layers}
        stored_layers = {layer.name: layer for layer in parts[component].layers}
        differing_names = sorted(expected_layers.keys() ^ stored_layers.keys())
        if differing_names:
            raise TrainingError(
                f"{path} and its source do not agree on {component}.{differing_names[0]}."
            )
        for name, layer in expected_layers.items():
            absolute, relative = difference(layer, stored_layers[name])
            # NaN does not pass this comparison.
            if not relative <= TOLERANCE:
                raise TrainingError(f"{path} differs in {component}.{name} by {relative:.1e}.")
            count += 1
            largest_absolute = max(largest_absolute, absolute)
            largest_relative = max(largest_relative, relative)
    return {
        "layers": count,
        "max_abs_difference": largest_absolute,
        "max_relative_difference": largest_relative,
    }


def difference(left: Layer, right: Layer) -> tuple[float, float]:
    """The largest difference of two layers' weights, and the relative one of the layer.

    That of the product is relative to the norms of its rank-one terms: where these nearly cancel,
    as those of an init that was hardly trained, each is rounded on its own.
    """
    A, B = _matrix(left.A), _matrix(left.B)  # (r, n), (m, r)
    C, D = _matrix(right.A), _matrix(right.B)
    same_shape = A.shape[1] == C.shape[1] and len(B) == len(D)
    if not same_shape or (left.magnitude is None) != (right.magnitude is None):
        return float("inf"), float("inf")
    absolute, relative = 0.0, 0.0
    # Most files hold the same factors, and are spared the products.
    if not (torch.equal(A, C) and torch.equal(B, D)):
        terms = B.norm(dim=0) * A.norm(dim=1)
        absolute, relative = _distance(B @ A, D @ C, float(terms.sum()))
    if left.magnitude is not None and right.magnitude is not None:
        magnitude, other_magnitude = _matrix(left.magnitude), _matrix(right.magnitude)
        distances = _distance(
            magnitude.flatten(), other_magnitude.flatten(), float(magnitude.norm())
        )
        absolute, relative = max(absolute, distances[0]), max(relative, distances[1])
    return absolute, relative


def _matrix(tensor: Tensor) -> Tensor:
    """A factor as a matrix, in fp64 on the CPU."""
    tensor = tensor.to("cpu", torch.float64)
    return tensor.flatten(1) if tensor.dim() > 1 else tensor


def _distance(left: Tensor, right: Tensor, scale: float) -> tuple[float, float]:
    """The largest difference of two tensors, and the norm of all in shares of `scale`."""
    delta = left - right
    relative = float(delta.norm()) / max(scale, torch.finfo(torch.float64).tiny)
    return float(delta.abs().max()), relative
