"""Validation images: parse prompts to typed samples, and write images with an index.

    flags or a recipe -> `read_prompts` -> `samples_of` -> `DreamBooth.validate`, which generates
    images with `sampling.generate` -> `write_images` into ``validation/step-N`` -> `read_index` for
    the viewer and the model card

This module does not import torch, since options are read before torch is imported.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from ..config.command_line import CommandLine
from ..config.options import StepOptions
from ..core.durable import dump_json, write_text
from ..core.errors import UserError, add_source
from ..core.fields import check, like, option, options_of
from ..core.files import is_text, quoted, read_text
from ..core.values import (
    ADAPTER_GUIDANCE,
    GUIDANCES,
    SAMPLER_STEPS,
    SIDES,
    STRENGTHS,
    read_guidance_source,
)
from ..run.record import image_file_name
from .options import ImageOptions

INDEX = "index.json"
MAX_IMAGES = 10_000  # maximum number of index entries to read; the viewer shows no more
MAX_INDEX_BYTES = 20_000_000
# Settings of sd-scripts without a counterpart here: embedded guidance, sampler, control image,
# start image, truncated guidance, renormalized guidance and flow shift.
UNSUPPORTED_SETTINGS: dict[str, tuple[str, str]] = dict.fromkeys(
    ("g", "ss", "cn", "i", "ctr", "rcfg", "fs"),
    ("this setting of sd-scripts is not supported", "write `--l` for guidance, or drop it"),
)
# Dashes begin a setting only at the start or after a space, and before a letter: "10--20" and
# "a -- b" are text.
SETTING_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


@dataclass(frozen=True)
class PromptOptions:
    """Settings of a validation prompt. None means the run's setting."""

    section: ClassVar[str] = "a validation prompt"

    negative_prompt: str | None = option(None, "Negative prompt.", aliases=("--n",))
    seed: int | None = like(StepOptions, "seed", default=None, aliases=("--d",))
    width: int | None = option(None, "Width in pixels.", range=SIDES, aliases=("--w",))
    height: int | None = option(None, "Height in pixels.", range=SIDES, aliases=("--h",))
    guidance: float | None = option(None, "Guidance scale.", range=GUIDANCES, aliases=("--l",))
    steps: int | None = option(None, "Sampler steps.", range=SAMPLER_STEPS, aliases=("--s",))
    strength: float | None = option(
        None, "Strength of the adapter.", range=STRENGTHS, aliases=("--am",)
    )
    guidance_from: float | str | None = like(
        ImageOptions, "validation_guidance_from", default=None, ignored=()
    )


def read_prompts(
    items: Sequence[str | dict[str, Any]],
    flag: str = "--validation_prompts",
) -> tuple[list[str], list[dict[str, Any]]]:
    """Split prompts into texts and settings. The settings have the names of `PromptOptions`.

    Args:
        items: mappings from a recipe, or texts in the form of kohya's sd-scripts
            (``line_to_prompt_dict``), such as ``a dog --n blurry --w 832``.
        flag: the option that gives the prompts, for messages.

    Raises:
        UserError: a setting is unknown, malformed, out of range or given twice, or a prompt has no
            text.
    """
    parser = CommandLine([PromptOptions], "", "", UNSUPPORTED_SETTINGS)
    prompts: list[str] = []
    settings: list[dict[str, Any]] = []
    for number, item in enumerate(items, start=1):
        with add_source(f"in number {number} of {flag}, "):
            prompt, flags = _prompt_and_flags(item)
            explicit = parser.explicit(flags)
            # A flag and its short form are the same setting.
            if len(explicit) < len(flags):
                raise UserError("a setting is given twice: keep one.")
            check(options_of([PromptOptions]), {**parser.defaults(), **explicit})
        prompts.append(prompt)
        settings.append(explicit)
    return prompts, settings


def _prompt_and_flags(item: str | dict[str, Any]) -> tuple[str, list[str]]:
    """Split a prompt into its text and its settings, each as ``--NAME=VALUE``."""
    settings: list[tuple[str, Any]] = []
    if isinstance(item, str):
        # "a dog --n blurry --w 832" -> "a dog", "n blurry", "w 832"
        text, *flags = SETTING_FLAG.split(item)
        # A text without settings is not changed and keeps its spaces.
        prompt = text.strip() if flags else text
        for flag in flags:
            name, *values = flag.split(None, 1)
            settings.append((name.lower(), "".join(values)))  # "" is refused for a number
    else:
        prompt = item.get("prompt")
        # Null in a recipe means that the setting is not given.
        for name, value in item.items():
            if value is not None and name != "prompt":
                settings.append((name, value))
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(
            "there is no prompt: put a text before the settings (in a recipe, into `prompt`)."
        )
    for name, value in settings:
        if not isinstance(value, str):
            raise UserError(f"{quoted(name)} is {quoted(value)}: give a single value.")
    return prompt, [f"--{name}={value}" for name, value in settings]


