"""The configuration of a DreamBooth run: all options, checked and with their defaults set."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..config import resolving
from ..config.lora_sources import lora_facts
from ..config.options import OptimizerOptions, StepOptions
from ..core.errors import UserError
from ..core.files import folder_or_id, is_folder, quoted, without_paths
from ..core.values import (
    BY_SAMPLES,
    DINOV2,
    EMBEDDED,
    HELDOUT_DISTANCE,
    HELDOUT_LOSS,
    guidance_title,
    unconditional_strength,
)
from ..methods.options import AdapterOptions, MethodFlags
from .base_model import BaseModel, folder_of, read_base_model
from .concept_list import check_images, check_settings, with_sets_of_images
from .derived import with_choice_guidance, with_model_defaults
from .families import SDXL, family_class
from .model_options import DiffusionOptions, FlowOptions, ModelOptions, PriorOptions
from .options import (
    CACHE_AUTO,
    CACHE_FOLDER,
    DataOptions,
    ImageOptions,
    ImageOutputOptions,
    ImageStoppingOptions,
    ValidationOptions,
)
from .sampler_options import SamplerOptions
from .validation import ValidationSample, samples_of

if TYPE_CHECKING:  # this module imports torch
    from .families.base import Configs, Family

GROUPS = (
    ModelOptions,
    DataOptions,
    AdapterOptions,
    MethodFlags,
    StepOptions,
    ImageStoppingOptions,
    OptimizerOptions,
    DiffusionOptions,
    FlowOptions,
    PriorOptions,
    ValidationOptions,
    SamplerOptions,
    ImageOutputOptions,
)

# Options that are used only while images are generated, with one value for all images.
SAMPLER_OPTIONS = tuple(field.name for field in fields(SamplerOptions))
# Recorded facts of the ``--sampling_lora`` file, whose path may change.
SAMPLING_LORA_FACTS = frozenset({"sampling_lora_sha256", "sampling_lora_strength"})
# Options that change the distance of samples from held-out images.
SAMPLING_OPTIONS = frozenset(
    {
        "image_model",
        "validation_num_inference_steps",
        "validation_guidance_scale",
        "choice_guidance_from",
        "sampling_scheduler",
        "validation_model",
        *SAMPLING_LORA_FACTS,
    }
)


@dataclass(frozen=True)
class DreamBoothConfig(ImageOptions):
    """`ImageOptions` with their final values, as built by `resolve`.

    ``optimizer`` is in lower case, ``validation_prompts`` holds the texts of all prompts, and
    ``max_train_steps`` is None only if the length of training is given in epochs.
    """

    groups: ClassVar[tuple[type, ...]] = GROUPS
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (
        ("dataset_name", "instance_data_dir"),
        ("max_train_steps", "num_train_epochs"),
        ("validation_prompt", "validation_prompts"),
    )
    description: ClassVar[str] = (
        "Fine-tune Stable Diffusion XL, or a flow-matching transformer, on a few images with"
        " Bi-LoRA or LoRA. Flags of diffusers' train_dreambooth_lora_*.py keep their names and"
        " meaning; defaults are those of the Bi-LoRA paper's Table A8."
    )
    usage: ClassVar[str] = "%(prog)s --dataset {mini,HUB_ID,FOLDER} [flags]"

    @classmethod
    def resolve(cls, argv: Sequence[str] | None = None) -> Self:
        """Build the configuration from a command line; see `config.resolving`."""
        return resolving.resolve(cls, argv)

    def derive_defaults(self) -> Self:
        cfg = with_sets_of_images(self)
        model = read_base_model(cfg.pretrained_model_name_or_path, cfg.revision, cfg.cache_dir)
        cfg = with_model_defaults(cfg, model)
        sampled_model = model
        if cfg.validation_model is not None:
            sampled_model = describe_validation_model(cfg, model)
        if cfg.chooses_by_samples:
            cfg = with_choice_guidance(cfg, sampled_model)
        check_base_model(cfg, model, sampled_model)
        return cfg

    def check_inputs(self) -> None:
        check_settings(self)
        check_level_range(self.timestep_range)
        scheme, _, source = self.image_model.partition(":")
        if self.image_model != EMBEDDED and (scheme != DINOV2 or not source):
            raise UserError(
                f"--image_model {quoted(self.image_model)} is unknown: give {DINOV2}:ID_OR_FOLDER,"
                f" such as {DINOV2}:facebook/dinov2-base."
            )
        if not self.concepts:  # each concept was checked when it was read (`concept_list`)
            check_images(self)
        for name in ("pretrained_vae_model_name_or_path", "hub_model_id"):
            value = getattr(self, name)
            if value is not None:
                folder_or_id(value, f"--{name}")
        check_cache(self.disk_cache)

    @property
    def validates_at_checkpoints(self) -> bool:
        # If there are no other prompts, ``validation_prompts`` holds only the final prompt.
        return self.validation_prompts != [self.final_validation_prompt]

    @property
    def base_model(self) -> str:
        return self.pretrained_model_name_or_path

    @property
    def chooses_by_samples(self) -> bool:
        """Whether the distance of samples decides which weights the run exports."""
        return self.depends_on_heldout and self.choose_by == BY_SAMPLES

    @property
    def heldout_measure(self) -> str:
        if self.chooses_by_samples:
            return HELDOUT_DISTANCE
        return HELDOUT_LOSS

    @property
    def measurement_options(self) -> frozenset[str]:
        options = super().measurement_options
        if self.chooses_by_samples:
            options |= SAMPLING_OPTIONS
        return options

    @property
    def measures_samples(self) -> bool:
        return self.chooses_by_samples

    @property
    def has_unused_parameters(self) -> bool:
        # SDXL does not use the last layer of its first text encoder, and transformers discard the
        # text tokens after their last block.
        return self.train_text_encoder or self.pipeline != SDXL

    @property
    def family(self) -> Any:
        """The base model's family, a `families.base.Family`, with the run's settings."""
        family = family_class(self.pipeline, self.pretrained_model_name_or_path)
        return family(**self.family_settings)

    @property
    def family_settings(self) -> dict[str, Any]:
        """The run's values of `Family` fields; fields without a value keep their defaults."""
        settings: dict[str, Any] = {}
        for name in ("max_sequence_length", "guidance_scale"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        return settings

    @property
    def cache(self) -> Path | None:
        """Folder of cached latents and prompt embeddings; None if there is no cache on disk."""
        if self.dry_run:
            return None
        return cache_folder(self.disk_cache)

    @property
    def concept_configs(self) -> list[Self]:
        """The configuration of each concept, or the run's configuration if it has no concepts."""
        if not self.concepts:
            return [self]
        return [replace(self, concepts=[], **options) for options in self.concepts]

    @property
    def sampled_prompts(self) -> list[str]:
        """The prompt of each validation image, in the order of the images."""
        return [sample.prompt for sample in self.samples]

    @property
    def samples(self) -> list[ValidationSample]:
        """The settings of each validation image, in the order of the images."""
        return samples_of(self)

    @property
    def sampler_settings(self) -> dict[str, Any]:
        """The given options of `SAMPLER_OPTIONS`, by name, as each image's record holds them."""
        settings: dict[str, Any] = {}
        for name in SAMPLER_OPTIONS:
            source = self.lora_sources.get(name)
            if source is not None:
                settings |= {name: source.path.name, **lora_facts({name: source})}
            elif getattr(self, name) is not None:
                settings[name] = without_paths(getattr(self, name))
        return settings

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        # These values are not options, but belong to the record; evaluations read the concepts.
        values["validation_settings"] = self.validation_settings
        if self.concepts:
            values["concepts"] = self.concepts
        return values

    @classmethod
    def changeable_options(cls) -> frozenset[str]:
        return super().changeable_options() | {"validation_settings"} | SAMPLING_LORA_FACTS


# Builds the configuration of the image script from a command line.
resolve = DreamBoothConfig.resolve


def describe_validation_model(cfg: ImageOptions, model: BaseModel) -> BaseModel:
    """Read the configuration files of ``--validation_model``.

    Raises:
        UserError: the files can't be read, or the pipeline class is not the base model's.
    """
    flag = "--validation_model"
    sampled_model = read_base_model(str(cfg.validation_model), None, cfg.cache_dir, flag)
    if sampled_model.pipeline != model.pipeline:
        raise UserError(
            f"{flag} {quoted(sampled_model.name)} is a {sampled_model.pipeline}, but"
            f" {quoted(model.name)} is a {model.pipeline}: give a model of the same kind."
        )
    return sampled_model


def check_base_model(cfg: ImageOptions, model: BaseModel, sampled_model: BaseModel) -> None:
    """Check that the models support the sizes, scheduler, guidance, negative prompts and variant.

    Args:
        sampled_model: model of the validation images, ``--validation_model`` or the base model.
    """
    # Imported here, since these modules import torch.
    from .crops import bucket_sizes
    from .schedulers import check_scheduler

    family = model.family
    # These decide whether the model makes an unconditional prediction.
    guided_by = sampled_model.index, sampled_model.configs
    usual_steps, run_guidance = sampled_model.usual_sampling
    if cfg.validation_guidance_scale is not None:
        run_guidance = cfg.validation_guidance_scale
    if cfg.sampling_scheduler is not None:
        steps_options = [
            cfg.validation_num_inference_steps,
            *(sample.steps for sample in samples_of(cfg)),
        ]
        steps = [count or usual_steps for count in steps_options]
        check_scheduler(cfg.sampling_scheduler, sampled_model.configs["scheduler"], steps)
    sides: set[int] = set()  # sides of all training and validation images, in pixels
    for size in bucket_sizes(cfg.resolution, cfg.aspect_ratio_buckets):
        sides.update(size)
    if cfg.validation_prompts:
        sides.add(cfg.resolution)  # also with buckets
    for number, settings in enumerate(cfg.validation_settings, start=1):
        for name in ("width", "height"):
            if name in settings:
                sides.add(settings[name])
        guidance = settings.get("guidance", run_guidance)
        prompt = f"number {number} of --validation_prompts"
        if settings.get("concept"):  # the user did not write the joined list
            prompt = f"a prompt of {settings['concept']}"
        guidance_from = settings.get("guidance_from", cfg.validation_guidance_from)
        if unconditional_strength(guidance_from) < 1:
            request = f"{prompt} with guidance from {guidance_title(guidance_from)}"
            require_unconditional(family, guidance, *guided_by, request)
        # Without guidance, no prediction uses the negative prompt.
        is_read = family.reads_negative_prompt and family.is_guided(guidance, *guided_by)
        if settings.get("negative_prompt") and not is_read:
            raise UserError(
                f"{prompt} has a negative prompt, and {family.title} reads none at a guidance of"
                f" {guidance:g}: drop it."
            )
    for option in ("validation_guidance_from", "choice_guidance_from"):
        guidance_from = getattr(cfg, option)
        if unconditional_strength(guidance_from) < 1:
            request = f"--{option} {guidance_from}"
            require_unconditional(family, run_guidance, *guided_by, request)
    for side in sides:
        family.require_resolution(side, model.configs)

    # The variant of a model on the hub is checked when the model is loaded.
    folder = folder_of(model.name)
    if cfg.variant is not None and folder is not None:
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
    request: str,
) -> None:
    """Check that a model makes the unconditional prediction that a request changes.

    Args:
        guidance: the guidance scale; see `Family.is_guided`.
        index, configs: the model's configurations; see `BaseModel`.
        request: the option or prompt that needs the prediction; the error message begins with it.

    Raises:
        UserError: the model does not make this prediction.
    """
    if family.is_guided(guidance, index, configs):
        return
    fix = "drop it"
    # Find out whether the model makes this prediction at a higher scale.
    if family.is_guided(math.inf, index, configs):
        fix = f"give a guidance above {family.unguided_scale:g}, or drop it"
    raise UserError(
        f"{request} is refused, since this {family.title} makes no unconditional prediction at a"
        f" guidance of {guidance:g}: {fix}."
    )


