"""Meaning of a command line's model, images and prompts, and checks that these can exist."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import refusals
from ..config.machine import device_type
from ..core.choices import ATTENTION
from ..core.errors import UserError, reading
from ..core.files import (
    folder_or_id,
    is_file,
    is_folder,
    quoted,
    read_text,
)
from ..mini import ANIMALS, ANIMALS_HELDOUT, FLOW, FOLDERS, HELDOUT, MINI
from ..run.heldout_part import read_part
from .base_model import SDXL_BASE, BaseModel, describe, folder_of
from .buckets import sizes
from .listing import folder_of_set, list_folder
from .validation import read_prompts

FP16_FIX = "madebyollin/sdxl-vae-fp16-fix"
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
    """Defaults of a well-known set; each gives way to a value that the user gives."""

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
    """Fill in what was not given, of what only image models have, after `complete_images`."""
    values = dict(values)
    if values["bnb_quantization_config_path"] is not None:
        values["quantize"] = _quantization(values["bnb_quantization_config_path"])
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
    values |= {"pipeline": model.pipeline, "predicts_noise": model.predicts_noise}
    values["told_guidance"] = family.told_guidance(model.configs)
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
    edges = {e for size in sizes(side, values["aspect_ratio_buckets"]) for e in size}
    for number, settings in enumerate(values["validation_settings"], start=1):
        edges |= {settings[edge] for edge in ("width", "height") if edge in settings}
        guidance = settings.get("guidance", values["validation_guidance_scale"])
        guidance = family.guidance if guidance is None else guidance
        if settings.get("negative_prompt") and guidance <= family.unguided:
            of = settings.get("concept")
            whose = f"a prompt of {of}" if of else f"number {number} of --validation_prompts"
            raise UserError(
                f"{whose} has a negative prompt, and {family.title} reads none at a guidance of"
                f" {guidance:g}: drop it."
            )
    for edge in edges:
        family.require_resolution(edge, model.configs)
    if values["gradient_checkpointing"] is None:  # worth its time on CUDA from 512 pixels on
        large = side >= CHECKPOINTING_FROM
        values["gradient_checkpointing"] = large and device_type() == "cuda"
    variant, weights = values["variant"], folder and folder / family.denoiser
    if variant is not None and weights and not any(weights.glob(f"*.{variant}*.safetensors")):
        raise UserError(f'--variant "{variant}" is not among the files of "{model.name}": drop it.')
    return values


def complete_images(values: dict[str, Any], given: frozenset[str]) -> None:
    """Fill in what was not given of images and prompts, in place."""
    for name in ("instance_data_dir", "class_data_dir"):
        if values[name] in FOLDERS:
            values[name] = f"./{values[name]}"  # a folder of that name, not the built-in set
    preset = PRESETS.get(values["dataset_name"] or "")
    _apply_prompts(values)
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


def _apply_prompts(values: dict[str, Any]) -> None:
    prompts, settings = read_prompts(_prompts(values["validation_prompts"]))
    strengths = (s["strength"] for s in settings if s.get("strength", 1.0) != 1.0)
    facts = {name: values[name] for name in ("method", "init_lora_weights")}
    refusals.check({**facts, "strength": next(strengths, None)})
    if values["validation_prompt"]:
        prompts, settings = [values["validation_prompt"], *prompts], [{}, *settings]
    values["validation_prompts"] = prompts
    values["validation_settings"] = settings if any(settings) else []


def _prompts(given: list[Any]) -> list[Any]:
    path = Path(given[0] if len(given) == 1 and isinstance(given[0], str) else "")
    named = path.is_absolute() or (path.suffix == ".txt" and len(path.name.split()) == 1)
    if not named and not is_file(path):
        return list(given)
    name = f'--validation_prompts "{path}"'
    lines = read_text(path, name, MOST_PROMPT_BYTES).splitlines()
    prompts = [line.strip() for line in lines if line.strip() and line[0] != "#"]
    if not prompts:
        raise UserError(f"{name} is an empty file: write one prompt on each line.")
    return prompts


def _quantization(path: str) -> str:
    """ "nf4", if a file of settings for bitsandbytes, as diffusers' scripts take it, asks for it.

    It may ask for double quantization or not: ``--quantize nf4`` always quantizes twice. The dtype
    of the arithmetic follows ``--mixed_precision``, as in diffusers' scripts.
    """
    shown, fix = f'--bnb_quantization_config_path "{path}"', "or use --quantize nf4 instead"
    file = Path(path).expanduser()
    asked = reading(shown, fix, lambda: json.loads(read_text(file, shown, MOST_PROMPT_BYTES)))
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if not isinstance(asked, dict) or any(asked.get(name) != nf4[name] for name in nf4):
        raise UserError(
            f"{shown} does not ask for NF4, for which alone bitsandbytes is used: write"
            f' load_in_4bit true and bnb_4bit_quant_type "nf4" into it, {fix}.'
        )
    if asked.get("load_in_8bit") or asked.get("llm_int8_skip_modules"):
        raise UserError(
            f"{shown} has load_in_8bit or llm_int8_skip_modules, and which layers are quantized is"
            f" decided here: take that out, {fix}."
        )
    return "nf4"


def check_inputs(values: dict[str, Any]) -> None:
    """Refuse what `check_images` does, places that can't be a folder, and malformed ids."""
    if values["validation_part"] is not None:
        read_part(values["validation_part"])
    if not values["concepts"]:
        check_images(values)
    for name in ("pretrained_vae_model_name_or_path", "hub_model_id"):
        if values[name] is not None:
            folder_or_id(values[name], f"--{name}")
    cache, shown = cache_folder(values["disk_cache"]), quoted(values["disk_cache"])
    if cache is None or values["disk_cache"] == CACHE_AUTO:  # which is only missed
        return
    there = next(path for path in (cache, *cache.absolute().parents) if os.path.lexists(path))
    writable = is_folder(there) and os.access(there, os.W_OK | os.X_OK)
    if not (writable and values["disk_cache"].strip()):
        raise UserError(
            f"--disk_cache {shown} is not a folder that can be written: give another, auto, or no."
        )


def check_images(values: Mapping[str, Any]) -> None:
    """Refuse images without a prompt or a place, of a run or of a concept."""
    for name in ("dataset_name", "instance_data_dir", "validation_dataset"):
        value = values[name]
        if value is None:
            continue
        if name != "instance_data_dir":
            folder_of_set(value, f"--{name}")
        elif folder_or_id(value, f"--{name}") is None:
            raise UserError(f"--{name} {quoted(value)} does not exist: correct the path.")
    source = str(values["dataset_name"] or values["instance_data_dir"])
    folder, classes = Path(source).expanduser(), values["class_data_dir"]
    if classes is not None and Path(classes).exists():
        place = folder_or_id(classes, "--class_data_dir")
        if place is not None and place.resolve() == folder.resolve():
            raise UserError(
                f"--class_data_dir {quoted(classes)} is the folder of the training images: give the"
                " class images a folder of their own."
            )
    bare = values["caption_column"] is None and not values["instance_prompt"]
    if bare and not (is_folder(folder) and list_folder(folder).has_captions):
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
