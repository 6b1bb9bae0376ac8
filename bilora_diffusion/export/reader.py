"""A LoRA file of any format as layers, and its comparison with what it should hold.

Conversions start from what is read here and are checked by it. The scale alpha / rank is multiplied
into B. Tensors keep the precision of the file where that is exact, as it is for a power of two, and
are fp32 otherwise. The comparison, layer by layer, is the one check of files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.errors import TrainingError
from ..core.lora_names import COMPONENTS, ENCODERS, FILE_NAME, kohya_file_name
from .formats import Layer, Part, dotted_names, module_names, plain_name, trained_layers
from .lorafile import Header, LoraFile, LoraTensor, inspect, read_header, refused

COMPONENT = "bilora.component"
"""Metadata entry: which model PEFT's file, whose keys do not say it, is for."""


_LARGEST = torch.finfo(torch.float32).max


_BLOCKS = {
    "unet": re.compile(r"(?:down_blocks|mid_block|up_blocks|time_embedding)\.|conv_in|conv_out"),
    "transformer": re.compile(
        r"(?:single_)?transformer_blocks\.|(?:context|noise)_refiner\.|layers\.\d+\.att\w+\.to_"
    ),
}
"""Beginnings of names that only one kind of denoiser has."""


@dataclass(frozen=True)
class Contents:
    """Contents of a LoRA file.

    Attributes:
        parts: by model: one of `COMPONENTS`, another name in the file, or "model" where the file
            does not say which.
        metadata: of the file.
        base_model: what the adapter belongs on, "" where it is not known.
    """

    parts: dict[str, Part]
    metadata: dict[str, str]
    base_model: str


def read(path: Path) -> Contents:
    """All layers of a LoRA file.

    Raises:
        UserError: it is no LoRA file, is damaged, has more than one adapter for a layer, or holds
            something that is not LoRA's.
    """
    header = read_header(path)
    file = header.file
    if file.auxiliary:
        raise refused(path, f"holds more than one adapter ({file.evidence[:1]})")
    if header.other_keys:
        raise refused(
            path,
            f"holds {len(header.other_keys)} tensors that LoRA files of the other formats have no"
            f" place for, the first is {header.other_keys[:1]}",
            "give a plain LoRA",
        )
    base_model = None
    if file.format == "peft" and "model" in header.config:
        base_model = header.config["model"].base_model_name_or_path
    base_model = base_model or file.metadata.get("ss_sd_model_name", "")
    return Contents(_read_parts(path, header), file.metadata, base_model)


def _read_parts(path: Path, header: Header) -> dict[str, Part]:
    # model -> name of a layer in the file -> role -> tensor
    models: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    with safe_open(path, framework="pt") as content:
        for entry in header.tensors:
            value = content.get_tensor(entry.key)
            if value.dtype.itemsize == 1:
                value = value.half()  # which holds what 8 bits do, and can be computed with
            models[entry.model][entry.name][entry.role] = value

    parts: dict[str, dict[str, Layer]] = defaultdict(dict)
    sources: dict[str, str] = {}  # name of a layer in full -> in the file
    for model, layers in models.items():
        component = _component(path, model, layers, header.file)
        names = _layer_names(component, [x for x in header.tensors if x.model == model])
        # diffusers' metadata name the model, and PEFT's file has one for its only model.
        config = header.config.get(component) or header.config.get("model")
        for source, tensors in layers.items():
            name = names[source]
            full_name = f"{component}.{name}"
            if full_name in sources:
                both = f"has {full_name} as {sources[full_name]} and as {source}"
                raise refused(path, both, "leave one out")
            sources[full_name] = source
            rank = len(tensors["A"])
            # The tensors' own alpha wins over a configuration; without both, alpha is the rank.
            if "alpha" in tensors:
                scale = float(tensors["alpha"]) / rank
            elif config is not None:
                scale = config.scale(source, rank)
            else:
                scale = 1.0
            parts[component][name] = _layer(path, name, tensors, scale)
    return {component: Part(list(layers.values())) for component, layers in parts.items()}


def _component(path: Path, model: str, names: Iterable[str], file: LoraFile) -> str:
    """The model that an adapter is for, where its keys do not name it."""
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
        problem = f"has keys of no known format, such as {names[0]}"
        raise refused(path, problem, "give a file in diffusers', kohya's or PEFT's")
    return model


def _layer_names(component: str, entries: Iterable[LoraTensor]) -> dict[str, str]:
    """Today's name of each layer by that in the file."""
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
    """The layer with the scale in B, where fp32 can hold it."""
    A, B, magnitude = tensors["A"], tensors["B"], tensors.get("magnitude")
    scaled = B.double() * scale  # rounded once below, if at all
    rounded = scaled.to(B.dtype)
    B = rounded if torch.equal(rounded.double(), scaled) else scaled.float()
    if magnitude is not None:
        # (m,) for a linear layer, (1, m, 1, 1) for a convolution
        kernel_ones = [1] * (A.dim() - 2)
        magnitude = magnitude.flatten()
        if kernel_ones:
            magnitude = magnitude.reshape(1, -1, *kernel_ones)
    layer = Layer(name, A, B, magnitude)
    for tensor in layer.tensors:
        # NaN does not pass this comparison.
        if not bool(tensor.double().abs().max() <= _LARGEST):
            raise refused(path, f"holds values for {name} that are not finite in fp32")
    # A bound of what B @ A sums up to: the largest value of each rank-one term.
    terms = B.double().flatten(1).abs().amax(0) * A.double().flatten(1).abs().amax(1)
    if not bool(terms.sum() <= _LARGEST):
        raise refused(path, f"changes {name} by more than fp32 can hold")
    return layer


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
