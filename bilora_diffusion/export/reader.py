"""Read a LoRA file of any format as layers, and compare it with expected layers.

The scale (alpha / rank, or alpha / sqrt(rank) for rsLoRA) is multiplied into B. B keeps the file's
dtype if the product is exact in it, as for a power of two; otherwise B is fp32. 8-bit floats are
first converted to fp16. `compare` checks every LoRA file that is written for an image model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.errors import TrainingError
from ..core.lora_names import COMPONENTS, ENCODERS
from .formats import Layer, Part, dotted_names, module_names, plain_name
from .lorafile import Header, LoraFile, LoraTensor, file_error, inspect, read_header

# Metadata entry that names the model of a PEFT file, since the file's keys do not.
COMPONENT = "bilora.component"
_LARGEST = torch.finfo(torch.float32).max
# Beginnings of layer names that only one kind of denoiser has.
_BLOCKS = {
    "unet": re.compile(r"(?:down_blocks|mid_block|up_blocks|time_embedding)\.|conv_in|conv_out"),
    "transformer": re.compile(
        r"(?:single_)?transformer_blocks\.|(?:context|noise)_refiner\.|layers\.\d+\.att\w+\.to_"
    ),
}


@dataclass(frozen=True)
class Contents:
    """Contents of a LoRA file."""

    # Layers by model: one of `COMPONENTS`, or "model" if the file does not name the model.
    parts: dict[str, Part]
    metadata: dict[str, str]
    base_model: str  # hub id or folder of the adapter's base model; "" if unknown
    # Distinct scales of each model's layers; they are already multiplied into B.
    scales: Mapping[str, frozenset[float]] = field(default_factory=dict)


def read(path: Path) -> Contents:
    """Read all layers of a LoRA file.

    Raises:
        UserError: `inspect` refuses the file; it has several adapters, tensors that are not part
            of a LoRA, or layers with unknown or equal names; or a value is not finite in fp32.
    """
    header = read_header(path)
    file = header.file
    if file.auxiliary:
        raise file_error(path, f"holds more than one adapter ({file.evidence[:1]})")
    if header.other_keys:
        raise file_error(
            path,
            f"holds {len(header.other_keys)} tensors that are not part of a LoRA, such as"
            f" {header.other_keys[:1]}",
            "give a plain LoRA",
        )
    base_model = None
    if file.format == "peft" and "model" in header.config:
        base_model = header.config["model"].base_model_name_or_path
    # kohya's entry, which this package also writes into files for diffusers.
    base_model = base_model or file.metadata.get("ss_sd_model_name", "")
    parts, scales = _read_parts(path, header)
    return Contents(parts, file.metadata, base_model, scales)


def _read_parts(path: Path, header: Header) -> tuple[dict[str, Part], dict[str, frozenset[float]]]:
    """Read the layers of each model in a file, and their distinct scales."""
    # model -> name of a layer in the file -> role -> tensor
    models: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    with safe_open(path, framework="pt") as content:
        for entry in header.tensors:
            value = content.get_tensor(entry.key)
            if value.dtype.itemsize == 1:
                value = value.half()  # exact for all 8-bit floats, which lack arithmetic
            models[entry.model][entry.name][entry.role] = value

    parts: dict[str, dict[str, Layer]] = defaultdict(dict)
    scales: dict[str, set[float]] = defaultdict(set)
    sources: dict[str, str] = {}  # full name of a layer -> its name in the file
    for model, layers in models.items():
        component = _component(path, model, layers, header.file)
        entries = [entry for entry in header.tensors if entry.model == model]
        names = _layer_names(component, entries)
        # diffusers' metadata has entries for each model; PEFT's configuration is for one model.
        config = header.config.get(component) or header.config.get("model")
        for source, tensors in layers.items():
            name = names[source]
            full_name = f"{component}.{name}"
            if full_name in sources:
                both = f"has {full_name} as {sources[full_name]} and as {source}"
                raise file_error(path, both, "remove one of them")
            sources[full_name] = source
            rank = len(tensors["A"])
            # An alpha in the file takes precedence over the configuration; if there is neither,
            # alpha is the rank.
            if "alpha" in tensors:
                scale = float(tensors["alpha"]) / rank
            elif config is not None:
                scale = config.scale(source, rank)
            else:
                scale = 1.0
            parts[component][name] = _layer(path, name, tensors, scale)
            scales[component].add(scale)
    return (
        {component: Part(list(layers.values())) for component, layers in parts.items()},
        {component: frozenset(values) for component, values in scales.items()},
    )


def _component(path: Path, model: str, names: Iterable[str], file: LoraFile) -> str:
    """Determine an adapter's model by keys, metadata or folder; "model" if they do not show it."""
    if model != "model":
        return model
    component = file.metadata.get(COMPONENT)
    if component in COMPONENTS:
        return str(component)
    names = list(names)
    for component, blocks in _BLOCKS.items():
        if any(map(blocks.match, names)):
            return component
    if path.parent.name in COMPONENTS:
        return path.parent.name
    if file.format == "unknown":
        problem = f"has keys in no known format, such as {names[0]}"
        raise file_error(path, problem, "give a file in the format of diffusers, kohya or PEFT")
    return model


def _layer_names(component: str, entries: Iterable[LoraTensor]) -> dict[str, str]:
    """Return each layer's current name by its name in the file."""
    down = [entry for entry in entries if entry.role == "A"]
    if any(entry.key.startswith("lora_") for entry in down):
        names = module_names(component, [entry.name for entry in down])
    else:
        name_of_key = {entry.local_key: entry.name for entry in down}
        dotted = dotted_names(name_of_key, component in ENCODERS)
        names = {name_of_key[key]: name for key, name in dotted.items()}
    if component in ENCODERS:
        names = {source: plain_name(name) for source, name in names.items()}
    return names


