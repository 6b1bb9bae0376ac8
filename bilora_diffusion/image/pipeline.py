"""An image pipeline of a known kind: loaded whole, or refused where it can't be trained."""

from __future__ import annotations

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

from ..core.errors import UserError, reading
from ..mini import PIPELINES
from ..train.dry_run import empty
from ..train.soundness import require_safetensors, require_whole, require_words
from .base_model import ANOTHER, describe, folder_of, from_hub
from .config import DreamBoothConfig

WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of configurations and tokenizers."""
Dtypes = torch.dtype | dict[str, torch.dtype]


@dataclass(frozen=True)
class Origin:
    """The folder of a pipeline, and functions that read the parts which were left without weights
    (`train.dry_run`).
    """

    folder: Path
    later: dict[str, Callable[[], Any]] = field(default_factory=dict)


def resolve(name: str) -> str:
    """The folder or hub id that a model name stands for; some are embedded (`mini.PIPELINES`)."""
    return str(PIPELINES[name]()) if name in PIPELINES else name


def load_pipeline(
    name: str,
    *,
    dtype: Dtypes,
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
        weights: whether to load any; the models are empty (`dry_run.empty`) without, and no more
            than configurations and tokenizers is downloaded.
        later: parts that are left without weights until somebody reads them (`Origin`).

    Returns:
        The pipeline, with its `Origin` as ``origin``.

    Raises:
        UserError: nothing that can be loaded is there, only pickles are, weights are missing, or
            a tokenizer knows no words.
    """
    model = describe(name, revision, cache_dir)
    folder = folder_of(name)
    if folder is None:
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        if weights:
            options |= {"variant": variant, **({"vae": None} if vae else {})}
            get = partial(DiffusionPipeline.download, name, use_safetensors=True, **options)
        else:
            get = partial(snapshot_download, name, allow_patterns=list(WITHOUT_WEIGHTS), **options)
        folder = Path(from_hub(name, get))
    if weights and name not in PIPELINES and variant and not any(folder.glob(f"*/*.{variant}.*")):
        raise UserError(f'--variant "{variant}" is of no file of "{name}": {ANOTHER}, or drop it.')
    family, index, load = model.family, model.index, _load if weights else _empty
    # Optional parts that the pipeline goes without, such as SD3's T5.
    absent = [part for part in family.optional if (index.get(part) or [None])[0] is None]
    origin, parts = Origin(folder), dict[str, Any]()
    for part, kind in family.parts.items():
        if part in absent:
            continue
        part_dtype = dtype.get(part, dtype["default"]) if isinstance(dtype, dict) else dtype
        if part == "vae":
            # Autoencoders overflow in half precision: latents are made and decoded in float32.
            part_dtype = torch.float32
        options = {"dtype": part_dtype}
        label, place, fix = f'the {part} of "{name}"', folder, f"download it again, or {ANOTHER}"
        if part == "vae" and vae:
            label, place = f'the autoencoder "{vae}"', vae
            fix = f"give a folder or a hub id of a {kind}"
            options["cache_dir"] = cache_dir
        else:
            options["subfolder"] = part
            # A part without files of the variant is read as it is.
            if variant and any((folder / part).glob(f"*.{variant}.*")):
                options["variant"] = variant
        loader = getattr(diffusers, kind, None) or getattr(transformers, kind)
        read = partial(load, label, loader, place, fix, **options)
        if part in later:  # its embeddings may all be cached
            origin.later[part] = read
            parts[part] = _empty(*read.args, **read.keywords)
        else:
            parts[part] = read()
    pipeline_class: Any = getattr(diffusers, family.pipeline)
    pipeline = reading(
        f'the base model "{name}"',
        f"correct its files, or {ANOTHER}",
        lambda: pipeline_class.from_pretrained(
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


def load_base(cfg: DreamBoothConfig, dtype: Dtypes, **options: Any) -> Any:
    """Load the pipeline that a configuration names; see `load_pipeline`."""
    return load_pipeline(
        cfg.pretrained_model_name_or_path,
        dtype=dtype,
        revision=cfg.revision,
        variant=cfg.variant,
        cache_dir=cfg.cache_dir,
        vae=cfg.pretrained_vae_model_name_or_path,
        **options,
    )


def _empty(
    label: str, kind: Any, place: str | Path, fix: str, dtype: torch.dtype, **options: Any
) -> Any:
    """One model without its weights."""
    options.pop("variant", None)  # of weights

    def build() -> Any:
        if hasattr(kind, "load_config"):  # a model of diffusers
            return kind.from_config(kind.load_config(place, **options))
        return kind(kind.config_class.from_pretrained(place, **options))

    return reading(label, fix, lambda: empty(build, dtype))


def _load(label: str, kind: Any, place: str | Path, fix: str, **options: Any) -> Any:
    """One model with all of its weights, from safetensors."""
    require_safetensors(label, Path(place).expanduser() / options.get("subfolder", ""))
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, loaded = reading(label, fix, lambda: kind.from_pretrained(place, **options))
    require_whole(label, loaded["missing_keys"])
    return model.requires_grad_(False).eval()
