"""Inspect and check a LoRA file of any format: its keys, dtypes, shapes, alphas and configuration.

Apart from alphas, this module reads no tensor's values; `reader` does.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from ..core.errors import UserError, as_user_error
from ..core.lora_names import ADAPTER_METADATA, AUXILIARY, COMPONENTS, FILE_NAME, WEIGHTS
from .peft_config import PeftConfig, adapter_config

UNNAMED = "unnamed"
# Role of a tensor by its kind, which is a part of its key.
_ROLES = {
    "lora_A": "A",
    "lora_down": "A",
    "lora.down": "A",
    "lora_linear_layer.down": "A",
    "lora_B": "B",
    "lora_up": "B",
    "lora.up": "B",
    "lora_linear_layer.up": "B",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
}
# layer, separator, kind of tensor, optionally the adapter's name and ".weight"
_KEY = re.compile(
    rf"^(?P<layer>.+?)[._](?P<kind>{'|'.join(map(re.escape, _ROLES))})"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.weight)?$"
)
# Model by the prefix of its keys.
_MODEL_OF_PREFIX = {
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "transformer.": "transformer",
    "unet.": "unet",
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
_PEFT_PREFIX = "base_model.model."
# Prefixes of keys by format.
_PREFIXES = {
    "kohya": tuple(prefix for prefix in _MODEL_OF_PREFIX if prefix.endswith("_")),
    "diffusers": tuple(prefix for prefix in _MODEL_OF_PREFIX if prefix.endswith(".")),
    "peft": (_PEFT_PREFIX,),
}
# ComfyUI's prefix. ai-toolkit writes diffusers' layer names after it, but other files have other
# names there. So the prefix identifies no model; `reader` finds the model by the layer names.
_MODEL_OF_PREFIX["diffusion_model."] = "model"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names of dtypes
_DOWNLOAD = "download it again"
_OWN_CONFIG = "use the file with its own configuration"


@dataclass(frozen=True)
class LoraFile:
    """Contents of one file.

    The keys of `layers`, `ranks` and `alphas` are models, such as "unet"; the key of a model that
    the file's keys do not name is "model".
    """

    path: str
    format: str  # "diffusers", "kohya", "peft" or "unknown"
    # Adapter names in the keys; ("unnamed",) for keys without a name, which is usual.
    adapters: tuple[str, ...]
    layers: dict[str, int]  # number of adapted layers
    ranks: dict[str, tuple[int, ...]]  # distinct ranks of the layers
    alphas: dict[str, tuple[float, ...]]  # distinct alphas; without an entry, alpha is the rank
    dora: bool
    dtypes: tuple[str, ...]
    parameters: int  # number of values in the adapters' tensors
    other_tensors: int  # number of tensors that are not part of a LoRA
    evidence: tuple[str, ...]  # signs of a second adapter, one sentence each
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def auxiliary(self) -> bool:
        """Whether the file has a second adapter, such as Bi-LoRA's auxiliary."""
        return bool(self.evidence)


class LoraTensor(NamedTuple):
    """A tensor of an adapter, without its values, except the value of an alpha."""

    key: str
    local_key: str  # key without the prefixes of the model and of PEFT
    model: str
    name: str  # the layer's name in the file
    layer: str  # `name` without "text_model" and ".processor", with "_" for "."
    role: str  # "A", "B", "magnitude" or "alpha"
    adapter: str | None
    shape: tuple[int, ...]
    dtype: str
    alpha: float | None  # value of an alpha; None for other roles


class Header(NamedTuple):
    """The header of a file, as `read_header` returns it."""

    file: LoraFile
    tensors: list[LoraTensor]
    other_keys: list[str]  # keys of tensors that are not part of a LoRA
    config: dict[str, PeftConfig]  # PEFT's configuration by model


def file_error(path: Path, problem: str, fix: str = "give another file") -> UserError:
    """Return a `UserError` about a file with the message "PATH problem; fix."."""
    return UserError(f"{path} {problem}; {fix}.")


