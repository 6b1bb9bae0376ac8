"""Tiny pipelines of the flow-matching models, genuine but for their size and random weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from tests.scripts.runs import once

FILES = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2",
    "ZImagePipeline": "z_image",
    "QwenImagePipeline": "qwen_image",
    "Krea2Pipeline": "krea2",
    "Lumina2Pipeline": "lumina2",
}
"""By the class of the pipeline, the file here whose ``pipeline()`` makes one."""


def made(kind: str) -> Any:
    """A pipeline with its fixed random weights."""
    return import_module(f"{__name__}.{FILES[kind]}").pipeline()


def saved(kind: str, folder: Path) -> Path:
    """A pipeline in diffusers' format, in a new folder."""
    made(kind).save_pretrained(folder)
    return folder


def shared(kind: str) -> Path:
    """The folder of such a pipeline, made by the first who asks; to be read."""
    return once("base", lambda folder: saved(kind, folder), kind)
