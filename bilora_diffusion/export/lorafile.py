"""Contents of a LoRA file of any origin, read from its keys, shapes and metadata, and checked.

The weights stay on the disk; `reader` reads them.
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

from ..core.errors import UserError, translated
from ..core.lora_names import (
    ADAPTER_METADATA,
    AUXILIARY,
    COMPONENTS,
    FILE_NAME,
    WEIGHTS,
)
from .peft_config import PeftConfig, adapter_config

UNNAMED = "unnamed"
_ROLES = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "A"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "B"),
    **dict.fromkeys(("lora_magnitude_vector", "dora_scale"), "magnitude"),
    "alpha": "alpha",
}
_KEY = re.compile(
    rf"^(?P<layer>.+?)[._](?P<kind>{'|'.join(map(re.escape, _ROLES))})"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.weight)?$"
)
MODELS = {  # prefix in the file -> model
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "transformer.": "transformer",
    "unet.": "unet",
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
_FORMATS = {
    "kohya": tuple(prefix for prefix in MODELS if prefix.endswith("_")),
    "diffusers": tuple(prefix for prefix in MODELS if prefix.endswith(".")),
    "peft": ("base_model.model.",),
}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_AGAIN = "download it again"


@dataclass(frozen=True)
class LoraFile:
    """Contents of one file. Dictionaries are by model: "unet", "text_encoder", ... or "model".

    Attributes:
        format: "diffusers", "kohya", "peft" or "unknown".
        adapters: names found in the keys; ("unnamed",) for a usual file, whose keys have none.
        layers: how many layers are adapted.
        ranks: the different ranks.
        alphas: the different alphas; empty where the file says nothing, which means the rank.
        parameters: how many numbers the adapters have.
        evidence: why a second adapter is thought to be inside, one sentence each.
    """

    path: str
    format: str
    adapters: tuple[str, ...]
    layers: dict[str, int]
    ranks: dict[str, tuple[int, ...]]
    alphas: dict[str, tuple[float, ...]]
    dora: bool
    dtypes: tuple[str, ...]
    parameters: int
    other_tensors: int
    evidence: tuple[str, ...]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def auxiliary(self) -> bool:
        """True if a second adapter, such as Bi-LoRA's auxiliary, is in the file."""
        return bool(self.evidence)


class Entry(NamedTuple):
    """A tensor of an adapter."""

    key: str
    model: str
    name: str  # of the layer in the file, by which PEFT's patterns know it
    layer: str  # spelt alike for all formats
    role: str  # "A", "B", "magnitude" or "alpha"
    adapter: str | None
    shape: tuple[int, ...]
    dtype: str
    alpha: float | None


class Look(NamedTuple):
    """A file's header: its contents in short, each tensor, other keys, and PEFT's configuration."""

    file: LoraFile
    entries: list[Entry]
    others: list[str]
    config: dict[str, PeftConfig]


def require(holds: bool, path: Path, what: str, fix: str = "give another file") -> None:
    """Refuse a file, "PATH what; fix.", unless something holds of it."""
    if not holds:
        raise UserError(f"{path} {what}; {fix}.")


def lora_files(source: Path) -> list[Path]:
    """The files that a path stands for: itself, a run's, or those of PEFT's folders in it.

    Raises:
        UserError: a folder without any, or one with whole models.
    """
    if not source.is_dir():
        return [source]
    for name in (FILE_NAME, WEIGHTS):
        if (source / name).is_file():
            return [source / name]
    if several := [f for c in COMPONENTS if (f := source / c / WEIGHTS).is_file()]:
        return several
    inside = sorted(source.glob("*.safetensors"))
    names = ", ".join(path.name for path in inside) or "it has none"
    what = f"is a folder without {FILE_NAME} or {WEIGHTS}"
    require(len(inside) == 1, source, what, f"name one of its .safetensors files ({names})")
    return inside


def inspect(file: str | Path) -> LoraFile:
    """Read a LoRA file's header and kohya's alphas, and check them.

    Raises:
        UserError: the file is missing, a folder, not safetensors, cut short, holds no LoRA or one
            that can't be right, or its configuration is damaged.
    """
    return look(Path(file)).file


