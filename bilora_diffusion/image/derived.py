"""Defaults of the image script that depend on other options, on the images or on the base model.

They are set after `config.derived.DERIVED_DEFAULTS`: first by `with_set_defaults`, for the run and
for each of its concepts, then by `with_model_defaults`, which applies `MODEL_DEFAULTS` at its end,
and finally by `with_choice_guidance`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..config import machine
from ..config.derived import Rule, default_text_encoder_lr, default_validation_loss_steps, derive
from ..core.errors import UserError, read_or_refuse
from ..core.files import is_file, read_text
from ..core.values import ATTENTION, EMBEDDED, EVALUATED_STRENGTH
from ..mini import ANIMALS, COLORED, FLOW, FOLDERS, MINI, find_embedded, heldout_name
from .base_model import BaseModel
from .families import SDXL
from .options import ImageOptions
from .validation import read_prompts

ICONS = "linoyts/3d_icon"
# The six subjects in the paper's Table 4, which are in no training set.
SUBJECTS = ("rabbit", "cloud", "lion", "droplet", "frog", "sun")
ANIMAL_SUBJECTS = ("penguin", "lion", "owl", "whale", "crab", "fox")  # held-out animals
TABLE_A8_STEPS = 500
# Number of tokens in place of T5's, for mini-flow, which has no T5. They are zeros, so more of them
# would only cost time.
FLOW_TOKENS = 16
CHECKPOINTING_SIDE = 512  # pixels; from here on, gradient checkpointing pays off on CUDA
PROMPT_OPTIONS = frozenset({"validation_prompt", "validation_prompts", "final_validation_prompt"})
MAX_FILE_BYTES = 1_000_000
Config = TypeVar("Config", bound=ImageOptions)


@dataclass(frozen=True)
class Preset:
    """Defaults for a well-known image set. Given options take precedence."""

    instance_prompt: str = "a TOK icon, in the style of TOK"
    subjects: tuple[str, ...] = SUBJECTS
    num_validation_images: int = 1
    caption_column: str | None = None
    validation_dataset: str | None = None
    model: str | None = None


PRESETS = {
    ICONS: Preset(),  # Appendix H.3
    MINI: Preset(caption_column="prompt", validation_dataset=heldout_name(MINI), model=MINI),
    ANIMALS: Preset(
        subjects=ANIMAL_SUBJECTS,
        caption_column="prompt",
        validation_dataset=heldout_name(ANIMALS),
        model=MINI,
    ),
}
# The same sets in other colors, with the same captions.
for _name, (_original, _) in COLORED.items():
    PRESETS[_name] = replace(PRESETS[_original], validation_dataset=heldout_name(_name))


def with_set_defaults(cfg: Config) -> Config:
    """Set the defaults that depend on the image set, for a run or a concept."""
    cfg = with_local_folders(cfg)
    cfg = with_validation_prompts(cfg)
    cfg = with_preset(cfg)
    if cfg.validation_dataset == "none":
        cfg = replace(cfg, validation_dataset=None)
    return cfg


def with_local_folders(cfg: Config) -> Config:
    """Write a folder that is named like a built-in set, such as "mini", as "./mini"."""
    # `--instance_data_dir mini` names a folder; only --dataset and --validation_dataset can name
    # built-in sets.
    for option in ("instance_data_dir", "class_data_dir"):
        folder = getattr(cfg, option)
        if folder in FOLDERS:
            cfg = replace(cfg, **{option: f"./{folder}"})
    return cfg


def with_validation_prompts(cfg: Config) -> Config:
    """Collect the validation prompts and their settings in one list each.

    The final prompt is used only if there is no other.
    """
    # One mapping of settings for each prompt.
    prompts, settings = read_prompts(lines_of_prompts(cfg.validation_prompts))
    if cfg.validation_prompt:
        first, first_settings = read_prompts([cfg.validation_prompt], "--validation_prompt")
        prompts = [*first, *prompts]
        settings = [*first_settings, *settings]
    if cfg.final_validation_prompt and not prompts:
        prompts = [cfg.final_validation_prompt]
    # Do not record empty mappings.
    if not any(settings):
        settings = []
    return replace(cfg, validation_prompts=prompts, validation_settings=settings)


def lines_of_prompts(items: list[str]) -> list[str]:
    """Return the prompts of ``--validation_prompts``, or those in the text file that it names."""
    path = Path()
    if len(items) == 1 and isinstance(items[0], str):
        path = Path(items[0])
    # An absolute path or a single word that ends in .txt is a path, even if the file does not
    # exist.
    is_file_name = path.suffix == ".txt" and len(path.name.split()) == 1
    if not path.is_absolute() and not is_file_name and not is_file(path):
        return list(items)
    name = f'--validation_prompts "{path}"'
    lines = read_text(path, name, MAX_FILE_BYTES).splitlines()
    prompts = list[str]()
    for line in lines:
        if line.strip() and line[0] != "#":  # "#" begins a comment, as in sd-scripts' files
            prompts.append(line.strip())
    if not prompts:
        raise UserError(f"{name} has no prompts: write one prompt on each line.")
    return prompts


def with_preset(cfg: Config) -> Config:
    """Set the defaults of a well-known image set, if the run uses one."""
    preset = PRESETS.get(cfg.dataset_name or "")
    if preset is None:
        return cfg
    defaults: dict[str, Any] = {
        "instance_prompt": preset.instance_prompt,
        "validation_dataset": preset.validation_dataset,
    }
    # A given instance prompt replaces the set's captions.
    if "instance_prompt" not in cfg.given_options:
        defaults["caption_column"] = preset.caption_column
    # The preset's number of images applies only to the preset's prompts.
    if not PROMPT_OPTIONS & cfg.given_options:
        prompts = [f"a TOK icon of a {subject}, in the style of TOK" for subject in preset.subjects]
        defaults["validation_prompts"] = prompts
        defaults["num_validation_images"] = preset.num_validation_images
    if preset.model is not None:
        defaults["pretrained_model_name_or_path"] = preset.model
    for name in cfg.given_options & defaults.keys():
        del defaults[name]
    return replace(cfg, **defaults)


def with_model_defaults(cfg: Config, model: BaseModel) -> Config:
    """Set the defaults that depend on the base model."""
    if cfg.bnb_quantization_config_path is not None:
        cfg = replace(cfg, quantize=quantization_of(cfg.bnb_quantization_config_path))
    cfg = replace(
        cfg,
        lora_layers=words_of_layers(cfg.lora_layers),
        pipeline=model.pipeline,
        embeds_guidance=model.family.embeds_guidance(model.configs),
        is_unguided=not model.is_guided,
        unguided_scale=model.family.unguided_scale,
        # The default is the size that the model was trained on.
        resolution=cfg.resolution or model.side,
    )
    return derive(cfg, MODEL_DEFAULTS)


def with_choice_guidance(cfg: Config, sampled_model: BaseModel) -> Config:
    """Set the default of ``--choice_guidance_from``, for the samples of ``--choose_by samples``.

    Args:
        sampled_model: the model that generates the validation images.
    """
    if "choice_guidance_from" in cfg.given_options:
        return cfg
    guidance_from = cfg.validation_guidance_from
    _, guidance = sampled_model.usual_sampling
    if cfg.validation_guidance_scale is not None:
        guidance = cfg.validation_guidance_scale
    is_guided = sampled_model.family.is_guided(guidance, sampled_model.index, sampled_model.configs)
    is_in_adapter = cfg.method != "full" and cfg.init_lora_weights not in ("pissa", "lora-ga")
    if "validation_guidance_from" not in cfg.given_options and is_guided and is_in_adapter:
        guidance_from = EVALUATED_STRENGTH
    return replace(cfg, choice_guidance_from=guidance_from)


def quantization_of(path: str) -> str:
    """Return "nf4" if a bitsandbytes configuration file, as in diffusers' scripts, selects NF4.

    The file's choice of double quantization is ignored: ``--quantize nf4`` always uses it. The
    compute dtype follows ``--mixed_precision``, as in diffusers' scripts.

    Raises:
        UserError: the file can't be read, does not select NF4, or has an unsupported setting.
    """
    label = f'--bnb_quantization_config_path "{path}"'
    fix = "or use --quantize nf4 instead"
    file = Path(path).expanduser()
    settings = read_or_refuse(
        label, f"correct it, {fix}", lambda: json.loads(read_text(file, label, MAX_FILE_BYTES))
    )
    # The fields of transformers' BitsAndBytesConfig.
    is_nf4 = (
        isinstance(settings, dict)
        and settings.get("load_in_4bit") is True
        and settings.get("bnb_4bit_quant_type") == "nf4"
    )
    if not is_nf4:
        raise UserError(
            f"{label} does not select NF4, the only quantization that is supported: set"
            f' load_in_4bit to true and bnb_4bit_quant_type to "nf4" in it, {fix}.'
        )
    if settings.get("load_in_8bit") or settings.get("llm_int8_skip_modules"):
        raise UserError(
            f"{label} has load_in_8bit or llm_int8_skip_modules, which are not supported: remove"
            f" them, {fix}."
        )
    return "nf4"


def words_of_layers(values: list[str]) -> list[str]:
    """Return the distinct words of ``--lora_layers``; [] for the default, attention."""
    # Commas and plus signs separate words too: "attention, feed-forward", "attention+feed-forward".
    words = re.split(r"[\s,+]+", " ".join(values))
    words = list(dict.fromkeys(filter(None, words)))
    # The default is always [], so that runs with and without the word count as equal.
    if words == [ATTENTION]:
        return []
    return words


def default_gradient_accumulation_steps(cfg: ImageOptions) -> int:
    """Return 1 if the batch size is given: it is then the images per step and process."""
    if "train_batch_size" in cfg.given_options:
        return 1
    return cfg.gradient_accumulation_steps


def default_max_train_steps(cfg: ImageOptions) -> int | None:
    """Return the steps of Table A8; None if ``--num_train_epochs`` is given."""
    if cfg.num_train_epochs is None:
        return TABLE_A8_STEPS
    return None


def default_output_kohya_format(cfg: ImageOptions) -> bool:
    """Return whether an adapter of SDXL is trained, the only model with kohya's format here."""
    return cfg.method != "full" and cfg.pipeline == SDXL