def check_level_range(levels: Sequence[float]) -> None:
    """Check that ``--timestep_range`` is two numbers in ascending order."""
    if len(levels) != 2 or levels[0] >= levels[1]:
        raise UserError(
            f"--timestep_range is {quoted(' '.join(map(str, levels)))}: give two numbers from 0 to"
            " 1, the lower one first, such as 0 0.8."
        )


def check_cache(disk_cache: str) -> None:
    """Check that ``--disk_cache`` can be written.

    "auto" is not checked: if its folder can't be written, `DiskCache` only warns.
    """
    cache = cache_folder(disk_cache)
    if cache is None or disk_cache == CACHE_AUTO:
        return
    # The folder would be created in its nearest existing parent; a broken link counts as existing.
    parents = (cache, *cache.absolute().parents)
    existing = next(path for path in parents if os.path.lexists(path))
    is_writable = is_folder(existing) and os.access(existing, os.W_OK | os.X_OK)
    if not is_writable or not disk_cache.strip():
        raise UserError(
            f"--disk_cache {quoted(disk_cache)} is not a folder that can be written: give another"
            " folder, auto, or no."
        )


def cache_folder(disk_cache: str) -> Path | None:
    """Return the folder of a ``--disk_cache`` value, which need not exist; None for "no"."""
    if disk_cache == "no":
        return None
    if disk_cache == CACHE_AUTO:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / CACHE_FOLDER
    return Path(disk_cache).expanduser()