def layer_of_key(key: str) -> str:
    """Return the layer of a key ("conv_in.lora_A.weight" -> "conv_in"), or a key without a kind."""
    match = _KEY.match(key)
    return key if match is None else match["layer"]


def lora_files(source: Path) -> list[Path]:
    """Return the LoRA files of a path: the file itself, a folder's file, or one per PEFT subfolder.

    Raises:
        UserError: the folder has no file with a usual name, and no or several .safetensors files.
    """
    if not source.is_dir():
        return [source]
    for name in (FILE_NAME, WEIGHTS):
        if (source / name).is_file():
            return [source / name]
    # One PEFT folder per model.
    model_files = [source / component / WEIGHTS for component in COMPONENTS]
    model_files = [file for file in model_files if file.is_file()]
    if model_files:
        return model_files
    files = sorted(source.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise file_error(
            source,
            f"is a folder without {FILE_NAME} or {WEIGHTS}",
            f"name a LoRA file (.safetensors files in this folder: {names})",
        )
    return files


def inspect(file: str | Path) -> LoraFile:
    """Read a LoRA file's header and kohya's alphas, and check them.

    Raises:
        UserError: the file is missing, is a folder, is not a whole safetensors file or not a valid
            LoRA, or its configuration is missing, damaged or not for LoRA.
    """
    return read_header(Path(file)).file


def read_header(path: Path) -> Header:
    """Read and check a file's header; unlike `inspect`, return everything that `reader` needs."""
    tensors, other_keys, metadata = _read_tensors(path)
    down = [tensor for tensor in tensors if tensor.role == "A"]
    if not down:
        count = len(tensors) + len(other_keys)
        raise file_error(path, f"has no LoRA among its {count} tensors", "name a LoRA file")
    keys = [tensor.key for tensor in tensors] + other_keys
    # A format is known only if all keys have its prefixes.
    file_format = "unknown"
    for name, prefixes in _PREFIXES.items():
        if all(key.startswith(prefixes) for key in keys):
            file_format = name
    config = adapter_config(path, metadata, file_format)
    weights = [tensor for tensor in tensors if tensor.role != "alpha"]
    evidence = tuple(_evidence(keys, weights, metadata))
    # If a layer has several adapters, it is unknown which tensors belong together.
    if not evidence:
        _check_layers(path, tensors, config)

    layers: dict[str, set[str]] = defaultdict(set)
    ranks: dict[str, set[int]] = defaultdict(set)
    for tensor in down:
        # Each layer has one A.
        layers[tensor.model].add(tensor.layer)
        ranks[tensor.model].add(tensor.shape[0])
    alphas: dict[str, set[float]] = defaultdict(set)
    for tensor in tensors:
        if tensor.alpha is not None:
            alphas[tensor.model].add(tensor.alpha)
        elif tensor.role == "A" and tensor.model in config:
            # PEFT's configuration can have an alpha for each layer.
            alphas[tensor.model].add(config[tensor.model].alpha(tensor.name))
    file = LoraFile(
        path=str(path),
        format=file_format,
        adapters=tuple(dict.fromkeys(tensor.adapter or UNNAMED for tensor in weights)),
        layers={model: len(names) for model, names in layers.items()},
        ranks={model: tuple(sorted(values)) for model, values in ranks.items()},
        alphas={model: tuple(sorted(values)) for model, values in alphas.items()},
        dora=any(tensor.role == "magnitude" for tensor in weights),
        dtypes=tuple(sorted({tensor.dtype for tensor in weights})),
        parameters=sum(math.prod(tensor.shape) for tensor in weights),
        other_tensors=len(other_keys),
        evidence=evidence,
        metadata=metadata,
    )
    return Header(file, tensors, other_keys, config)


def _read_tensors(path: Path) -> tuple[list[LoraTensor], list[str], dict[str, str]]:
    """Read the adapters' tensors, the keys of other tensors, and the metadata."""
    if path.is_dir():
        raise file_error(path, "is a folder", "name one of its .safetensors files")
    if not path.is_file():
        raise UserError(f"There is no file {path}; check the path.")
    matches: dict[str, re.Match[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    other_keys: list[str] = []
    alphas: dict[str, Any] = {}
    with as_user_error(f"{path} is not a whole safetensors file", "write or download it again"):
        with safe_open(path, framework="numpy") as content:
            metadata = dict(content.metadata() or {})
            for key in content.keys():  # noqa: SIM118
                match = _KEY.match(key)
                if match is None:
                    other_keys.append(key)
                    continue
                # A slice gives the dtype and the shape without reading the values.
                view = content.get_slice(key)
                matches[key] = match
                shapes[key] = tuple(view.get_shape())
                dtypes[key] = str(view.get_dtype())
        alpha_keys = []
        for key, match in matches.items():
            # An alpha with several values is refused below, without reading it.
            if match["kind"] == "alpha" and math.prod(shapes[key]) == 1:
                alpha_keys.append(key)
        # PyTorch has more dtypes than NumPy, and is imported only if there are alphas.
        if alpha_keys:
            with safe_open(path, framework="pt") as content:
                alphas = {key: content.get_tensor(key) for key in alpha_keys}
    tensors = []
    for key, match in matches.items():
        tensors.append(_tensor(path, match, shapes[key], dtypes[key], alphas.get(key)))
    return tensors, other_keys, metadata


def _tensor(
    path: Path, match: re.Match[str], shape: tuple[int, ...], dtype: str, scalar: Any
) -> LoraTensor:
    """Build a `LoraTensor`; raise UserError if it can't be part of a LoRA.

    Args:
        path: the file, for messages.
        match: match of the tensor's key.
        shape: the tensor's shape.
        dtype: safetensors' name of the tensor's dtype.
        scalar: the tensor itself if it is an alpha with one value, else None.
    """
    key, layer, role = match.string, match["layer"], _ROLES[match["kind"]]
    prefix = next((prefix for prefix in _MODEL_OF_PREFIX if layer.startswith(prefix)), "")
    alpha = None
    if role == "alpha":
        count = math.prod(shape)
        if count != 1:
            raise file_error(path, f"has {count} values in {key}, which must be one number")
        alpha = scalar.item()
        # Compare the exact type, since bool is a subclass of int.
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise file_error(path, f"has the value {alpha} in {key}, which is not a finite number")
    else:
        if dtype not in _FLOATS:
            problem = f"has {key} as {dtype}, but the tensors of a LoRA must be floats"
            raise file_error(path, problem, f"give a file in one of {', '.join(_FLOATS)}")
        # A and B have at least two dimensions, a magnitude has at least one.
        dimensions = 1 if role == "magnitude" else 2
        if len(shape) < dimensions or 0 in shape:
            raise file_error(
                path, f"has {key} with the shape {list(shape)}, which can't be part of a LoRA"
            )
    name = layer.removeprefix(prefix).removeprefix(_PEFT_PREFIX)
    spelling = name.removeprefix("text_model.").removeprefix("text_model_")
    return LoraTensor(
        key=key,
        local_key=key.removeprefix(prefix).removeprefix(_PEFT_PREFIX),
        model=_MODEL_OF_PREFIX.get(prefix, "model"),
        name=name,
        layer=spelling.replace(".processor", "").replace(".", "_"),
        role=role,
        adapter=match["adapter"],
        shape=shape,
        dtype=dtype,
        alpha=alpha,
    )


def _check_layers(path: Path, tensors: Sequence[LoraTensor], config: dict[str, PeftConfig]) -> None:
    """Check that the tensors of each layer fit together, and that all layers or none have DoRA.

    Each layer has only one adapter.
    """
    # model -> layer -> role -> tensor
    models: dict[str, dict[str, dict[str, LoraTensor]]] = defaultdict(lambda: defaultdict(dict))
    for tensor in tensors:
        first_tensor = models[tensor.model][tensor.layer].setdefault(tensor.role, tensor)
        if first_tensor is not tensor:
            both = f"has both {first_tensor.key} and {tensor.key}"
            raise file_error(path, both, "remove one of them")
    for model, layers in models.items():
        model_config = config.get(model)
        for layer in layers.values():
            _check_layer(path, layer, model_config)
        plain_keys = [layer["A"].key for layer in layers.values() if "magnitude" not in layer]
        dora_count = len(layers) - len(plain_keys)
        if plain_keys and dora_count:
            raise file_error(
                path,
                f"has DoRA's magnitudes for {dora_count} layers and none for {len(plain_keys)},"
                f" such as {plain_keys[:1]}, which no library can load",
                "train all layers with DoRA, or none",
            )
        if model_config is not None and model_config.use_dora != bool(dora_count):
            problem = "has no DoRA magnitudes, but its configuration says DoRA"
            if dora_count:
                problem = "has DoRA magnitudes, but its configuration says no DoRA"
            raise file_error(path, problem, _OWN_CONFIG)


def _check_layer(path: Path, layer: dict[str, LoraTensor], config: PeftConfig | None) -> None:
    """Check that a layer's tensors, given by role, fit together."""
    missing = sorted({"A", "B"} - layer.keys())
    if missing:
        some_tensor = next(iter(layer.values()))
        problem = f"has {some_tensor.key} without the factor {' and '.join(missing)} of its layer"
        raise file_error(path, problem, _DOWNLOAD)
    A, B = layer["A"], layer["B"]
    rank = A.shape[0]
    # B is (m, r), or (m, r, 1, 1) for a convolution.
    kernel_ones = (1,) * len(B.shape[2:])
    if len(A.shape) != len(B.shape) or B.shape[1:] != (rank, *kernel_ones):
        problem = (
            f"has {A.key} with the shape {list(A.shape)} and {B.key} with {list(B.shape)}, which"
            " do not fit together"
        )
        raise file_error(path, problem, _DOWNLOAD)
    if config is not None and config.rank(A.name) != rank:
        problem = (
            f"has {A.key} with rank {rank}, but its configuration says rank {config.rank(A.name)}"
        )
        raise file_error(path, problem, _OWN_CONFIG)
    if "magnitude" in layer:
        # One number for each of the m outputs: (m,), optionally with further dimensions of size 1.
        magnitude = layer["magnitude"]
        width = B.shape[0]
        is_row = len(magnitude.shape) == 2 and magnitude.shape[1] == width > 1
        if math.prod(magnitude.shape) != width or is_row:
            raise file_error(
                path,
                f"has DoRA's scale {magnitude.key} along the inputs, which diffusers and PEFT do"
                " not support",
                "train it with scales along the outputs",
            )


def _evidence(
    keys: list[str], weights: list[LoraTensor], metadata: dict[str, str]
) -> Iterator[str]:
    """Yield signs of a second adapter: an auxiliary's name, several names, or two A of a layer."""
    auxiliary_keys = [key for key in keys if AUXILIARY in key.lower()]
    if auxiliary_keys:
        yield f"{len(auxiliary_keys)} keys name an auxiliary, such as {auxiliary_keys[0]}."
    adapters = dict.fromkeys(tensor.adapter or UNNAMED for tensor in weights)
    if len(adapters) > 1:
        yield f"The keys name several adapters: {', '.join(adapters)}."
    pairs = Counter((tensor.model, tensor.layer) for tensor in weights if tensor.role == "A")
    doubled = [".".join(layer) for layer, count in pairs.items() if count > 1]
    if doubled:
        yield f"{len(doubled)} layers have more than one adapter, such as {doubled[0]}."
    for key, value in metadata.items():
        text = value
        # In this entry, only the models' names count, since its values contain names of layers.
        if key == ADAPTER_METADATA:
            models = {name.rpartition(".")[0] for name in re.findall(r'"([^"]+)":', value)}
            text = " ".join(models)
        if "adapter" in key.lower() and AUXILIARY in text.lower():
            yield f"The metadata entry {key} names an auxiliary."