@dataclass(frozen=True)
class ValidationSample:
    """Settings of one validation image."""

    prompt: str
    negative_prompt: str
    seed: int
    strength: float  # strength of the adapter; 1 is the trained strength
    width: int  # in pixels
    height: int  # in pixels
    guidance: float | None  # guidance scale; None for the model's default
    steps: int | None  # number of sampler steps; None for the model's default
    # Model for the unconditional prediction: "adapter", "base", or the adapter's strength in it.
    guidance_from: float | str = ADAPTER_GUIDANCE
    concept: str = ""  # name of the prompt's concept; "" for a prompt of the run

    @property
    def batch_settings(self) -> tuple[Any, ...]:
        """The settings that all samples of one batch must share."""
        guidance = self.guidance, self.guidance_from
        return self.height, self.width, guidance, self.steps, self.strength

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, but ``concept`` only if there is one."""
        values = asdict(self)
        if not self.concept:
            del values["concept"]
        return values


def usual_sample(cfg: ImageOptions, prompt: str) -> ValidationSample:
    """Build the sample of a prompt without settings from a run's options."""
    return ValidationSample(
        prompt=prompt,
        negative_prompt="",
        seed=cfg.seed,
        strength=1.0,
        width=cfg.resolution,
        height=cfg.resolution,
        guidance=cfg.validation_guidance_scale,
        steps=cfg.validation_num_inference_steps,
        guidance_from=cfg.validation_guidance_from,
    )


def samples_of(cfg: ImageOptions) -> list[ValidationSample]:
    """Build the samples of a run from its options, in the order of their files.

    The samples of each prompt have consecutive seeds and come one after another.
    """
    prompts = cfg.validation_prompts
    settings = cfg.validation_settings or [{} for _ in prompts]  # [] if no prompt has settings
    samples = []
    for prompt, prompt_settings in zip(prompts, settings, strict=True):
        first_sample = replace(usual_sample(cfg, prompt), **prompt_settings)
        # The seeds are the same at each step, so that images of different steps can be compared.
        for number in range(cfg.num_validation_images):
            samples.append(replace(first_sample, seed=first_sample.seed + number))
    return samples


def write_images(
    folder: Path,
    samples: Sequence[ValidationSample],
    images: Sequence[Image],
    with_settings: bool,
    shared_settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write images as PNG files, and their index.

    Args:
        folder: folder of the step, which is created.
        samples, images: the images, and the sample of each.
        with_settings: write each sample's settings into its file, as the text chunk "settings".
        shared_settings: settings that all samples share, to record together with their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
        information = PngInfo()
        settings = {**sample.to_dict(), **shared_settings}
        if with_settings:
            # iTXt chunks are UTF-8; plain text chunks are Latin-1.
            information.add_itxt("settings", json.dumps(settings, ensure_ascii=False))
        image.save(folder / image_file_name(number), pnginfo=information)
        entries.append({"file": image_file_name(number), **settings})
    # The index is written last, so that all of its files exist.
    write_text(folder / INDEX, dump_json({"images": entries}))


@dataclass(frozen=True)
class ValidationImage:
    """An entry of an index: an image file in the step's folder, its prompt and its settings."""

    file: str
    prompt: str
    seed: int | None = None  # seed of the noise; None if unknown
    guidance: float | None = None  # guidance scale; None for the model's default, or if unknown
    guidance_from: float | str | None = None  # see `ValidationSample`; None if unknown


def read_index(path: Path, config: Mapping[str, Any]) -> list[ValidationImage]:
    """Read the index of a step's folder; return its entries in order.

    Args:
        path: path of the index.
        config: the run's options, from which the entries are derived if there is no index.

    Raises:
        UserError: the index can't be read or is damaged, or names a file that is not directly in
            the folder.
    """
    if not os.path.exists(path):
        return derive_index(config)
    name = f"{path.parent.name}/{path.name}"
    text = read_text(path, name, MAX_INDEX_BYTES)
    damaged = UserError(f"{name} is damaged: delete it to use the order of the files.")
    try:
        entries = json.loads(text)["images"][:MAX_IMAGES]
        images = []
        for entry in entries:
            image = ValidationImage(
                entry["file"], entry["prompt"], entry.get("seed"), entry.get("guidance")
            )
            if "guidance_from" in entry:
                source = read_guidance_source(entry["guidance_from"])
                image = replace(image, guidance_from=source)
            images.append(image)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged from error
    # The index may come from someone else, so its values are checked.
    for image in images:
        texts = (image.file, image.prompt)
        if not all(isinstance(text, str) and is_text(text) for text in texts):
            raise damaged
        if image.seed is not None and type(image.seed) is not int:
            raise damaged
        if image.guidance is not None:
            is_number = type(image.guidance) in (int, float)
            if not is_number or not 0 <= image.guidance <= GUIDANCES.maximum:
                raise damaged
        # Paths out of the folder and names that can't be opened are refused.
        if image.file != Path(image.file).name or "\0" in image.file:
            raise damaged
    return images


def derive_index(config: Mapping[str, Any]) -> list[ValidationImage]:
    """Derive the entries of a folder without an index. Each prompt has the same number of files."""
    images: list[ValidationImage] = []
    for prompt in config.get("validation_prompts") or ():
        for _ in range(config.get("num_validation_images") or 0):
            if len(images) == MAX_IMAGES:
                return images
            images.append(ValidationImage(image_file_name(len(images)), prompt))
    return images
