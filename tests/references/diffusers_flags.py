"""Meaning of a command line of diffusers' train_dreambooth_lora_sdxl.py (0.42), there and here."""

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
    """The training that a command line asks for: images of a step over all processes, steps, begun
    passes over the data, the adapters' alpha, rates before their course (None if frozen), steps in
    which they rise, and the factor on them at each step.
    """

    batch: int
    steps: int
    epochs: int
    alpha: float
    rate: float
    text_encoder_rate: float | None
    warmup: int
    course: tuple[float, ...]


def default_here(values: Mapping[str, Any], given_names: frozenset[str]) -> dict[str, Any]:
    """Defaults of flags that are not given, where diffusers has another."""
    defaults = {
        "train_batch_size": 1,
        "max_train_steps": 500,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1.0 if values["optimizer"].lower() == "prodigy" else 2e-4,
        "lr_warmup_steps": 0,
        "lora_alpha": 2.0 * values["rank"],
    }
    instead = {
        "max_train_steps": "num_train_epochs",
        "gradient_accumulation_steps": "train_batch_size",
    }
    return {n: v for n, v in defaults.items() if not given_names & {n, instead.get(n)}}


def refuses(values: Mapping[str, Any]) -> bool:
    """Test that the script ends with an error (of what the tests draw)."""
    lacks = None in (values["class_data_dir"], values["class_prompt"])
    both = values["do_edm_style_training"] and values["snr_gamma"] is not None
    return both or (values["with_prior_preservation"] and lacks)


def meaning(values: Mapping[str, Any], images: int, class_images: int, processes: int) -> Meaning:
    """The script's training with these values of all flags, and ``lora_alpha`` where it had it;
    ``class_images`` is the number of files in the class folder.
    """
    length = images * values["repeats"]
    if values["with_prior_preservation"]:
        length = max(length, min(class_images, values["num_class_images"]))
    batches = math.ceil(math.ceil(length / values["train_batch_size"]) / processes)
    updates = math.ceil(batches / values["gradient_accumulation_steps"])
    steps = values["max_train_steps"]
    if steps is None:
        steps = values["num_train_epochs"] * updates
    batch = values["train_batch_size"] * values["gradient_accumulation_steps"] * processes
    rate = values["learning_rate"] * (batch if values["scale_lr"] else 1)
    prodigy = values["optimizer"].lower() == "prodigy"
    text_encoder_rate = None
    if values["train_text_encoder"]:
        text_encoder_rate = rate if prodigy else values["text_encoder_lr"]
    warmup = 0 if values["lr_scheduler"] == "constant" else values["lr_warmup_steps"]
    return Meaning(
        batch,
        steps,
        math.ceil(steps / updates),
        values.get("lora_alpha", values["rank"]),
        rate,
        text_encoder_rate,
        warmup,
        tuple(_factor(values, step, warmup, steps) for step in range(steps)),
    )


def _factor(values: Mapping[str, Any], step: int, warmup: int, steps: int) -> float:
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
    end = 1e-7 / (1.0 if values["optimizer"].lower() == "prodigy" else 1e-3)
    return (1 - end) * (1 - progress) ** values["lr_power"] + end
