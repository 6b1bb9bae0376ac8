"""From a command line to a configuration: parse, derive, check, freeze; once for a run.

parse    flags and recipe -> a typed configuration that knows which options were given
derive   `derived.DERIVED_DEFAULTS`, then the script's defaults (`RunConfig.derive_defaults`)
check    options without effect are ignored with a note; combinations, packages and places that
         would not work are refused
freeze   the rates of the launch (`derived.with_scaled_rates`)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from .. import methods
from ..core.errors import UserError, is_main_process
from ..core.fields import default_of, option_of, options_of
from ..core.values import OPTIMIZERS, check_choice
from ..methods.options import AdapterOptions
from . import constraints, machine
from .constraints import fact_text
from .derived import DERIVED_DEFAULTS, HIGH_ADAMW_RATE, LOW_PRODIGY_RATE, derive, with_scaled_rates
from .lora_sources import read_lora_sources
from .options import NO_CONTROL
from .run import RunConfig

# Samples of one optimizer step at most, on one process.
MAX_SAMPLES_OF_STEP = 10**6
TRACKERS = (
    "tensorboard",
    "wandb",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "mlflow",
    "swanlab",
    "trackio",
)
Config = TypeVar("Config", bound=RunConfig)
# Logger of all notes on a command line (`collect_notes`).
logger = logging.getLogger(__name__)


def resolve(script: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Make the configuration of a run from a command line and what it names.

    The recipe, the small files of the models, and the variables of the launch are read; no weights
    and no data are downloaded or loaded. ``--help`` prints and exits.

    Args:
        script: class of the script's configuration.
        argv: arguments without the program's name; None for those of the process.

    Raises:
        UserError: a value or a combination that would give a wrong result; it names the fix.
    """
    values, given_options = script.parser().read(
        argv, script.alternatives, recipe_options_of_other_method
    )
    cfg = script(**{**values, "given_options": given_options})

    # Derive. The method and the optimizer come first: defaults depend on their names.
    cfg = with_optimizer_name(cfg)
    check_method(cfg)
    cfg = derive(cfg, DERIVED_DEFAULTS).derive_defaults()

    # Check. Ignored options get their defaults first, so that no constraint refuses one of them.
    cfg, notes = without_ignored_options(cfg, cfg.groups)
    notes += notes_on_defaults(cfg)
    launch = {"device": machine.device_type(), "modality": cfg.modality, **machine.launch()}
    constraints.check({**vars(cfg), **launch})
    cfg.check_inputs()
    check_packages(cfg)
    cfg = replace(cfg, lora_sources=read_lora_sources(vars(cfg)))

    if is_main_process():
        for note in notes:
            logger.warning("%s", note)
    # Freeze. It comes last, since the messages name the rates as the user gave them.
    return with_scaled_rates(cfg, machine.processes())


@contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Context manager: collects notes on command lines instead of printing them."""
    notes: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        notes.append(record.getMessage())
        return False  # the record goes no further

    logger.addFilter(collect)
    try:
        yield notes
    finally:
        logger.removeFilter(collect)


def recipe_options_of_other_method(
    recipe: Mapping[str, Any], flags: Mapping[str, Any]
) -> frozenset[str]:
    """The options that a recipe sets for its method, where the command line names another one.

    A radius, for example, is a different quantity in each method, so the other method takes its
    default. Each such option is named in a warning.

    Args:
        recipe: options of the recipe.
        flags: options of the command line.
    """
    recipe_method = recipe.get("method", AdapterOptions.method)
    method = flags.get("method", recipe_method)
    # An unknown method is refused later, with a hint (`check_method`).
    if method == recipe_method or not {recipe_method, method} <= set(methods.names()):
        return frozenset()
    # An option that the new method does not read has no effect in any case.
    shared = methods.reads(recipe_method) & methods.reads(method)
    dropped = shared & (recipe.keys() - flags.keys())
    if is_main_process():
        for name in sorted(dropped):
            logger.warning(
                "the recipe's %s %s is for %s, so %s takes its default: change it by --%s.",
                name,
                recipe[name],
                recipe_method,
                method,
                name,
            )
    return frozenset(dropped)


def with_optimizer_name(cfg: Config) -> Config:
    """The configuration with the optimizer in lower case, and ``--use_8bit_adam`` as its name."""
    # diffusers' scripts spell it AdamW.
    cfg = replace(cfg, optimizer=cfg.optimizer.lower())
    if cfg.use_8bit_adam and cfg.optimizer in ("adamw", "adamw8bit"):
        return replace(cfg, optimizer="adamw8bit", use_8bit_adam=False)
    return cfg


def check_method(cfg: RunConfig) -> None:
    """Refuse an unknown method or optimizer."""
    check_choice("--method", cfg.method, methods.names())
    check_choice("--compare", cfg.compare, (*methods.names(), NO_CONTROL))
    check_choice("--optimizer", cfg.optimizer, OPTIMIZERS)


def check_packages(cfg: RunConfig) -> None:
    """Refuse what needs a missing package, a token, or more memory than any machine has."""
    check_choice("--report_to", cfg.report_to, (*TRACKERS, "all", "none"))
    if cfg.report_to in TRACKERS:
        machine.require(cfg.report_to, f"--report_to {cfg.report_to}")
    if cfg.quantize == "nf4":
        machine.require("bitsandbytes>=0.50", "--quantize nf4")  # older ones are for CUDA only
    if (package := OPTIMIZERS[cfg.optimizer].package) is not None:
        machine.require(package, f"--optimizer {cfg.optimizer}")
    if cfg.enable_xformers_memory_efficient_attention:
        machine.require("xformers", "--enable_xformers_memory_efficient_attention")
    if cfg.push_to_hub and cfg.hub_token is None:
        # Imported late: --help and most runs do not use the hub.
        from huggingface_hub import get_token

        if get_token() is None:
            raise UserError("--push_to_hub needs a token: run `hf auth login` or add --hub_token.")
    if cfg.train_batch_size * cfg.gradient_accumulation_steps > MAX_SAMPLES_OF_STEP:
        raise UserError(
            f"--train_batch_size {cfg.train_batch_size} times --gradient_accumulation_steps"
            f" {cfg.gradient_accumulation_steps} is over {MAX_SAMPLES_OF_STEP} samples a step: give"
            " smaller ones."
        )


def without_ignored_options(cfg: Config, groups: Sequence[type]) -> tuple[Config, list[str]]:
    """Set the given options of these groups that have no effect to their defaults.

    So the run's record does not claim them. As in diffusers' scripts they are not refused: only
    what would give a wrong result is.

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
            # A case tests all options as they were given, also those that are ignored.
            if case.when(vars(cfg)):
                changes[name] = default_of(field)
                if case.becomes:
                    changes[name] = getattr(cfg, case.becomes)
                fix = case.fix.replace("`", "")
                notes.append(f"{fact_text(name, value)} has no effect {case.where}: {fix}.")
                break
    return replace(cfg, **changes), notes


def notes_on_defaults(cfg: RunConfig) -> list[str]:
    """A sentence for each derived default, and each rate, that the user may not expect."""
    notes: list[str] = []
    steps = cfg.validation_loss_steps
    if steps and cfg.depends_on_heldout and "validation_loss_steps" not in cfg.given_options:
        notes.append(
            f"held-out samples are measured every {steps} steps: change it with"
            " --validation_loss_steps."
        )
    # In diffusers' script alpha is always the rank.
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
    if cfg.optimizer != "prodigy" and cfg.learning_rate >= HIGH_ADAMW_RATE:
        notes.append(
            f"{fact_text('learning_rate', cfg.learning_rate)} is far above what trains with AdamW:"
            " 1e-4 to 1e-3 is usual."
        )
    has_warmup = cfg.lr_warmup_steps or cfg.warmup_ratio
    if cfg.lr_scheduler == "constant_with_warmup" and not has_warmup:
        notes.append("--lr_scheduler constant_with_warmup has no warm-up: add --lr_warmup_steps.")
    # A1111 reads `dora_scale` on another axis, as ComfyUI did before 2026.
    if cfg.use_dora and cfg.output_kohya_format:
        notes.append(
            "--use_dora: the file for diffusers is read as trained, the one for ComfyUI nearly so"
            " from version 0.3.30 on, and not by A1111, as the model card says in full."
        )
    return notes
