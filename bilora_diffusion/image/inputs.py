"""Checks that a run's model, images and places can exist, before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import constraints
from ..core.errors import UserError
from ..core.files import folder_or_id, is_folder, quoted
from ..core.values import BASE_GUIDANCE
from ..run.data import read_part
from .base_model import BaseModel, folder_of
from .buckets import sizes
from .listing import folder_of_set, list_folder
from .options import CACHE_AUTO, CACHE_FOLDER, ImageOptions

if TYPE_CHECKING:  # which imports torch
    from .families.base import Configs, Family


def check_base_model(cfg: ImageOptions, model: BaseModel) -> None:
    """Refuse sizes, negative prompts and files that the base model does not have."""
    family = model.family
    edges: set[int] = set()
    for size in sizes(cfg.resolution, cfg.aspect_ratio_buckets):
        edges.update(size)
    for number, settings in enumerate(cfg.validation_settings, start=1):
        for edge in ("width", "height"):
            if edge in settings:
                edges.add(settings[edge])
        guidance = settings.get("guidance", cfg.validation_guidance_scale)
        if guidance is None:
            guidance = model.usual_guidance
        whose = f"number {number} of --validation_prompts"
        if settings.get("concept"):  # its place in the joined list says nothing to the user
            whose = f"a prompt of {settings['concept']}"
        source = settings.get("guidance_from", cfg.validation_guidance_from)
        if source == BASE_GUIDANCE:
            request = f"{whose} with guidance from the base model"
            require_unconditional(family, guidance, model.index, model.configs, request)
        # Without guidance the pipeline runs no second pass that would read it.
        is_read = family.reads_negative_prompt and guidance > family.unguided
        if settings.get("negative_prompt") and not is_read:
            raise UserError(
                f"{whose} has a negative prompt, and {family.title} reads none at a guidance of"
                f" {guidance:g}: drop it."
            )
    if cfg.validation_guidance_from == BASE_GUIDANCE:
        guidance = cfg.validation_guidance_scale
        if guidance is None:
            guidance = model.usual_guidance
        request = "--validation_guidance_from base"
        require_unconditional(family, guidance, model.index, model.configs, request)
    for edge in edges:
        family.require_resolution(edge, model.configs)

    folder = folder_of(model.name)
    if cfg.variant is not None and folder is not None:
        # Only a local model: of the hub's, diffusers says which variants there are.
        weights = folder / family.denoiser
        if not any(weights.glob(f"*.{cfg.variant}*.safetensors")):
            raise UserError(
                f'--variant "{cfg.variant}" is not among the files of "{model.name}": drop it.'
            )


def require_unconditional(
    family: Family,
    guidance: float,
    index: Mapping[str, Any],
    configs: Configs,
    request: str = "guidance from the base model",
) -> None:
    """Refuse the base model's unconditional prediction, asked for in the words of ``request``,
    where a model makes none at this guidance; see `Family.is_guided`.
    """
    if family.is_guided(guidance, index, configs):
        return
    fix = "drop it"
    if family.is_guided(math.inf, index, configs):
        fix = f"give a guidance above {family.unguided:g}, or drop it"
    raise UserError(
        f"{request} is refused, since this {family.title} makes no unconditional prediction at a"
        f" guidance of {guidance:g}: {fix}."
    )


def check_inputs(cfg: ImageOptions) -> None:
    """Refuse what `check_images` does, places that can't be a folder, and malformed ids."""
    check_settings(cfg)
    if cfg.validation_part is not None:
        read_part(cfg.validation_part)
    if not cfg.concepts:  # theirs were checked as each was read (`concept_list`)
        check_images(cfg)
    for name in ("pretrained_vae_model_name_or_path", "hub_model_id"):
        value = getattr(cfg, name)
        if value is not None:
            folder_or_id(value, f"--{name}")
    check_cache(cfg.disk_cache)


def check_settings(cfg: ImageOptions) -> None:
    """Refuse a prompt's strength of the adapter, and guidance from the base model, where more than
    the adapter was trained.
    """
    for settings in cfg.validation_settings:
        facts: dict[str, Any] = {}
        if settings.get("strength", 1.0) != 1.0:
            facts["strength"] = settings["strength"]
        if "guidance_from" in settings:
            facts["guidance_from"] = settings["guidance_from"]
        if facts:
            constraints.check({**vars(cfg), **facts})


def check_cache(disk_cache: str) -> None:
    """Refuse a folder that can't be written; one that nobody chose is only missed."""
    cache = cache_folder(disk_cache)
    if cache is None or disk_cache == CACHE_AUTO:
        return
    # The folder is made in the nearest parent that exists, a dead link included.
    parents = (cache, *cache.absolute().parents)
    existing = next(path for path in parents if os.path.lexists(path))
    is_writable = is_folder(existing) and os.access(existing, os.W_OK | os.X_OK)
    if not is_writable or not disk_cache.strip():
        raise UserError(
            f"--disk_cache {quoted(disk_cache)} is not a folder that can be written: give another,"
            " auto, or no."
        )


def check_images(cfg: ImageOptions) -> None:
    """Refuse images without a prompt or a place, of a run or of a concept."""
    for name in ("dataset_name", "validation_dataset"):
        value = getattr(cfg, name)
        if value is not None:
            folder_of_set(value, f"--{name}")
    images = cfg.instance_data_dir
    if images is not None and folder_or_id(images, "--instance_data_dir") is None:
        raise UserError(f"--instance_data_dir {quoted(images)} does not exist: correct the path.")
    # Class images that are missing are generated, and would be training images in the next run.
    source = str(cfg.dataset_name or cfg.instance_data_dir)
    folder = Path(source).expanduser()
    if cfg.class_data_dir is not None and Path(cfg.class_data_dir).exists():
        class_folder = folder_or_id(cfg.class_data_dir, "--class_data_dir")
        if class_folder is not None and class_folder.resolve() == folder.resolve():
            raise UserError(
                f"--class_data_dir {quoted(cfg.class_data_dir)} is the folder of the training"
                " images: give the class images a folder of their own."
            )
    # A set on the hub is not listed here: without any option it has no known column of captions.
    has_prompt = cfg.caption_column is not None or cfg.instance_prompt
    if not has_prompt and not (is_folder(folder) and list_folder(folder).has_captions):
        raise UserError(
            f'"{source}" has no prompt: add --instance_prompt, for example "a photo of TOK dog",'
            " --caption_column, or a .txt file with its caption beside each image."
        )


def cache_folder(disk_cache: str) -> Path | None:
    """The folder that a ``--disk_cache`` means, which need not exist; None for none."""
    if disk_cache == "no":
        return None
    if disk_cache == CACHE_AUTO:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / CACHE_FOLDER
    return Path(disk_cache).expanduser()
