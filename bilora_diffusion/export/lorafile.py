"""What is inside a LoRA file of any origin, read from its keys, shapes and metadata."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..lora_names import ADAPTER_METADATA, AUXILIARY, COMPONENTS, FILE_NAME, WEIGHTS
from .entries import DOWN, MAGNITUDE, Entry, check_layers, check_tensors
from .peft_config import PeftConfig, adapter_config

UNNAMED = "unnamed"
KEY = re.compile(
    r"^(?P<layer>.+?)[._]"
    r"(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_down|lora_up"
    r"|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up"
    r"|lora_magnitude_vector|dora_scale|alpha)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?:weight|bias))?$"
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


@dataclass(frozen=True)
class LoraFile:
    """What one file holds. Dictionaries are keyed by model: "unet", "text_encoder", ... or "model".

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
        """Whether a second adapter, such as Bi-LoRA's auxiliary, hides in the file."""
        return bool(self.evidence)


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
    inside = sorted(path.name for path in source.glob("*.safetensors"))
    if len(inside) == 1:
        return [source / inside[0]]
    raise UserError(
        f"{source} is a folder without {FILE_NAME} or {WEIGHTS}; name one of its .safetensors files"
        f" ({', '.join(inside) or 'it has none'})."
    )


def inspect(file: str | Path) -> LoraFile:
    """Read a LoRA file's header and kohya's alphas, and check them; the weights stay on the disk.

    Raises:
        UserError: the file is missing, a folder, not safetensors, cut short, holds no LoRA or one
            that can't be right (`check_tensors`, `check_layers`), or its configuration is damaged.
    """
    path = Path(file)
    keys, entries, metadata = _read(path)
    down = [entry for entry in entries if entry.kind in DOWN]
    if not down:
        raise UserError(f"{path} holds no LoRA among its {len(keys)} tensors; name a LoRA file.")
    check_tensors(path, entries)
    format = _format(keys)
    config = adapter_config(path, metadata, format)
    ranks: dict[str, set[int]] = defaultdict(set)
    alphas: dict[str, set[float]] = defaultdict(set)
    for entry in down:
        ranks[entry.model].add(entry.shape[0])
        if entry.model in config:
            alphas[entry.model].add(config[entry.model].alpha(entry.name))
    for entry in entries:
        if entry.alpha is not None:
            alphas[entry.model].add(entry.alpha)
    weights = [entry for entry in entries if entry.kind != "alpha"]
    evidence = tuple(_evidence(keys, weights, metadata, config))
    if not evidence:
        check_layers(path, entries, config)
    return LoraFile(
        path=str(path),
        format=format,
        adapters=tuple(dict.fromkeys(entry.adapter or UNNAMED for entry in weights)),
        layers=dict(Counter(model for model, _ in dict.fromkeys((e.model, e.layer) for e in down))),
        ranks={model: tuple(sorted(values)) for model, values in ranks.items()},
        alphas={model: tuple(sorted(values)) for model, values in alphas.items()},
        dora=any(entry.kind in MAGNITUDE for entry in weights),
        dtypes=tuple(sorted({entry.dtype for entry in weights})),
        parameters=sum(math.prod(entry.shape) for entry in weights),
        other_tensors=len(keys) - len(entries),
        evidence=evidence,
        metadata=metadata,
    )


def _read(path: Path) -> tuple[list[str], list[Entry], dict[str, str]]:
    """All keys, the entries that are LoRA's, and the metadata."""
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.glob("*.safetensors"))) or "it has none"
        raise UserError(f"{path} is a folder; name one of its .safetensors files ({inside}).")
    if not path.is_file():
        raise UserError(f"There is no file {path}; check the path.")
    entries = []
    try:
        with safe_open(path, framework="numpy") as content:
            keys = list(content.keys())
            for key in keys:
                if match := KEY.match(key):
                    part = content.get_slice(key)
                    is_alpha = match["kind"] == "alpha" and math.prod(part.get_shape()) == 1
                    alpha = _number(path, content, key) if is_alpha else None
                    entries.append(_entry(key, match, part, alpha))
            return keys, entries, dict(content.metadata() or {})
    except UserError:
        raise
    # All but the first two: types of numbers that torch lacks.
    except (SafetensorError, OSError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); write or download it again."
        ) from error


def _number(path: Path, content: Any, key: str) -> float:
    """A tensor of one element; torch is imported only for types that numpy lacks."""
    if content.get_slice(key).get_dtype() in ("F16", "F32", "F64", "I64", "I32"):
        value = content.get_tensor(key).item()
    else:
        with safe_open(path, framework="pt") as same:
            value = same.get_tensor(key).item()
    if isinstance(value, bool | complex) or not math.isfinite(value):
        raise UserError(f"{path} has {value} as {key}, which is no finite number; write it again.")
    return float(value)


def _entry(key: str, match: re.Match[str], part: Any, alpha: float | None) -> Entry:
    layer = match["layer"]
    prefix = next((prefix for prefix in MODELS if layer.startswith(prefix)), "")
    name = layer.removeprefix(prefix).removeprefix("base_model.model.")
    plain = name.removeprefix("text_model.").removeprefix("text_model_")
    return Entry(
        key,
        MODELS.get(prefix, "model"),
        name,
        plain.replace(".processor", "").replace(".", "_"),
        match["kind"],
        match["adapter"],
        tuple(part.get_shape()),
        str(part.get_dtype()),
        alpha,
    )


def _format(keys: list[str]) -> str:
    starts = {
        "kohya": tuple(prefix for prefix in MODELS if prefix.endswith("_")),
        "diffusers": tuple(prefix for prefix in MODELS if prefix.endswith(".")),
        "peft": ("base_model.model.",),
    }
    fits = (name for name, start in starts.items() if all(key.startswith(start) for key in keys))
    return next(fits, "unknown")


def _evidence(
    keys: list[str],
    weights: list[Entry],
    metadata: dict[str, str],
    config: dict[str, PeftConfig],
) -> Iterator[str]:
    """Every sign of a second adapter: its name, a second pair for a layer, a rank that is off."""
    if named := [key for key in keys if AUXILIARY in key.lower()]:
        yield f"{len(named)} keys name an auxiliary, the first is {named[0]}."
    if len(adapters := dict.fromkeys(entry.adapter or UNNAMED for entry in weights)) > 1:
        yield f"The keys name several adapters: {', '.join(adapters)}."
    pairs = Counter((entry.model, entry.layer) for entry in weights if entry.kind in DOWN)
    if doubled := [".".join(layer) for layer, count in pairs.items() if count > 1]:
        yield f"{len(doubled)} layers have more than one adapter, the first is {doubled[0]}."
    uniform = {
        model: own.r
        for model, own in config.items()
        if "r" in own.model_fields_set and not own.rank_pattern
    }
    for entry in weights:
        rank = uniform.get(entry.model)
        if entry.kind in DOWN and rank is not None and entry.shape[0] != rank:
            yield f"{entry.key} has rank {entry.shape[0]} where the metadata says {rank}."
            break
    for model in config:
        if AUXILIARY in model.lower():
            yield f"The adapter metadata describes {model}."
    for key, value in metadata.items():
        if key != ADAPTER_METADATA and "adapter" in key.lower() and AUXILIARY in value.lower():
            yield f"The metadata entry {key} names an auxiliary."
