"""The runs that are looked at: their configurations, and whether their losses are one function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bilora_diffusion import methods
from bilora_diffusion.errors import UserError
from bilora_diffusion.export import inspect
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.image.pipeline import resolve
from bilora_diffusion.image.script import heldout_images, images
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.run.record import RUN, fault

from ..subjects import BASE, Subject

LOSS_OPTIONS = (
    "resolution",
    "aspect_ratio_buckets",
    "instance_prompt",
    "trigger_word",
    "unmasked_weight",
    "image_interpolation_mode",
    "do_edm_style_training",
    "snr_gamma",
    "train_text_encoder",
)
"""Options beside base model and images that decide what the loss is a function of."""
SET_OPTIONS = (
    "dataset_name",
    "dataset_config_name",
    "instance_data_dir",
    "validation_dataset",
    "validation_part",
    "image_column",
    "caption_column",
    "mask_column",
    "alpha_mask",
    "skip_bad_images",
)
"""Options that say which images there are."""


@dataclass(frozen=True)
class Point:
    """One point of the landscape.

    Args:
        config: of the run; of the base model, of the run that stands for it.
        images: that the loss is measured on.
    """

    subject: Subject
    config: DreamBoothConfig
    images: ImageSet

    @property
    def loss(self) -> list[Any]:
        """What identifies the loss as a function of the weights."""
        options = [getattr(self.config, name) for name in LOSS_OPTIONS]
        return [*base_key(self.config), self.images.fingerprint(), options]


def points(subjects: Sequence[Subject], split: str) -> dict[str, Point]:
    """The points by their labels; the base model's images are the first run's.

    Args:
        split: "train" or "heldout" images.

    Raises:
        UserError: none is a run, one is no run of this script or damaged, or has another base
            model, other images or another loss than the first.
    """
    configs = {one.label: _config(one) for one in subjects if one.kind != BASE}
    if not configs:
        raise UserError("the base model alone has no training images: name the folder of a run.")
    first = next(iter(configs.values()))
    sets: dict[tuple[Any, ...], ImageSet] = {}
    opened = {}
    for subject in subjects:
        config = configs.get(subject.label, first)
        key = tuple(getattr(config, name) for name in SET_OPTIONS)
        if key not in sets:
            sets[key] = open_set(config, split)
        opened[subject.label] = Point(subject, config, sets[key])
    _require_comparable(opened)
    return opened


def has_factors(subject: Subject) -> bool:
    """Whether it has a LoRA space."""
    return subject.kind != BASE and not methods.get(str(subject.method)).exports_weights


def open_set(config: DreamBoothConfig, split: str) -> ImageSet:
    """The images that the loss is measured on.

    Raises:
        UserError: they are gone, or the run had no held-out images.
    """
    if split == "train":
        source = str(config.dataset_name or config.instance_data_dir)
        return images(config, source, config.dataset_config_name)
    heldout = heldout_images(config)
    if heldout is None:
        raise UserError(
            f"the run in {config.output_dir} had no held-out images: take --split train, or give"
            " runs with --validation_dataset."
        )
    return heldout


def base_key(config: DreamBoothConfig) -> list[Any]:
    """What identifies the base model: its name and revision, and the files of a local folder."""
    folder = Path(resolve(config.pretrained_model_name_or_path))
    files = sorted(folder.glob("**/*.safetensors")) if folder.is_dir() else []
    stats = [(str(file.relative_to(folder)), file.stat()) for file in files]
    vae = config.pretrained_vae_model_name_or_path
    about = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return [str(folder), config.revision, config.variant, vae, about]


def _config(subject: Subject) -> DreamBoothConfig:
    folder, values = subject.folder, subject.record.get("config", {})
    if values.get("pretrained_model_name_or_path") is None:
        raise UserError(f"{subject.source} is no run of SDXL DreamBooth: give the folder of one.")
    kind = DreamBoothConfig.with_own_options()
    if unknown := sorted(values.keys() - {field.name for field in fields(kind)}):
        raise UserError(
            f"{folder} was trained with the option {unknown[0]}, which this version does not know:"
            " read it with the version that trained it."
        )
    if has_factors(subject) and (inside := inspect(Path(str(subject.weights)))).auxiliary:
        raise UserError(
            f"{subject.weights} holds more than the primary ({inside.evidence[0]}): export it"
            " again."
        )
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{RUN} of {folder} is damaged{fault(error)}: give another run.") from error


def _require_comparable(opened: Mapping[str, Point]) -> None:
    first, *others = opened.values()
    for point in others:
        own, wanted = point.config, first.config
        if base_key(own) != base_key(wanted):
            what = (
                f"the base model {own.pretrained_model_name_or_path} and not"
                f" {wanted.pretrained_model_name_or_path}"
            )
        elif point.images.fingerprint() != first.images.fingerprint():
            what = "other images"
        elif options := [n for n in LOSS_OPTIONS if getattr(own, n) != getattr(wanted, n)]:
            name = options[0]
            what = f"{name} {getattr(own, name)!r} and not {getattr(wanted, name)!r}"
        else:
            continue
        raise UserError(
            f"{point.subject.source} has {what}, unlike {first.subject.source}, so that their"
            " losses can't be compared: look at them in separate calls."
        )