def _layer(path: Path, name: str, tensors: Mapping[str, Tensor], scale: float) -> Layer:
    """Build a layer with the scale in B; raise UserError if fp32 can't hold its values or B @ A."""
    A, B, magnitude = tensors["A"], tensors["B"], tensors.get("magnitude")
    scaled = B.double() * scale
    B = scaled.to(B.dtype)
    if not torch.equal(B.double(), scaled):  # not exact in the file's dtype
        B = scaled.float()
    if magnitude is not None:
        # (m,) for a linear layer, (1, m, 1, 1) for a convolution
        kernel_ones = [1] * (A.dim() - 2)
        magnitude = magnitude.flatten()
        if kernel_ones:
            magnitude = magnitude.reshape(1, -1, *kernel_ones)
    layer = Layer(name, A, B, magnitude)
    for tensor in layer.tensors:
        # The comparison is False for NaN.
        if not bool(tensor.double().abs().max() <= _LARGEST):
            raise file_error(path, f"holds values for {name} that are not finite in fp32")
    # Upper bound of |B @ A|: the sum of the rank-one terms' largest absolute values.
    terms = B.double().flatten(1).abs().amax(0) * A.double().flatten(1).abs().amax(1)
    if not bool(terms.sum() <= _LARGEST):
        raise file_error(path, f"changes {name} by more than fp32 can represent")
    return layer


TOLERANCE = 1e-6  # maximum relative difference of a layer; rounding s * B to fp32 causes 6e-8


def require_equal(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise TrainingError if a file's tensors differ from the expected ones or are not finite."""
    differing_keys = sorted(stored.keys() ^ expected.keys())
    if differing_keys:
        raise TrainingError(
            f"{path} does not have exactly the trained tensors: check {differing_keys[0]}."
        )
    for key, value in expected.items():
        if not value.isfinite().all():
            raise TrainingError(
                f"{key} is not finite, so nothing is exported: export an earlier checkpoint."
            )
        if not stored[key].equal(value.detach().cpu()):
            raise TrainingError(f"{key} of {path} differs from the model: export it again.")


def compare(path: Path, expected: Mapping[str, Sequence[Layer]]) -> dict[str, float]:
    """Check that a file has exactly these layers.

    The product B @ A and DoRA's magnitude of every layer are compared in fp64.

    Args:
        path: the LoRA file.
        expected: layers by model, with the scale in B.

    Returns:
        "layers" (their number), "max_abs_difference" and "max_relative_difference".

    Raises:
        TrainingError: the file has an auxiliary or tensors that are not part of a LoRA, lacks a
            model or a layer, has others, or has a layer that differs by more than `TOLERANCE`.
        UserError: the file can't be read.
    """
    file = inspect(path)
    if file.auxiliary or file.other_tensors:
        raise TrainingError(f"{path} must have only the primary. {' '.join(file.evidence)}")
    parts = read(path).parts
    differing_models = sorted(expected.keys() ^ parts.keys())
    if differing_models:
        raise TrainingError(f"{path} and its source do not agree on {differing_models[0]}.")
    count = 0
    largest_absolute = 0.0
    largest_relative = 0.0
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
            # The comparison is False for NaN.
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
    """Return the largest absolute and relative differences of two layers' B @ A and magnitudes.

    Both are infinite if the shapes differ or only one layer has a magnitude. The difference of
    B @ A is relative to the summed norms of its rank-one terms, since each term is rounded
    separately. After an initialization such as PiSSA and few steps, these terms nearly cancel in
    B @ A.
    """
    left_A, left_B = _matrix(left.A), _matrix(left.B)  # (r, n), (m, r)
    right_A, right_B = _matrix(right.A), _matrix(right.B)
    same_shape = left_A.shape[1] == right_A.shape[1] and len(left_B) == len(right_B)
    if not same_shape or (left.magnitude is None) != (right.magnitude is None):
        return float("inf"), float("inf")
    absolute, relative = 0.0, 0.0
    # The factors of most files are equal, so their products need not be computed.
    if not (torch.equal(left_A, right_A) and torch.equal(left_B, right_B)):
        terms = left_B.norm(dim=0) * left_A.norm(dim=1)  # (r,)
        absolute, relative = _distance(left_B @ left_A, right_B @ right_A, float(terms.sum()))
    if left.magnitude is not None and right.magnitude is not None:
        magnitude = _matrix(left.magnitude).flatten()  # (m,)
        other_magnitude = _matrix(right.magnitude).flatten()
        distances = _distance(magnitude, other_magnitude, float(magnitude.norm()))
        absolute = max(absolute, distances[0])
        relative = max(relative, distances[1])
    return absolute, relative


def _matrix(tensor: Tensor) -> Tensor:
    """Convert a factor to a matrix in fp64 on the CPU; a vector stays a vector."""
    tensor = tensor.to("cpu", torch.float64)
    if tensor.dim() > 1:
        return tensor.flatten(1)
    return tensor


def _distance(left: Tensor, right: Tensor, scale: float) -> tuple[float, float]:
    """Return the largest absolute difference of two tensors, and the difference's norm / scale."""
    delta = left - right
    relative = float(delta.norm()) / max(scale, torch.finfo(torch.float64).tiny)
    return float(delta.abs().max()), relative
