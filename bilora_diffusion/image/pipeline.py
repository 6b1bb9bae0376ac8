"""An image pipeline of a known kind: loaded whole, or refused where it can't be trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from ..errors import UserError, reading
from ..mini import PIPELINES
from ..train.empty import empty
from ..train.soundness import require_safetensors, require_whole, require_words
from .base_model import ANOTHER, folder_of, from_hub
from .families import named
from .families.base import Family

WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of configurations and tokenizers."""


@dataclass(frozen=True)
class Origin:
    """Where a pipeline was read from.

    Args:
        folder: of the whole.
        later: what reads each part that was left without weights (`train.empty`).
    """

    folder: Path
    later: dict[str, Callable[[], Any]] = field(default_factory=dict)


def resolve(name: str) -> str:
    """The folder or hub id that a model name stands for; some are embedded (`mini.PIPELINES`)."""
    return str(PIPELINES[name]()) if name in PIPELINES else name


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype | dict[str, torch.dtype],
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    vae: str | None = None,
    weights: bool = True,
    later: Collection[str] = (),
) -> Any:
    """Load a genuine pipeline with its VAE in float32 and everything else in ``dtype``.

    Args:
        name: folder, hub id, or one of `mini.PIPELINES`.
        dtype: of all parts, or of each by name with "default" for the rest.
        vae: another autoencoder (``--pretrained_vae_model_name_or_path``).
        weights: whether to load any; the models are empty (`train.empty`) without, and no more than
            configurations and tokenizers is downloaded.
        later: parts that are left without weights until somebody reads them (`Origin`).

    Returns:
        The pipeline, with its `Origin` as ``origin``.

    Raises:
        UserError: nothing that can be loaded is there, only pickles are, weights are missing, or
            a tokenizer knows no words.
    """
    places: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    if weights:
        places["variant"] = variant
    download, load = (_download, _load) if weights else (_download_configs, _empty)
    folder = folder_of(name) or download(name, vae, **places)
    if weights and name not in PIPELINES and variant and not any(folder.glob(f"*/*.{variant}.*")):
        raise UserError(f'--variant "{variant}" is of no file of "{name}": {ANOTHER}, or drop it.')
    index = _index(name, folder)
    family = named(str(index.get("_class_name")), name)()
    absent = [part for part in family.optional if (index.get(part) or [None])[0] is None]
    origin, parts = Origin(folder), dict[str, Any]()
    for part, kind in family.parts.items():
        if part in absent:
            continue
        # Autoencoders overflow in half precision: latents are made and decoded in float32.
        own = dtype.get(part, dtype["default"]) if isinstance(dtype, dict) else dtype
        options: dict[str, Any] = {"dtype": torch.float32 if part == "vae" else own}
        loader = getattr(diffusers, kind, None) or getattr(transformers, kind)
        if part == "vae" and vae:
            parts[part] = _other_vae(load, family, loader, vae, cache_dir=cache_dir, **options)
            continue
        if variant and any((folder / part).glob(f"*.{variant}.*")):
            options["variant"] = variant
        read = partial(load, f'the {part} of "{name}"', loader, folder, subfolder=part, **options)
        if part in later:
            origin.later[part] = read
            parts[part] = _empty(*read.args, **read.keywords)
        else:
            parts[part] = read()
    whole: Any = getattr(diffusers, family.pipeline)
    pipeline = reading(
        f'the base model "{name}"',
        f"correct its files, or {ANOTHER}",
        lambda: whole.from_pretrained(
            folder, **parts, **dict.fromkeys(absent), use_safetensors=True
        ),
    )
    for part in family.encoders:
        if part not in absent:
            tokenizer = part.replace("text_encoder", "tokenizer")
            fix = f"put its files into the folder {tokenizer}, or {ANOTHER}"
            require_words(f'the {tokenizer} of "{name}"', getattr(pipeline, tokenizer), None, fix)
    pipeline.register_to_config(_name_or_path=name)  # and not a folder of the hub's cache
    pipeline.set_progress_bar_config(disable=True)
    pipeline.origin = origin
    return pipeline


def _index(name: str, folder: Path) -> dict[str, Any]:
    """What ``model_index.json`` says."""
    what, fix = f'the base model "{name}"', f"correct its files, or {ANOTHER}"
    index = reading(
        what, fix, lambda: json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    )
    if not isinstance(index, dict):
        raise UserError(f"{what} has a model_index.json that is no JSON object: {fix}.")
    return index


def _download(name: str, vae: str | None, **options: Any) -> Path:
    """The folder in the hub's cache that holds a pipeline, without the autoencoder if another is
    given.
    """
    passed = {"vae": None} if vae else {}
    found = from_hub(
        name,
        lambda: DiffusionPipeline.download(name, use_safetensors=True, **options, **passed),
    )
    return Path(found)


def _other_vae(
    load: Callable[..., Any], family: Family, kind: Any, place: str, **options: Any
) -> Any:
    """The autoencoder that a run takes instead of the pipeline's own."""
    what = f'the autoencoder "{place}"'
    fix = (
        "give a folder or a hub id (`hf auth login` if it is gated) that holds an"
        f" {kind.__name__} by itself as --pretrained_vae_model_name_or_path"
    )
    config = reading(what, fix, lambda: kind.load_config(place, cache_dir=options["cache_dir"]))
    found = config.get("_class_name", kind.__name__)
    if found != kind.__name__:
        raise UserError(f"{what} is of the class {found}, which is not {family.title}'s: {fix}.")
    return load(what, kind, place, **options)


def _download_configs(name: str, vae: str | None, **options: Any) -> Path:
    """The folder in the hub's cache that holds all of a pipeline but its weights."""
    found = from_hub(
        name,
        lambda: snapshot_download(name, allow_patterns=list(WITHOUT_WEIGHTS), **options),
    )
    return Path(found)


def _empty(
    what: str,
    kind: Any,
    place: str | Path,
    dtype: torch.dtype,
    subfolder: str | None = None,
    cache_dir: str | None = None,
    **_: Any,
) -> Any:
    """One model without its weights."""
    found = {"subfolder": subfolder or "", "cache_dir": cache_dir}

    def build() -> Any:
        if hasattr(kind, "load_config"):  # a model of diffusers
            return kind.from_config(kind.load_config(place, **found))
        return kind(kind.config_class.from_pretrained(place, **found))

    return reading(what, f"correct its config.json, or {ANOTHER}", lambda: empty(build, dtype))


def _load(what: str, kind: Any, place: str | Path, **options: Any) -> Any:
    """One model with all of its weights, from safetensors."""
    folder = Path(place).expanduser() / options.get("subfolder", "")
    require_safetensors(what, folder)
    model, found = reading(
        what,
        f"download or write it again, or {ANOTHER}",
        lambda: kind.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, **options
        ),
    )
    require_whole(what, found["missing_keys"])
    return model.requires_grad_(False).eval()
