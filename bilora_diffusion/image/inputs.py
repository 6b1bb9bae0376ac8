"""What a command line means by its model, images and prompts, and whether these can exist."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..choices import ATTENTION
from ..config.machine import device_type
from ..errors import UserError
from ..files import folder_or_id, is_file, is_folder, quoted, read_text
from ..mini import ANIMALS, FLOW, MINI
from ..run.heldout_part import read_part
from .base_model import SDXL_BASE, BaseModel, describe, folder_of
from .bnb import quantization
from .buckets import sizes

FP16_FIX = "madebyollin/sdxl-vae-fp16-fix"
HELDOUT = f"{MINI}-heldout"
ANIMALS_HELDOUT = f"{ANIMALS}-heldout"
BUILT_IN = (MINI, HELDOUT, ANIMALS, ANIMALS_HELDOUT)
ICONS = "linoyts/3d_icon"
SUBJECTS = ("rabbit", "cloud", "lion", "droplet", "frog", "sun")
"""The six subjects of the paper's Table 4; they are in no training set."""
ANIMAL_SUBJECTS = ("penguin", "lion", "owl", "whale", "crab", "fox")
"""Six of the held-out animals."""

TABLE_A8_STEPS = 500
BATCH = ("train_batch_size", "gradient_accumulation_steps")
"""Whoever gives one of them means a step of that many images, whatever the default of the other."""
TEXT_ENCODER_LR = 5e-6
FLOW_TOKENS = 16
"""Of mini-flow where T5's tokens would be: it has no T5, so zeros stand there, and cost time."""
CHECKPOINTING_FROM = 512
CACHE, CACHE_AUTO = "bilora-diffusion", "auto"
MOST_PROMPT_BYTES = 1_000_000


@dataclass(frozen=True)
class Preset:
    """What a well-known set brings along; each value gives way to one that the user gives."""

    instance_prompt: str = "a TOK icon, in the style of TOK"
    subjects: tuple[str, ...] = SUBJECTS
    num_validation_images: int = 1
    caption_column: str | None = None
    validation_dataset: str | None = None
    model: str | None = None

    @property
    def validation_prompts(self) -> list[str]:
        """One for each subject."""
        return [f"a TOK icon of a {subject}, in the style of TOK" for subject in self.subjects]


PRESETS = {
    ICONS: Preset(),  # Appendix H.3
    MINI: Preset(caption_column="prompt", validation_dataset=HELDOUT, model=MINI),
    ANIMALS: Preset(
        subjects=ANIMAL_SUBJECTS,
        caption_column="prompt",
        validation_dataset=ANIMALS_HELDOUT,
        model=MINI,
    ),
}


