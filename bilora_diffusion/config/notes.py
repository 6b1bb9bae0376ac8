"""What is said about options before training: those without effect, and defaults worth a word.

An option that has no effect beside others is set aside with one line, as diffusers' script warns of
it or passes over it; refused is only what would give a wrong result (``combinations``, ``checks``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .resolve import BUILT_IN, pipeline_folder

logger = logging.getLogger(__name__)
LOW_FOR_PRODIGY = 0.1


@dataclass(frozen=True)
class Idle:
    """Options that have no effect where a condition holds.

    Args:
        options: their names; those that a script does not have are passed over.
        when: whether they are without effect, from all options' values.
        where: a clause that follows "has no effect".
        fix: what to do about it, in the imperative, with options in backquotes.
        becomes: the option whose value they take then; None for their default.
    """

    options: tuple[str, ...]
    when: Callable[[Mapping[str, Any]], bool]
    where: str
    fix: str
    becomes: str | None = None


def _is_not(option: str, wanted: Any) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: values.get(option) != wanted


def _is(option: str, unwanted: Any) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: values.get(option) == unwanted


def _no_heldout_rows(values: Mapping[str, Any]) -> bool:
    return "task" in values and not values["task"] and not values["validation_file"]


def _one_configuration(values: Mapping[str, Any]) -> bool:
    return bool(values.get("instance_data_dir")) or values.get("dataset_name") in BUILT_IN


def _local_model(values: Mapping[str, Any]) -> bool:
    model = values.get("pretrained_model_name_or_path")
    other = values.get("pretrained_vae_model_name_or_path")
    return model is not None and other is None and pipeline_folder(model) is not None


IDLE: tuple[Idle, ...] = (
    Idle(
        (
            "class_data_dir",
            "class_prompt",
            "num_class_images",
            "prior_loss_weight",
            "prior_generation_precision",
            "sample_batch_size",
        ),
        _is_not("with_prior_preservation", True),
        "without prior preservation",
        "add `--with_prior_preservation` or drop it",
    ),
    Idle(
        (
            "prodigy_beta3",
            "prodigy_decouple",
            "prodigy_use_bias_correction",
            "prodigy_safeguard_warmup",
        ),
        _is_not("optimizer", "prodigy"),
        "on AdamW",
        "add `--optimizer prodigy` or drop it",
    ),
    Idle(
        ("use_8bit_adam",),
        _is("optimizer", "prodigy"),
        "on prodigy",
        "use `--optimizer AdamW` or drop it",
    ),
    Idle(
        ("text_encoder_lr", "adam_weight_decay_text_encoder"),
        _is_not("train_text_encoder", True),
        "on frozen text encoders",
        "add `--train_text_encoder` or drop it",
    ),
    Idle(
        ("text_encoder_lr",),
        lambda values: (
            values["optimizer"] == "prodigy"
            and values.get("text_encoder_lr") != values["learning_rate"]
        ),
        "on prodigy, which has one rate for all",
        "give `--learning_rate` alone",
        becomes="learning_rate",
    ),
    Idle(
        ("lr_warmup_steps", "warmup_ratio"),
        _is("lr_scheduler", "constant"),
        "on a constant learning rate",
        "use `--lr_scheduler constant_with_warmup` or drop it",
    ),
    Idle(
        ("lr_num_cycles",),
        _is_not("lr_scheduler", "cosine_with_restarts"),
        "on this course of the rate",
        "use `--lr_scheduler cosine_with_restarts` or drop it",
    ),
    Idle(
        ("lr_power",),
        _is_not("lr_scheduler", "polynomial"),
        "on this course of the rate",
        "use `--lr_scheduler polynomial` or drop it",
    ),
    Idle(
        ("num_train_epochs",),
        lambda values: values["max_train_steps"] is not None,
        "beside the number of steps, which counts",
        "drop `--max_train_steps` or the epochs",
    ),
    Idle(
        ("snr_weighting",),
        _is("snr_gamma", None),
        "on an unweighted loss",
        "add `--snr_gamma 5` or drop it",
    ),
    Idle(
        ("num_validation_images", "validation_epochs"),
        lambda values: (
            "validation_prompts" in values
            and not values["validation_prompts"]
            and values["num_validation_images"] > 0
        ),
        "without a prompt",
        "add `--validation_prompt` or drop it",
    ),
    Idle(
        ("validation_loss_steps",),
        lambda values: "validation_dataset" in values and not values["validation_dataset"],
        "without held-out images",
        "add `--validation_dataset` or drop it",
    ),
    Idle(
        (
            "validation_loss_steps",
            "validation_epochs",
            "eval_on_start",
            "eval_train_samples",
            "max_predictions",
        ),
        _no_heldout_rows,
        "without held-out rows",
        "add `--validation_file` or drop it",
    ),
    Idle(
        ("dataset_config_name",),
        _one_configuration,
        "on a folder or a built-in set, which has one",
        "drop it",
    ),
    Idle(
        ("image_column",),
        lambda values: bool(values.get("instance_data_dir")),
        "on a folder, whose images are files",
        "drop it",
    ),
    Idle(
        ("revision",),
        _local_model,
        "on a local model",
        "give a hub id or drop it",
    ),
    Idle(
        ("dynamics_steps",),
        _is_not("log_dynamics", True),
        "on a run that records none",
        "add `--log_dynamics` or drop it",
    ),
    Idle(
        ("ema_decay",),
        _is_not("use_ema", True),
        "without an average",
        "add `--use_ema` or drop it",
    ),
    Idle(
        ("lora_ga_samples",),
        _is_not("init_lora_weights", "lora-ga"),
        "on this start",
        "use `--init_lora_weights lora-ga` or drop it",
    ),
    Idle(
        ("hub_token", "hub_model_id"),
        _is_not("push_to_hub", True),
        "without an upload",
        "add `--push_to_hub` or drop it",
    ),
)


def set_aside(
    values: Mapping[str, Any], given: frozenset[str], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Take back the options that have no effect, so that the run's record does not claim them.

    Args:
        values: every option, completed by ``resolve``.
        given: names of the options that the user gave.
        defaults: every option as it is when not given.

    Returns:
        The values that hold, and a sentence for each option that was taken back.
    """
    kept, notes = dict(values), []
    for entry in IDLE:
        for name in entry.options:
            changed = name in given and values[name] != defaults[name]
            if changed and kept[name] == values[name] and entry.when(values):
                kept[name] = values[entry.becomes] if entry.becomes else defaults[name]
                fix = entry.fix.replace("`", "")
                notes.append(f"{said(name, values)} has no effect {entry.where}: {fix}.")
    return kept, notes


