"""Meaning of command lines of diffusers' train_dreambooth_lora_sdxl.py (0.42), there and here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[2] / "docs" / "diffusers_flags.yaml"
TABLES = yaml.safe_load(FILE.read_text(encoding="utf-8"))
DEFAULTS = {name: flag.get("default") for name, flag in TABLES["sdxl"].items()}


@dataclass(frozen=True)
class Meaning:
    """The training that a command line describes."""

    # Images per step, over all processes.
    batch: int
    steps: int
    # Passes over the data; the last one may be incomplete.
    epochs: int
    # Alpha of the adapters.
    alpha: float
    # Learning rates before the schedule's factor; None for frozen encoders.
    rate: float
    text_encoder_rate: float | None
    # Steps in which the rates rise.
    warmup: int
    # The schedule's factor on the rates at each step.
    course: tuple[float, ...]


def default_here(values: Mapping[str, Any], given_names: frozenset[str]) -> dict[str, Any]:
    """Return the defaults that differ from diffusers', for the flags that are not given."""
    defaults = {
        "train_batch_size": 1,
        "max_train_steps": 500,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1.0 if values["optimizer"].lower() == "prodigy" else 2e-4,
        "lr_warmup_steps": 0,
        "lora_alpha": 2.0 * values["rank"],
    }
    # A given number of epochs, or batch size, means the same as in diffusers.
    if "num_train_epochs" in given_names:
        del defaults["max_train_steps"]
    if "train_batch_size" in given_names:
        del defaults["gradient_accumulation_steps"]
    return {name: value for name, value in defaults.items() if name not in given_names}


def refuses(values: Mapping[str, Any]) -> bool:
    """Return whether diffusers' script refuses these values, among those that the tests choose."""
    if values["do_edm_style_training"] and values["snr_gamma"] is not None:
        return True
    if not values["with_prior_preservation"]:
        return False
    return values["class_data_dir"] is None or values["class_prompt"] is None


def meaning(values: Mapping[str, Any], images: int, class_images: int, processes: int) -> Meaning:
    """Return the training of diffusers' script.

    Args:
        values: values of all its flags, and of `lora_alpha` if it differs from the rank; the script
            has no such flag.
        images: number of instance images.
        class_images: number of files in the class folder.
        processes: number of processes.
    """
    length = images * values["repeats"]
    if values["with_prior_preservation"]:
        length = max(length, min(class_images, values["num_class_images"]))
    # The processes share the batches; the last update of an epoch may be smaller.
    batches = math.ceil(math.ceil(length / values["train_batch_size"]) / processes)
    updates = math.ceil(batches / values["gradient_accumulation_steps"])
    steps = values["max_train_steps"]
    if steps is None:
        steps = values["num_train_epochs"] * updates
    batch = values["train_batch_size"] * values["gradient_accumulation_steps"] * processes
    rate = values["learning_rate"] * (batch if values["scale_lr"] else 1)
    text_encoder_rate = None
    if values["train_text_encoder"]:
        is_prodigy = values["optimizer"].lower() == "prodigy"  # it has a single rate
        text_encoder_rate = rate if is_prodigy else values["text_encoder_lr"]
    warmup = 0 if values["lr_scheduler"] == "constant" else values["lr_warmup_steps"]
    return Meaning(
        batch=batch,
        steps=steps,
        epochs=math.ceil(steps / updates),
        alpha=values.get("lora_alpha", values["rank"]),
        rate=rate,
        text_encoder_rate=text_encoder_rate,
        warmup=warmup,
        course=tuple(_factor(values, step, warmup, steps) for step in range(steps)),
    )


def _factor(values: Mapping[str, Any], step: int, warmup: int, steps: int) -> float:
    """Return the factor of diffusers' schedule on the rates at a step, counted from 0."""
    kind = values["lr_scheduler"]
    if step < warmup:
        return step / max(1, warmup)
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "cosine_with_restarts":
        return 0.5 * (1 + math.cos(math.pi * (progress * values["lr_num_cycles"] % 1)))
    # Polynomial: the last factor is 1e-7 divided by the optimizer's default rate.
    default_rate = 1.0 if values["optimizer"].lower() == "prodigy" else 1e-3
    end = 1e-7 / default_rate
    return (1 - end) * (1 - progress) ** values["lr_power"] + end