def look(path: Path) -> Look:
    """`inspect` with what a reader needs."""
    entries, others, metadata = _read(path)
    down = [entry for entry in entries if entry.role == "A"]
    tensors = len(entries) + len(others)
    require(bool(down), path, f"holds no LoRA among its {tensors} tensors", "name a LoRA file")
    keys = [entry.key for entry in entries] + others
    fits = (name for name, start in _FORMATS.items() if all(key.startswith(start) for key in keys))
    format = next(fits, "unknown")
    config = adapter_config(path, metadata, format)
    alphas: dict[str, set[float]] = defaultdict(set)
    for entry in entries:
        if entry.alpha is not None:
            alphas[entry.model].add(entry.alpha)
        elif entry.role == "A" and entry.model in config:
            alphas[entry.model].add(config[entry.model].alpha(entry.name))
    weights = [entry for entry in entries if entry.role != "alpha"]
    evidence = tuple(_evidence(keys, weights, metadata))
    if not evidence:
        _check_layers(path, entries, config)
    models = dict.fromkeys(entry.model for entry in down)
    file = LoraFile(
        path=str(path),
        format=format,
        adapters=tuple(dict.fromkeys(entry.adapter or UNNAMED for entry in weights)),
        layers={model: len({e.layer for e in down if e.model == model}) for model in models},
        ranks={m: tuple(sorted({e.shape[0] for e in down if e.model == m})) for m in models},
        alphas={model: tuple(sorted(values)) for model, values in alphas.items()},
        dora=any(entry.role == "magnitude" for entry in weights),
        dtypes=tuple(sorted({entry.dtype for entry in weights})),
        parameters=sum(math.prod(entry.shape) for entry in weights),
        other_tensors=len(others),
        evidence=evidence,
        metadata=metadata,
    )
    return Look(file, entries, others, config)


def _read(path: Path) -> tuple[list[Entry], list[str], dict[str, str]]:
    """The tensors of LoRA's, the keys of others, and the metadata."""
    require(not path.is_dir(), path, "is a folder", "name one of its .safetensors files")
    if not path.is_file():
        raise UserError(f"There is no file {path}; check the path.")
    found, others, alphas = [], [], {}
    with translated(f"{path} is not a whole safetensors file", "write or download it again"):
        with safe_open(path, framework="numpy") as content:
            metadata = dict(content.metadata() or {})
            for key in content.keys():  # noqa: SIM118
                if (match := _KEY.match(key)) is None:
                    others.append(key)
                    continue
                part = content.get_slice(key)
                found.append((key, match, tuple(part.get_shape()), str(part.get_dtype())))
        scalars = [k for k, match, shape, _ in found if match["kind"] == "alpha" and not shape[1:]]
        if scalars:  # torch, which knows more types of numbers, is imported for these alone
            with safe_open(path, framework="pt") as content:
                alphas = {key: content.get_tensor(key) for key in scalars}
    entries = [_entry(path, k, m, shape, dtype, alphas.get(k)) for k, m, shape, dtype in found]
    return entries, others, metadata


def _entry(
    path: Path, key: str, match: re.Match[str], shape: tuple[int, ...], dtype: str, scalar: Any
) -> Entry:
    """One tensor, where it can be a part of a LoRA."""
    role, layer = _ROLES[match["kind"]], match["layer"]
    prefix = next((prefix for prefix in MODELS if layer.startswith(prefix)), "")
    name = layer.removeprefix(prefix).removeprefix("base_model.model.")
    plain = name.removeprefix("text_model.").removeprefix("text_model_")
    alpha = None
    if role == "alpha":
        count = math.prod(shape)
        require(count == 1, path, f"has {count} values as {key}, which is one number")
        alpha = scalar.item()
        finite = type(alpha) in (int, float) and math.isfinite(alpha)
        require(finite, path, f"has {alpha} as {key}, which is no finite number")
    else:
        floats = f"has {key} as {dtype}, and LoRA is made of floats"
        require(dtype in _FLOATS, path, floats, f"give a file in one of {', '.join(_FLOATS)}")
        whole = len(shape) >= (1 if role == "magnitude" else 2) and 0 not in shape
        require(whole, path, f"has {key} of the shape {list(shape)}, which is no part of a LoRA")
    spelt = plain.replace(".processor", "").replace(".", "_")
    model = MODELS.get(prefix, "model")
    return Entry(key, model, name, spelt, role, match["adapter"], shape, dtype, alpha)