def complete(values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Fill in what was not given, of what only images have.

    Args:
        values: every option's value or default.
        given: names of the options that the user gave.

    Raises:
        UserError: the file of validation prompts, or of settings for bitsandbytes, can't be read.
    """
    values = dict(values)
    for name in ("instance_data_dir", "class_data_dir"):
        if values[name] in BUILT_IN:
            values[name] = f"./{values[name]}"  # a folder of that name, not the built-in set
    _apply_preset(values, given)
    if values["bnb_quantization_config_path"] is not None:
        values["quantize"] = quantization(values["bnb_quantization_config_path"])
    for one, other in (BATCH, BATCH[::-1]):
        if one in given and other not in given:
            values[other] = 1
    if values["num_train_epochs"] is None and values["max_train_steps"] is None:
        values["max_train_steps"] = TABLE_A8_STEPS
    words = re.split(r"[\s,+]+", " ".join(values["lora_layers"]))
    words = list(dict.fromkeys(filter(None, words)))
    values["lora_layers"] = [] if words == [ATTENTION] else words  # as where nothing is given
    model = values["pretrained_model_name_or_path"]
    return _for_model(values, given, describe(model, values["revision"], values["cache_dir"]))


def _for_model(values: dict[str, Any], given: frozenset[str], model: BaseModel) -> dict[str, Any]:
    """Fill in what depends on the base model, and refuse what it can't take."""
    family, folder = model.family, folder_of(model.name)
    values["pipeline"], values["told_guidance"] = (
        model.pipeline,
        family.told_guidance(model.configs),
    )
    if "output_kohya_format" not in given:  # which is for adapters, and written for SDXL alone
        values["output_kohya_format"] = values["method"] != "full" and not family.flow
    if values["train_text_encoder"] and values["text_encoder_lr"] is None:
        prodigy = values["optimizer"] == "prodigy"
        values["text_encoder_lr"] = values["learning_rate"] if prodigy else TEXT_ENCODER_LR
    if model.name == FLOW and "max_sequence_length" not in given:
        values["max_sequence_length"] = FLOW_TOKENS
    overflows = model.name == SDXL_BASE and values["mixed_precision"] == "fp16"
    if values["pretrained_vae_model_name_or_path"] is None and overflows:
        values["pretrained_vae_model_name_or_path"] = FP16_FIX
    side = values["resolution"] = values["resolution"] or model.side
    for edge in {e for size in sizes(side, values["aspect_ratio_buckets"]) for e in size}:
        family.require_resolution(edge, model.configs)
    if values["gradient_checkpointing"] is None:  # worth its time on CUDA from 512 pixels on
        large = side >= CHECKPOINTING_FROM
        values["gradient_checkpointing"] = large and device_type() == "cuda"
    variant, weights = values["variant"], folder and folder / family.denoiser
    if variant is not None and weights and not any(weights.glob(f"*.{variant}*.safetensors")):
        raise UserError(f'--variant "{variant}" is not among the files of "{model.name}": drop it.')
    return values


def _apply_preset(values: dict[str, Any], given: frozenset[str]) -> None:
    preset = PRESETS.get(values["dataset_name"] or "")
    first = [values["validation_prompt"]] if values["validation_prompt"] else []
    values["validation_prompts"] = first + _prompts(values["validation_prompts"])
    if values["final_validation_prompt"] and not values["validation_prompts"]:
        values["validation_prompts"] = [values["final_validation_prompt"]]
        if "validation_epochs" not in given:
            values["validation_epochs"] = None  # at the end alone
    if preset is not None:
        # An instance prompt that is given is meant to be used, so captions give way to it.
        if not given & {"caption_column", "instance_prompt"}:
            values["caption_column"] = preset.caption_column
        if "instance_prompt" not in given:
            values["instance_prompt"] = preset.instance_prompt
        if not given & {"validation_prompt", "validation_prompts", "final_validation_prompt"}:
            values["validation_prompts"] = preset.validation_prompts
            if "num_validation_images" not in given:
                values["num_validation_images"] = preset.num_validation_images
        if "validation_dataset" not in given:
            values["validation_dataset"] = preset.validation_dataset
        if preset.model and "pretrained_model_name_or_path" not in given:
            values["pretrained_model_name_or_path"] = preset.model
    if values["validation_dataset"] == "none":
        values["validation_dataset"] = None


def _prompts(given: list[str]) -> list[str]:
    if len(given) != 1 or not is_file(Path(given[0])):
        return list(given)
    name = f'--validation_prompts "{given[0]}"'
    lines = read_text(Path(given[0]), name, MOST_PROMPT_BYTES).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{name} is an empty file: write one prompt on each line.")
    return prompts


def check_inputs(values: dict[str, Any]) -> None:
    """Refuse images without a prompt, folders that are empty or hold something else, and malformed
    ids.

    Raises:
        UserError: one sentence with the option, its value and the fix.
    """
    _check_cache(values["disk_cache"])
    if values["validation_part"] is not None:
        read_part(values["validation_part"])
    for name in ("pretrained_vae_model_name_or_path", "dataset_name", "validation_dataset"):
        if values[name] is not None and values[name] not in BUILT_IN:
            what = "an autoencoder" if "vae" in name else "images"
            _check_folder_or_id(f"--{name}", values[name], what)
    if values["instance_data_dir"] is not None:
        _check_folder("--instance_data_dir", values["instance_data_dir"])
    if values["class_data_dir"] is not None:
        _check_class_folder(values)
    if values["hub_model_id"] is not None:
        folder_or_id(values["hub_model_id"], "--hub_model_id")
    source = str(values["dataset_name"] or values["instance_data_dir"])
    bare = values["caption_column"] is None and not values["instance_prompt"]
    if bare and not _has_captions(source):
        raise UserError(
            f'"{source}" has no prompt: add --instance_prompt, for example "a photo of TOK dog",'
            " --caption_column, or a .txt file with its caption beside each image."
        )


def cache_folder(value: str) -> Path | None:
    """The folder that a ``--disk_cache`` means, which need not exist; None for none."""
    if value in (CACHE_AUTO, "no"):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / CACHE if value == CACHE_AUTO else None
    return Path(value).expanduser()


def _check_cache(value: str) -> None:
    """Refuse a folder that was asked for and can't be written; one by default is only missed.

    Raises:
        UserError: a file lies there, or it may not be written.
    """
    shown, place = f"--disk_cache {quoted(value)}", cache_folder(value)
    if not value.strip():
        raise UserError(f"{shown} names no folder: give one, auto, or no.")
    if place is None or value == CACHE_AUTO:
        return
    existing = next(path for path in (place, *place.absolute().parents) if os.path.lexists(path))
    if not is_folder(existing):
        what = "is a file" if existing == place else f"lies below {existing}, which is a file"
        raise UserError(f"{shown} {what}: give a folder, auto, or no.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{shown} is not writable: change its permissions, give another, or no.")


def _has_captions(place: str) -> bool:
    """Whether a folder has captions beside images; an image without is found when it is opened."""
    from .listing import look

    folder = Path(place).expanduser()
    return is_folder(folder) and look(folder).has_captions()


def _check_folder_or_id(flag: str, value: str, what: str = "images") -> None:
    if folder_or_id(value, flag) is not None:
        _check_folder(flag, value, what)


def _check_folder(flag: str, value: str, what: str = "images") -> None:
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f'{flag} "{value}" does not exist: correct the path.')
    if not path.is_dir():
        raise UserError(f'{flag} "{value}" is a file: give the folder that holds it.')
    try:
        empty = not any(path.iterdir())
    except OSError as error:
        raise UserError(f'{flag} "{value}" may not be read: change its permissions.') from error
    if empty:
        raise UserError(f'{flag} "{value}" is an empty folder: put {what} into it.')


def _check_class_folder(values: dict[str, Any]) -> None:
    value = values["class_data_dir"]
    path = Path(value).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f'--class_data_dir "{value}" is a file: give a folder.')
    for other in ("instance_data_dir", "dataset_name"):
        if values[other] and path.resolve() == Path(values[other]).expanduser().resolve():
            raise UserError(
                f'--class_data_dir "{value}" is the folder of the training images: give the class'
                " images a folder of their own."
            )
