"""Defaults that depend on other options, on the machine, or on a well-known data set."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import mini
from ..errors import UserError
from ..files import is_file, read_text
from ..image.inputs import SDXL_BASE

MINI = "mini"
HELDOUT = "mini-heldout"
BUILT_IN = (MINI, HELDOUT)
ICONS = "linoyts/3d_icon"
FP16_FIX = "madebyollin/sdxl-vae-fp16-fix"
SUBJECTS = ("rabbit", "cloud", "lion", "droplet", "frog", "sun")
"""The six subjects of the paper's Table 4; they are in no training set."""

TABLE_A8_STEPS = 500
BATCH = ("train_batch_size", "gradient_accumulation_steps")
"""Whoever gives one of them means a step of that many images, whatever the default of the other."""
TEXT_ENCODER_LR = 5e-6
CHECKPOINTING_FROM = 512
MOST_PROMPT_BYTES = 1_000_000


@dataclass(frozen=True)
class Preset:
    """What a well-known set brings along; each value gives way to one that the user gives."""

    instance_prompt: str = "a TOK icon, in the style of TOK"
    validation_prompts: tuple[str, ...] = tuple(
        f"a TOK icon of a {subject}, in the style of TOK" for subject in SUBJECTS
    )
    num_validation_images: int = 1
    caption_column: str | None = None
    validation_dataset: str | None = None
    model: str | None = None


PRESETS = {
    ICONS: Preset(),  # Appendix H.3
    MINI: Preset(caption_column="prompt", validation_dataset=HELDOUT, model=MINI),
}


def resolve(values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Fill in what was not given.

    Args:
        values: every option's value or default.
        given: names of the options that the user gave.

    Raises:
        UserError: accelerate was launched in a precision that training does not have, or the file
            of validation prompts can't be read.
    """
    values = dict(values)
    for name in ("instance_data_dir", "class_data_dir"):
        if values[name] in BUILT_IN:
            values[name] = f"./{values[name]}"  # a folder of that name, not the built-in set
    _apply_preset(values, given)
    for one, other in (BATCH, BATCH[::-1]):
        if one in given and other not in given:
            values[other] = 1
    if values["num_train_epochs"] is None and values["max_train_steps"] is None:
        values["max_train_steps"] = TABLE_A8_STEPS
    if values["method"] == "full" and "output_kohya_format" not in given:
        values["output_kohya_format"] = False  # kohya's format is for adapters
    values = resolve_training(values, given)
    if values["train_text_encoder"] and values["text_encoder_lr"] is None:
        prodigy = values["optimizer"] == "prodigy"
        values["text_encoder_lr"] = values["learning_rate"] if prodigy else TEXT_ENCODER_LR
    if (
        values["pretrained_vae_model_name_or_path"] is None
        and values["pretrained_model_name_or_path"] == SDXL_BASE
        and values["mixed_precision"] == "fp16"
    ):
        values["pretrained_vae_model_name_or_path"] = FP16_FIX
    if values["resolution"] is None:
        values["resolution"] = pipeline_side(values["pretrained_model_name_or_path"])
    return values


def resolve_training(values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Fill in what every script has: the adapter's scale, the radius, optimizer and precision.

    Raises:
        UserError: accelerate was launched in a precision that training does not have.
    """
    values = {**values, "optimizer": values["optimizer"].lower()}
    if values["lora_alpha"] is None:
        values["lora_alpha"] = 2.0 * values["rank"]
    if values["rho"] is None:
        from ..methods import default_rho  # here, so that --help does not wait for torch

        values["rho"] = default_rho(values["method"])
    if values["optimizer"] == "prodigy" and "learning_rate" not in given:
        values["learning_rate"] = 1.0  # Prodigy estimates the rate; this is a factor on it
    values["mixed_precision"] = values["mixed_precision"] or default_precision()
    if "report_to" not in given and not is_installed(values["report_to"]):
        values["report_to"] = "none"
    return values


def _apply_preset(values: dict[str, Any], given: frozenset[str]) -> None:
    preset = PRESETS.get(values["dataset_name"] or "")
    prompts = ([values["validation_prompt"]] if values["validation_prompt"] else []) + _prompts(
        values["validation_prompts"]
    )
    values["validation_prompts"] = prompts
    if preset is not None:
        # An instance prompt that is given is meant to be used, so captions give way to it.
        if not given & {"caption_column", "instance_prompt"}:
            values["caption_column"] = preset.caption_column
        if "instance_prompt" not in given:
            values["instance_prompt"] = preset.instance_prompt
        if not given & {"validation_prompt", "validation_prompts"}:
            values["validation_prompts"] = list(preset.validation_prompts)
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
    text = read_text(Path(given[0]), f'--validation_prompts "{given[0]}"', MOST_PROMPT_BYTES)
    lines = text.splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(
            f'--validation_prompts "{given[0]}" is an empty file: write one prompt on each line.'
        )
    return prompts


def is_installed(package: str) -> bool:
    """Whether a top-level package can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def device_type() -> str:
    """The kind of device that accelerate will train on: cuda, mps, xpu, ... or cpu."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        return "cpu"
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device else "cpu"


def default_precision() -> str:
    """What accelerate launch was told, else the best that the device has.

    ``accelerate launch`` says "no" where nobody chose, so "no" counts as not told.

    Raises:
        UserError: it was told a precision that training does not have.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if told in ("fp16", "bf16"):
        return told
    if told != "no":
        raise UserError(
            f'accelerate is set to mixed precision "{told}", which training does not have:'
            " give --mixed_precision bf16, fp16 or no."
        )
    if device_type() != "cuda":
        return "no"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def default_checkpointing(resolution: int) -> bool:
    """Gradient checkpointing is worth its time on CUDA from 512 pixels on."""
    return resolution >= CHECKPOINTING_FROM and device_type() == "cuda"


def pipeline_folder(model: str) -> Path | None:
    """The local folder that a model name stands for, or None for a hub id."""
    folder = mini.pipeline_dir() if model == MINI else Path(model).expanduser()
    return folder if folder.is_dir() else None


def pipeline_side(model: str) -> int | None:
    """Pixels a side that a model was made for; None where only loading it will tell."""
    if model == SDXL_BASE:
        return 1024
    folder = pipeline_folder(model)
    if folder is None:
        return None
    try:
        unet, vae = (
            json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
            for part in ("unet", "vae")
        )
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return None
