"""Checkpoints of a run: what they save, and what must be the same to resume from one."""

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

# Options that say where the samples of a set are.
SOURCES = {
    TRAINING: frozenset({"dataset_name", "instance_data_dir", "class_data_dir", "train_file"}),
    HELDOUT: frozenset({"validation_dataset", "validation_file"}),
}


def save(trainer: Trainer, folder: Path, log: RunLog | None) -> None:
    """Write a checkpoint of the current step, and delete old ones, in the main process.

    Args:
        trainer: what is saved.
        folder: run folder.
        log: record of the main process; None in the others.
    """
    if log is not None:
        log.sync()
    cfg, scaler = trainer.cfg, trainer.accelerator.scaler
    # Each process has all that is trained, also where the base is split (`engine`).
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
    """Continue exactly where a checkpoint was written; once, on a new trainer.

    Raises:
        UserError: the checkpoint is damaged, or belongs to a run with another configuration or
            other data.
    """
    saved = checkpoint.load(path)
    with checkpoint.explain_checkpoint_errors(path):
        _require_same_run(trainer, saved)
        # In place: the optimizer and the hooks know the parameters as objects.
        load_tensors(_tensors(trainer), saved.tensors)
        # An init may have taken first values out of the base weights; here they are loaded anew.
        for target in trainer.method.targets:
            adapters.subtract_initial(target.model)
        # It replaces the dictionaries in `param_groups`, so that references to these are stale.
        trainer.optimizer.optimizer.load_state_dict(saved.optimizer)
        trainer.lr_scheduler.load_state_dict(saved.scheduler)
        if saved.scaler is not None and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(saved.scaler)
        trainer.method.load_state_dict(saved.extra["method"])
        trainer.outcome.load_state_dict(saved.extra)
        trainer.step = saved.step


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Tensors of the models and the best weights, which `load` writes in place."""
    return {**trainer.method.tensors(), **trainer.outcome.tensors()}


def _sizes(trainer: Trainer) -> dict[str, int]:
    """Sizes that follow from the options together with the data."""
    return {"step_size": trainer.layout.step_size, "num_steps": trainer.num_steps}


def _require_same_run(trainer: Trainer, saved: Checkpoint) -> None:
    """Refuse to resume from a checkpoint of other options, data or sizes."""
    cfg, sizes = trainer.cfg, _sizes(trainer)
    options = cfg.resume_settings()
    # A step has the same result however it is cut into micro-batches.
    free = {"train_batch_size", "gradient_accumulation_steps"}
    # A run may become longer where no step depends on its length. A warm-up may be a share of it.
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
    """Options of a record or a checkpoint as this version has them, without those that may change.

    An option that the version that wrote them did not have counts as having its default.

    Args:
        options: the options that were recorded.
        cfg: configuration that they are compared with.

    Raises:
        UserError: an option that was removed had an effect.
    """
    removed.require_neutral(options, depends_on_heldout=cfg.depends_on_heldout)
    known_options: dict[str, Any] = {}
    for name, field in options_of(cfg.groups).items():
        known_options[name] = default_of(field)
    known_options.pop("hub_token")  # which is never recorded
    for name, value in options.items():
        if name not in removed.OPTIONS:
            known_options[name] = value
    # Before this option was there, the samples that choose a step were made as validation images.
    if "choice_guidance_from" not in options and "validation_guidance_from" in options:
        known_options["choice_guidance_from"] = options["validation_guidance_from"]
    return cfg.fixed_options(known_options)


def holds_finished_run(folder: Path, cfg: RunConfig) -> bool:
    """Test that a folder holds a finished run of this configuration, which need not be repeated.

    Options that may change on resume, and places of data, may differ. `require_same_content`
    compares the data themselves.
    """
    if not is_finished(folder):
        return False
    try:
        recorded = recorded_options(read_run(folder)["config"], cfg)
    except UserError:  # it was trained by a removed option
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
    """Refuse to resume a run of other options, other data or another size.

    Args:
        saved: options, sizes that follow from them and from the data, and under "content" the
            record of the data.
        current: the same of this run.
        options: keys of the options.
        free: keys that may differ.
        depends_on_heldout: as `run.data.require_same_content` takes it.

    Raises:
        UserError: something differs; the sentence says what.
    """
    free = free | {"content"}
    sizes = current.keys() - set(options)
    # Equal data may have moved, or their place may be written in another way.
    for name, sources in SOURCES.items():
        if saved["content"][name]["hash"] == current["content"][name]["hash"]:
            saved = without_options(saved, sources)
            current = without_options(current, sources)
    # Options first, then the data, then the sizes: the number of steps can follow from that of the
    # samples, and the sentence names the cause.
    require_same_settings(saved, current, free | sizes)
    require_same_content(saved["content"], current["content"], depends_on_heldout)
    require_same_settings(saved, current, free)


def without_sources(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the places of data."""
    return without_options(settings, SOURCES[TRAINING] | SOURCES[HELDOUT])
