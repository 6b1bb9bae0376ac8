"""Checkpoints of a run: their content, and the conditions for resuming from one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import adapters
from ..config.run import RunConfig
from ..core import removed
from ..core.durable import strict_json
from ..core.errors import UserError
from ..core.fields import default_of, options_of
from ..run import checkpoint
from ..run.checkpoint import Checkpoint, load_tensors
from ..run.data import HELDOUT, TRAINING, require_same_content
from ..run.record import read_run
from ..run.runlog import RunLog, is_finished
from ..run.settings import describe_differences, require_same_settings, without_options
from .trainer import Trainer

# Options with the location of each set's samples.
SOURCES = {
    TRAINING: frozenset({"dataset_name", "instance_data_dir", "class_data_dir", "train_file"}),
    HELDOUT: frozenset({"validation_dataset", "validation_file"}),
}


def save(trainer: Trainer, folder: Path, log: RunLog | None) -> None:
    """Write a checkpoint of the current step and delete old ones, in the main process.

    Args:
        trainer: trainer whose state is saved.
        folder: run folder.
        log: record of the run in the main process; None in the other processes.
    """
    if log is not None:
        log.sync()
    cfg, scaler = trainer.cfg, trainer.accelerator.scaler
    # Each process has all trained parameters, even if the base is split (`engine`).
    if trainer.accelerator.is_main_process:
        saved = Checkpoint(
            step=trainer.step,
            tensors=_tensors(trainer),
            optimizer=trainer.optimizer.optimizer.state_dict(),
            scheduler=trainer.lr_scheduler.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            extra={
                **_sizes(trainer),
                "config": strict_json(cfg.to_dict())[0],
                "content": trainer.content,
                "method": trainer.method.state_dict(),
                **trainer.outcome.state_dict(),
            },
        )
        saved_folder = checkpoint.save(folder, saved)
        limit = cfg.checkpoints_total_limit
        if limit is None:
            limit = checkpoint.default_limit(saved_folder)
        if limit:
            removed_steps = checkpoint.prune(folder, limit)
            if log is not None and removed_steps:
                log.record_removed_checkpoints(removed_steps)
    trainer.accelerator.wait_for_everyone()


def load(trainer: Trainer, path: Path) -> None:
    """Restore exactly the state at which a checkpoint was written. Call it once, on a new trainer.

    Raises:
        UserError: the checkpoint is damaged, or belongs to a run with another configuration or
            other data.
    """
    saved = checkpoint.load(path)
    with checkpoint.explain_checkpoint_errors(path):
        _require_same_run(trainer, saved)
        # In place, since the optimizer and the hooks refer to the parameter objects.
        load_tensors(_tensors(trainer), saved.tensors)
        # The base weights are newly loaded, so subtract the initial values of an init again.
        for target in trainer.method.targets:
            adapters.subtract_initial(target.model)
        # This replaces the dictionaries in `param_groups`, so references to the old ones are stale.
        trainer.optimizer.optimizer.load_state_dict(saved.optimizer)
        trainer.lr_scheduler.load_state_dict(saved.scheduler)
        if saved.scaler is not None and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(saved.scaler)
        trainer.method.load_state_dict(saved.extra["method"])
        trainer.outcome.load_state_dict(saved.extra)
        trainer.step = saved.step


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return the tensors of the models and the best weights, which `load` changes in place."""
    return {**trainer.method.tensors(), **trainer.outcome.tensors()}


def _sizes(trainer: Trainer) -> dict[str, int]:
    """Return the sizes that follow from the options and the data."""
    return {"step_size": trainer.layout.step_size, "num_steps": trainer.num_steps}


def _require_same_run(trainer: Trainer, saved: Checkpoint) -> None:
    """Check that a checkpoint was written with the same options, data and sizes."""
    cfg, sizes = trainer.cfg, _sizes(trainer)
    options = cfg.resume_settings()
    # The result of a step does not depend on its division into micro-batches.
    free = {"train_batch_size", "gradient_accumulation_steps"}
    # A run may become longer if no step depends on its length. A warm-up may be a fraction of it.
    is_constant = cfg.lr_scheduler in ("constant", "constant_with_warmup")
    warmup_steps = cfg.warmup_steps(trainer.num_steps)
    has_same_warmup = cfg.warmup_steps(saved.extra["num_steps"]) == warmup_steps
    if is_constant and has_same_warmup and not trainer.method.depends_on_length:
        free |= {"max_train_steps", "num_train_epochs", "num_steps"}
    recorded = recorded_options(saved.extra["config"], cfg)
    for name in sizes:
        recorded[name] = saved.extra[name]
    require_same_work(
        {**recorded, "content": saved.extra["content"]},
        {**options, **sizes, "content": trainer.content},
        options=options.keys(),
        free=free,
        depends_on_heldout=cfg.depends_on_heldout,
    )


def recorded_options(options: Mapping[str, Any], cfg: RunConfig) -> dict[str, Any]:
    """Return recorded options as this version has them, without those that may change.

    If the recording version did not have an option yet, the option gets its default.

    Args:
        options: options from a run's record or a checkpoint.
        cfg: configuration that the options are compared with.

    Raises:
        UserError: an option that was removed since then had an effect.
    """
    removed.require_neutral(options, depends_on_heldout=cfg.depends_on_heldout)
    known_options: dict[str, Any] = {}
    for name, field in options_of(cfg.groups).items():
        known_options[name] = default_of(field)
    known_options.pop("hub_token")  # it is never recorded
    for name, value in options.items():
        if name not in removed.OPTIONS:
            known_options[name] = value
    # Before this option existed, samples for choosing a step were generated like validation images.
    if "choice_guidance_from" not in options and "validation_guidance_from" in options:
        known_options["choice_guidance_from"] = options["validation_guidance_from"]
    return cfg.fixed_options(known_options)


def holds_finished_run(folder: Path, cfg: RunConfig) -> bool:
    """Return whether a folder has a finished run of this configuration, which need not be repeated.

    Options that may change on resume and the locations of the data may differ.
    `require_same_content` compares the data themselves.
    """
    if not is_finished(folder):
        return False
    try:
        recorded = recorded_options(read_run(folder)["config"], cfg)
    except UserError:  # the run used an option that was removed since then
        return False
    return not describe_differences(
        without_sources(recorded), without_sources(cfg.resume_settings())
    )


def require_same_work(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    options: Collection[str],
    free: Set[str],
    depends_on_heldout: bool,
) -> None:
    """Check that a run to resume has the same options, data and sizes.

    Args:
        saved: recorded options, the sizes that follow from the options and the data, and under
            "content" the record of the data.
        current: the same values of this run.
        options: keys of the options.
        free: keys that may differ.
        depends_on_heldout: argument of `run.data.require_same_content`.

    Raises:
        UserError: something differs; the message names it.
    """
    free = free | {"content"}
    sizes = current.keys() - set(options)
    # The same data may have been moved, or their path may be written in another way.
    for name, sources in SOURCES.items():
        if saved["content"][name]["hash"] == current["content"][name]["hash"]:
            saved = without_options(saved, sources)
            current = without_options(current, sources)
    # Compare the options first, then the data, then the sizes: the number of steps can follow from
    # the number of samples, and the message should name the cause.
    require_same_settings(saved, current, free | sizes)
    require_same_content(saved["content"], current["content"], depends_on_heldout)
    require_same_settings(saved, current, free)


def without_sources(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without the locations of the data."""
    return without_options(settings, SOURCES[TRAINING] | SOURCES[HELDOUT])