def _check_layers(path: Path, entries: Sequence[Entry], config: dict[str, PeftConfig]) -> None:
    """Refuse layers whose tensors do not belong together, where each has one adapter."""
    models: dict[str, dict[str, dict[str, Entry]]] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        other = models[entry.model][entry.layer].setdefault(entry.role, entry)
        both = f"has both {other.key} and {entry.key}"
        require(other is entry, path, both, "leave one of them out")
    for model, layers in models.items():
        described = config.get(model)
        for layer in layers.values():
            _check_layer(path, layer, described)
        plain = [layer["A"].key for layer in layers.values() if "magnitude" not in layer]
        with_dora = len(layers) - len(plain)
        require(
            not plain or not with_dora,
            path,
            f"has DoRA's magnitudes for {with_dora} layers and none for {len(plain)}, such as"
            f" {plain[:1]}, which no library can load",
            "train all layers alike",
        )
        require(
            described is None or described.use_dora == bool(with_dora),
            path,
            f"has {'' if with_dora else 'no '}magnitudes of DoRA, and its configuration says"
            f" {'no ' if with_dora else ''}DoRA",
            "put its own configuration there",
        )


def _check_layer(path: Path, layer: dict[str, Entry], config: PeftConfig | None) -> None:
    first, missing = next(iter(layer.values())), "".join(sorted({"A", "B"} - layer.keys()))
    lonely = f"has {first.key} without the factor {missing} of its layer"
    require(not missing, path, lonely, _AGAIN)
    A, B, magnitude = layer["A"], layer["B"], layer.get("magnitude")
    rank, width = A.shape[0], B.shape[0]
    fit = len(A.shape) == len(B.shape) and B.shape[1:] == (rank, *(1 for _ in B.shape[2:]))
    shapes = f"has {A.key} of the shape {list(A.shape)} and {B.key} of {list(B.shape)}"
    require(fit, path, f"{shapes}, which do not fit", _AGAIN)
    known = rank if config is None else config.rank(A.name)
    odd = f"has {A.key} of rank {rank}, for which its configuration says {known}"
    require(known == rank, path, odd, "put its own configuration there")
    if magnitude is not None:
        across = len(magnitude.shape) == 2 and magnitude.shape[1] == width > 1
        require(
            math.prod(magnitude.shape) == width and not across,
            path,
            f"has DoRA's scale {magnitude.key} along the inputs, which diffusers and PEFT can't do",
            "train it with scales along the outputs",
        )


def _evidence(keys: list[str], weights: list[Entry], metadata: dict[str, str]) -> Iterator[str]:
    """Every sign of a second adapter: its name, or a second pair for a layer."""
    if named := [key for key in keys if AUXILIARY in key.lower()]:
        yield f"{len(named)} keys name an auxiliary, the first is {named[0]}."
    if len(adapters := dict.fromkeys(entry.adapter or UNNAMED for entry in weights)) > 1:
        yield f"The keys name several adapters: {', '.join(adapters)}."
    pairs = Counter((entry.model, entry.layer) for entry in weights if entry.role == "A")
    if doubled := [".".join(layer) for layer, count in pairs.items() if count > 1]:
        yield f"{len(doubled)} layers have more than one adapter, the first is {doubled[0]}."
    for key, value in metadata.items():
        models = {name.rpartition(".")[0] for name in re.findall(r'"([^"]+)":', value)}
        said = " ".join(models) if key == ADAPTER_METADATA else value
        if "adapter" in key.lower() and AUXILIARY in said.lower():
            yield f"The metadata entry {key} names an auxiliary."
