"""What the latents and prompt embeddings of a run depend on, beside what is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import PIL
import torch
import transformers

from .. import identity
from . import places
from .families.base import Family
from .latents import LatentSpace
from .shelf import Shelf


def folder(cfg: Any) -> Path | None:
    """Where a run keeps what it encodes; None where it does not."""
    return None if cfg.dry_run else places.folder(cfg.disk_cache)


def of_prompts(cfg: Any, family: Family, pipeline: Any, device: torch.device) -> Shelf:
    """The shelf of what the text encoders of a run make of prompts."""
    place = folder(cfg)
    if place is None:
        return Shelf(None)
    names = [name for name in family.encoders if getattr(pipeline, name) is not None]
    parts = [*names, *(name.replace("text_encoder", "tokenizer") for name in names)]
    dtypes = [str(getattr(pipeline, name).dtype) for name in names]
    held = cfg.quantize if family.flow else "none"
    settings = [family.pipeline, str(family.max_sequence_length), held, *dtypes]
    try:
        weights = identity.of_files(pipeline.origin.folder / part for part in parts)
    except OSError:
        return Shelf(None)  # reading the encoders will be refused with the reason
    index = {name: value for name, value in pipeline.config.items() if name != "_name_or_path"}
    return Shelf(place / "prompts", *settings, weights, repr(index), *_machine(cfg, device))


def of_latents(cfg: Any, space: LatentSpace, vae: Any, device: torch.device) -> Shelf:
    """The shelf of what the autoencoder of a run makes of images."""
    place = folder(cfg)
    if place is None:
        return Shelf(None)
    settings = [str(space.drawn), cfg.image_interpolation_mode, PIL.__version__]
    return Shelf(place / "latents", *settings, identity.of_model(vae), *_machine(cfg, device))


def _machine(cfg: Any, device: torch.device) -> list[str]:
    """What decides the last digits of what is encoded."""
    cuda = device.type == "cuda"
    return [
        *(torch.__version__, diffusers.__version__, transformers.__version__, device.type),
        torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        str(cfg.allow_tf32),
    ]