def remarks(values: Mapping[str, Any], given: frozenset[str]) -> list[str]:
    """A sentence for each default that follows from what was given and might surprise.

    Args:
        values: every option, completed by ``resolve``.
        given: names of the options that the user gave.
    """
    notes = []
    if "rank" in given and "lora_alpha" not in given:
        notes.append(
            f"--rank {values['rank']} comes with --lora_alpha {values['lora_alpha']:g}, the paper's"
            f" ratio: for diffusers' add --lora_alpha {values['rank']}."
        )
    if values["optimizer"] == "prodigy" and values["learning_rate"] <= LOW_FOR_PRODIGY:
        notes.append(
            f"{said('learning_rate', values)} is low for prodigy, which multiplies it with a rate"
            " of its own: 1.0 is usual."
        )
    warm = values["lr_warmup_steps"] or values.get("warmup_ratio")
    if values["lr_scheduler"] == "constant_with_warmup" and not warm:
        notes.append("--lr_scheduler constant_with_warmup has no warm-up: add --lr_warmup_steps.")
    if values["use_dora"] and values.get("output_kohya_format"):
        notes.append(
            "--use_dora: the file for diffusers is read as trained, the one for ComfyUI nearly so"
            " from version 0.3.30 on, and not by A1111, as the model card says in full."
        )
    return notes


def tell(notes: Sequence[str]) -> None:
    """Log each note as a warning, in the main process only."""
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            logger.warning("%s", note)


def said(name: str, values: Mapping[str, Any]) -> str:
    """The option as the user wrote it, without a secret."""
    value = values[name]
    if value is True or name == "hub_token":
        return f"--{name}"
    return f'--{name} "{value}"' if isinstance(value, str) else f"--{name} {value}"
