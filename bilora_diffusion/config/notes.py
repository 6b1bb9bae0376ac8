"""Lines at the start of a run: options that have no effect, and defaults that might surprise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..core.fields import default_of, option_of, options_of
from .constraints import fact_text
from .rates import LOW_PRODIGY_RATE
from .run import RunConfig

Config = TypeVar("Config", bound=RunConfig)


def without_ignored_options(cfg: Config, groups: Sequence[type]) -> tuple[Config, list[str]]:
    """Take back the given options of these groups that have no effect.

    So the run's record does not claim them. As in diffusers' script they are not refused: that is
    only what would give a wrong result.

    Returns:
        The configuration without them, and a sentence for each.
    """
    changes: dict[str, Any] = {}
    notes: list[str] = []
    for name, field in options_of(groups).items():
        value = getattr(cfg, name)
        if name not in cfg.given_options or value == default_of(field):
            continue
        for case in option_of(field).ignored:
            # Each case sees all options as they were given, also those that are ignored.
            if case.when(vars(cfg)):
                changes[name] = getattr(cfg, case.becomes) if case.becomes else default_of(field)
                fix = case.fix.replace("`", "")
                notes.append(f"{fact_text(name, value)} has no effect {case.where}: {fix}.")
                break
    return replace(cfg, **changes), notes


def notes_on_defaults(cfg: RunConfig) -> list[str]:
    """A sentence for each default that follows from what was given and might surprise."""
    notes: list[str] = []
    steps = cfg.validation_loss_steps
    if steps and cfg.depends_on_heldout and "validation_loss_steps" not in cfg.given_options:
        notes.append(
            f"the held-out loss is measured every {steps} steps: change it with"
            " --validation_loss_steps."
        )
    if "rank" in cfg.given_options and "lora_alpha" not in cfg.given_options:
        notes.append(
            f"--rank {cfg.rank} comes with --lora_alpha {cfg.lora_alpha:g}, the paper's ratio: for"
            f" diffusers' add --lora_alpha {cfg.rank}."
        )
    if cfg.optimizer == "prodigy" and cfg.learning_rate <= LOW_PRODIGY_RATE:
        notes.append(
            f"{fact_text('learning_rate', cfg.learning_rate)} is low for prodigy, which multiplies"
            " it with a rate of its own: 1.0 is usual."
        )
    has_warmup = cfg.lr_warmup_steps or cfg.warmup_ratio
    if cfg.lr_scheduler == "constant_with_warmup" and not has_warmup:
        notes.append("--lr_scheduler constant_with_warmup has no warm-up: add --lr_warmup_steps.")
    if cfg.use_dora and cfg.output_kohya_format:
        notes.append(
            "--use_dora: the file for diffusers is read as trained, the one for ComfyUI nearly so"
            " from version 0.3.30 on, and not by A1111, as the model card says in full."
        )
    return notes
