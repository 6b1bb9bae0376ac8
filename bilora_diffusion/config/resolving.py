"""Conversion of a command line to a run's configuration, in four steps.

parse    flags and recipe -> a typed configuration that knows which options were given
derive   `derived.DERIVED_DEFAULTS`, then the script's defaults (`RunConfig.derive_defaults`)
check    options without effect are ignored with a note; combinations, packages and paths that
         would not work are refused
freeze   learning rates are scaled for the launch (`derived.with_scaled_rates`)
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

# Maximum number of samples per optimizer step in one process.
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
# Logger of all notes on command lines (`collect_notes`).
logger = logging.getLogger(__name__)


def resolve(script: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Return the configuration of a run from its command line.

    The recipe, the models' small files and the launcher's environment variables are read, and LoRA
    files are hashed. No model weights and no data are downloaded or loaded. ``--help`` prints the
    help and exits.

    Args:
        script: class of the script's configuration.
        argv: arguments without the program's name; None for ``sys.argv``.

    Raises:
        UserError: a value or a combination of options would not work; the message names the fix.
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
    # Freeze. This comes last, since the messages name the rates as the user gave them.
    return with_scaled_rates(cfg, machine.processes())


@contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Collect the notes on command lines inside the context instead of printing them."""
    notes: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        notes.append(record.getMessage())
        return False  # the record is dropped

    logger.addFilter(collect)
    try:
        yield notes
    finally:
        logger.removeFilter(collect)


def recipe_options_of_other_method(
    recipe: Mapping[str, Any], flags: Mapping[str, Any]
) -> frozenset[str]:
    """Return the options that a recipe sets for its method if the command line names another one.

    A radius, for example, is a different quantity in each method, so the other method uses its
    default. A warning names each of these options.

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
                "the recipe's %s %s is for %s, so %s uses its default: change it with --%s.",
                name,
                recipe[name],
                recipe_method,
                method,
                name,
            )
    return frozenset(dropped)


def with_optimizer_name(cfg: Config) -> Config:
    """Return the configuration with the optimizer's name in lower case.

    ``--use_8bit_adam`` becomes the name "adamw8bit".
    """
    # diffusers' scripts spell the name AdamW.
    cfg = replace(cfg, optimizer=cfg.optimizer.lower())
    if cfg.use_8bit_adam and cfg.optimizer in ("adamw", "adamw8bit"):
        return replace(cfg, optimizer="adamw8bit", use_8bit_adam=False)
    return cfg


def check_method(cfg: RunConfig) -> None:
    """Check that the methods and the optimizer exist."""
    check_choice("--method", cfg.method, methods.names())
    check_choice("--compare", cfg.compare, (*methods.names(), NO_CONTROL))
    check_choice("--optimizer", cfg.optimizer, OPTIMIZERS)


def check_packages(cfg: RunConfig) -> None:
    """Check the tracker, the required packages, the hub token and the size of a step."""
    check_choice("--report_to", cfg.report_to, (*TRACKERS, "all", "none"))
    if cfg.report_to in TRACKERS:
        machine.require(cfg.report_to, f"--report_to {cfg.report_to}")
    if cfg.quantize == "nf4":
        machine.require("bitsandbytes>=0.50", "--quantize nf4")  # older versions need CUDA
    if (package := OPTIMIZERS[cfg.optimizer].package) is not None:
        machine.require(package, f"--optimizer {cfg.optimizer}")
    if cfg.enable_xformers_memory_efficient_attention:
        machine.require("xformers", "--enable_xformers_memory_efficient_attention")
    if cfg.push_to_hub and cfg.hub_token is None:
        # Imported lazily: --help and most runs do not use the hub.
        from huggingface_hub import get_token

        if get_token() is None:
            raise UserError("--push_to_hub needs a token: run `hf auth login` or add --hub_token.")
    if cfg.train_batch_size * cfg.gradient_accumulation_steps > MAX_SAMPLES_OF_STEP:
        raise UserError(
            f"--train_batch_size {cfg.train_batch_size} times --gradient_accumulation_steps"
            f" {cfg.gradient_accumulation_steps} is over {MAX_SAMPLES_OF_STEP} samples per step:"
            " give smaller numbers."
        )


def without_ignored_options(cfg: Config, groups: Sequence[type]) -> tuple[Config, list[str]]:
    """Reset the given options that have no effect to their defaults.

    The run's record then shows only options that had an effect. As in diffusers' scripts, options
    without effect are not refused; only options that would give a wrong result are.

    Returns:
        The new configuration, and a sentence for each option that was reset.
    """
    changes: dict[str, Any] = {}
    notes: list[str] = []
    for name, field in options_of(groups).items():
        value = getattr(cfg, name)
        if name not in cfg.given_options or value == default_of(field):
            continue
        for case in option_of(field).ignored:
            # A case tests all options as they were given, including ignored ones.
            if case.when(vars(cfg)):
                changes[name] = default_of(field)
                if case.becomes:
                    changes[name] = getattr(cfg, case.becomes)
                fix = case.fix.replace("`", "")
                notes.append(f"{fact_text(name, value)} has no effect {case.where}: {fix}.")
                break
    return replace(cfg, **changes), notes


def notes_on_defaults(cfg: RunConfig) -> list[str]:
    """Return a sentence for each default, rate or setting that the user may not expect."""
    notes: list[str] = []
    steps = cfg.validation_loss_steps
    if steps and cfg.depends_on_heldout and "validation_loss_steps" not in cfg.given_options:
        notes.append(
            f"held-out samples are measured every {steps} steps: change it with"
            " --validation_loss_steps."
        )
    # In diffusers' script alpha always equals the rank.
    if "rank" in cfg.given_options and "lora_alpha" not in cfg.given_options:
        notes.append(
            f"--rank {cfg.rank} implies --lora_alpha {cfg.lora_alpha:g}, the paper's ratio: for"
            f" diffusers' ratio add --lora_alpha {cfg.rank}."
        )
    if cfg.optimizer == "prodigy" and cfg.learning_rate <= LOW_PRODIGY_RATE:
        notes.append(
            f"{fact_text('learning_rate', cfg.learning_rate)} is low for prodigy, which multiplies"
            " it by its own step size: 1.0 is usual."
        )
    if cfg.optimizer != "prodigy" and cfg.learning_rate >= HIGH_ADAMW_RATE:
        notes.append(
            f"{fact_text('learning_rate', cfg.learning_rate)} is far too high for AdamW: 1e-4 to"
            " 1e-3 is usual."
        )
    has_warmup = cfg.lr_warmup_steps or cfg.warmup_ratio
    if cfg.lr_scheduler == "constant_with_warmup" and not has_warmup:
        notes.append(
            "--lr_scheduler constant_with_warmup has no warm-up: give --lr_warmup_steps alone."
        )
    # A1111 applies `dora_scale` along another axis, as ComfyUI did before version 0.3.30.
    if cfg.use_dora and cfg.output_kohya_format:
        notes.append(
            "--use_dora: diffusers applies its file exactly as trained, ComfyUI 0.3.30 or later"
            " applies the kohya file approximately, and A1111 misreads it (see the model card)."
        )
    return notes