def default_max_sequence_length(cfg: ImageOptions) -> int | None:
    """Return 16 for mini-flow; None for other models, which have their family's default."""
    if cfg.pretrained_model_name_or_path == FLOW:
        return FLOW_TOKENS
    return None


def default_image_model(cfg: ImageOptions) -> str:
    """Return the embedded scorer for the miniatures, and the option's default for other models."""
    if find_embedded(cfg.pretrained_model_name_or_path) is not None:
        return EMBEDDED
    return cfg.image_model


def default_validation_guidance_scale(cfg: ImageOptions) -> float | None:
    """Return the scale without guidance for a guided target, which already includes guidance.

    Otherwise return None, for the model's default.
    """
    if cfg.guided_target > 1:
        return cfg.unguided_scale
    return None


def default_gradient_checkpointing(cfg: ImageOptions) -> bool:
    """Return whether the training images are large and the device is a CUDA GPU."""
    return cfg.resolution >= CHECKPOINTING_SIDE and machine.device_type() == "cuda"


# The defaults are set in this order, so each function can read the values above it.
MODEL_DEFAULTS: tuple[Rule[ImageOptions], ...] = (
    ("gradient_accumulation_steps", default_gradient_accumulation_steps),
    ("max_train_steps", default_max_train_steps),
    ("output_kohya_format", default_output_kohya_format),
    ("text_encoder_lr", default_text_encoder_lr),
    ("max_sequence_length", default_max_sequence_length),
    ("gradient_checkpointing", default_gradient_checkpointing),
    ("image_model", default_image_model),
    ("validation_guidance_scale", default_validation_guidance_scale),
    ("validation_loss_steps", default_validation_loss_steps),
)
