"""The run folder: its content, and what a command may do in it.

A folder with ``run.json`` holds a run. In a folder without it, a file of a name that a run writes
belongs to somebody else, and is neither replaced nor deleted. The same holds for a ``README.md``
that the run did not write.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import methods
from ..core.durable import dump_json, write_text
from ..core.errors import UserError
from ..core.lora_names import (
    COMPONENTS,
    CONFIG,
    FILE_NAME,
    WEIGHTS,
    base_workflow_file_name,
    kohya_file_name,
    workflow_file_name,
)
from . import checkpoint, snapshots
from .record import CONTACT_SHEET, RUN, VALIDATION, discard_later_steps
from .runlog import CARD, ERROR, METRICS, read_run
from .settings import describe_differences

# Folder of the adapters of checkpoints.
EXPORTS = "exports"
# Folders of the models that full fine-tuning exports.
WHOLE_MODELS = (*COMPONENTS, "model")
# A folder with one of these, or with ``run.json``, holds a run.
RUN_NAMES = (METRICS, checkpoint.CHECKPOINTS, FILE_NAME, WEIGHTS, CONFIG)
# What else a run writes, and a new run deletes.
SIDE_NAMES = (CONTACT_SHEET, VALIDATION, "logs", EXPORTS, snapshots.FOLDER, ERROR)


def refuse_unusable(folder: Path) -> None:
    """Refuse a path where no run folder can be made.

    Raises:
        UserError: it, or the part of it that exists, is a file or not writable.
    """
    # The folder itself may have to be made, and folders above it.
    existing_part = folder
    while not existing_part.exists():
        existing_part = existing_part.parent
    if not existing_part.is_dir():
        raise UserError(f"{existing_part} is a file: give a folder as --output_dir")
    if not os.access(existing_part, os.W_OK | os.X_OK):
        raise UserError(f"{existing_part} is not writable: give another --output_dir")


OR_ANOTHER = "give another --output_dir, or delete it with --overwrite_output_dir"
OR_ANEW = "or start anew with --overwrite_output_dir"


def guard(
    folder: Path,
    resume: str | Path | None,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    exports_weights: bool = False,
) -> Path | None:
    """Decide whether a command may use its output folder, in which nothing is changed here.

    - Without ``resume`` a run begins in a folder that holds no run, or with ``overwrite``.
    - With ``resume`` a run is resumed from one of its checkpoints. "auto" begins a run that has
      none yet.
    - What no run wrote is never replaced.

    Args:
        folder: ``--output_dir``, which is locked and need not exist.
        resume: ``--resume_from_checkpoint``.
        settings: options that a resumed run may not change (`RunConfig.resume_settings`); a run
            that was recorded with the same ones is this run.
        overwrite: ``--overwrite_output_dir``. With a checkpoint it deletes what the run holds of
            later steps (`rewind`), without one all of the run (`clear`).
        exports_weights: whether the method exports whole models.

    Returns:
        The checkpoint to resume from; None where the run begins.

    Raises:
        UserError: the content of the folder forbids it, or the checkpoint does not exist.
    """
    foreign = _find_foreign(folder)
    if foreign is not None:
        raise UserError(
            f"{foreign} was not written by a run, which would replace it: move it away, or give"
            " another --output_dir"
        )
    record = _read_record(folder)
    has_checkpoint = checkpoint.latest(folder) is not None
    if resume is None and record is None and has_checkpoint:
        raise UserError(
            f"{folder} holds checkpoints without the run.json of their run: resume with"
            " --resume_from_checkpoint auto, move them away, or give another --output_dir"
        )
    if resume is None and record is not None and not overwrite:
        raise UserError(_describe_occupied(folder, record, settings or {}))
    if exports_weights:
        _refuse_foreign_models(folder)
    if resume is None:
        return None

    if not has_checkpoint and record is not None and record["status"] == "finished":
        raise UserError(f"{folder} holds a finished run without a checkpoint: {OR_ANOTHER}")
    chosen = checkpoint.resolve(folder, resume)
    if chosen is None:
        return None
    # A checkpoint of another run may start a run in an empty folder, but not in that of a run.
    root = folder / checkpoint.CHECKPOINTS
    is_empty = record is None and not has_checkpoint
    if not is_empty and root.resolve() not in chosen.resolve().parents:
        raise UserError(
            f"{folder} holds another run than checkpoint {chosen}: give another --output_dir, or a"
            f" checkpoint in {root}"
        )
    later_steps = [] if overwrite else checkpoint.later_steps(folder, chosen)
    if later_steps:
        later = ", ".join(f"step-{step}" for step in later_steps)
        raise UserError(
            f"{folder} holds later checkpoints than {chosen.name} ({later}): resume from the newest"
            " with --resume_from_checkpoint auto, or delete what the run holds of later steps with"
            " --overwrite_output_dir"
        )
    return chosen


def _describe_occupied(folder: Path, record: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The sentence that refuses a folder with a run: this run, or another one and its options."""
    # The record has all options.
    recorded_settings = {}
    for name in settings.keys() & record["config"].keys():
        recorded_settings[name] = record["config"][name]
    differences = describe_differences(recorded_settings, settings)
    if differences:
        return (
            f"{folder} holds another run ({differences}): continue it with"
            f" --resume_from_checkpoint auto where these options may change, {OR_ANOTHER}"
        )
    if record["status"] == "finished":
        return (
            f"{folder} holds this run, finished: make only what is missing of it with"
            f" --resume_from_checkpoint auto, {OR_ANEW}"
        )
    end = "failed" if record["status"] == "failed" else "interrupted"
    saved_steps = checkpoint.steps(folder)
    if not saved_steps:
        return (
            f"{folder} holds this run, {end} before its first checkpoint: begin it again with"
            f" --resume_from_checkpoint auto, {OR_ANEW}"
        )
    return (
        f"{folder} holds this run, {end} and saved up to step {saved_steps[-1]} of"
        f" {record['num_steps']}: resume with --resume_from_checkpoint auto, {OR_ANEW}"
    )


def _find_foreign(folder: Path) -> Path | None:
    """The first entry that a run would replace and no run wrote; None without one."""
    record = _read_record(folder)
    if record is not None:
        # All names of a run are the run's, but its card only where it wrote one.
        names = [] if record.get("card") else [CARD]
    elif checkpoint.latest(folder) is not None:
        # Checkpoints without their record: other names may be the run's too, but not these.
        names = [RUN, CARD]
    else:
        names = [RUN, *RUN_NAMES, *_names_after_folder(folder), *SIDE_NAMES, CARD]
    for name in names:
        if os.path.lexists(folder / name):
            return folder / name
    return None


def _names_after_folder(folder: Path) -> tuple[str, ...]:
    """The files that a run names after its folder: kohya's, and the workflows for ComfyUI."""
    return kohya_file_name(folder), workflow_file_name(folder), base_workflow_file_name(folder)


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The folder's ``run.json``; None where there is none, or no run wrote it.

    Raises:
        UserError: another version wrote it.
    """
    try:
        record = json.loads((folder / RUN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    # Every version of the record names its method.
    if not isinstance(record, dict) or not isinstance(record.get("method"), str):
        return None
    return read_run(folder)


def _refuse_foreign_models(folder: Path) -> None:
    """Refuse a folder in which full fine-tuning would replace models that are not its own.

    Raises:
        UserError: it holds such models.
    """
    if _trained_whole(folder):
        return
    for name in WHOLE_MODELS:
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} exists and no run of full fine-tuning wrote it, which would "
                "replace it: give another --output_dir"
            )


def _trained_whole(folder: Path) -> bool:
    """Test that the folder's run trained all weights of its models."""
    if not (folder / RUN).exists():
        return False
    method = read_run(folder)["method"]
    # A method that was removed may have written the folder; none of these trained all weights.
    return method in methods.names() and methods.get(method).exports_weights


def clear(folder: Path, overwrite: bool) -> None:
    """Delete the earlier run where `guard` lets a run begin; what no run wrote stays.

    ``run.json`` is deleted last, so that the folder is known as a run's after a crash.

    Args:
        folder: the run folder.
        overwrite: whether to delete all of the run. Otherwise it has no checkpoint, and its record
            stays until the next one replaces it.
    """
    known_names = (RUN, *RUN_NAMES, kohya_file_name(folder))
    if not any((folder / name).exists() for name in known_names):
        return
    names = [*SIDE_NAMES, METRICS, checkpoint.CHECKPOINTS, *_result_names(folder), RUN]
    kept_names = () if overwrite else (RUN, checkpoint.CHECKPOINTS)
    for name in names:
        if name not in kept_names:
            _delete(folder / name)


def rewind(folder: Path, step: int) -> None:
    """Delete the run's checkpoints and exported files of steps after that of a checkpoint.

    The log of these steps is deleted by `RunLog.start`. After a crash in between the
    run is interrupted, and resumes from its newest checkpoint.

    Args:
        folder: the run folder.
        step: step of the checkpoint that the run resumes from.
    """
    record = _read_record(folder)
    if record is not None:
        # First, since a finished run without its files would be taken for a whole one.
        record["status"] = "interrupted"
        write_text(folder / RUN, dump_json(record))
        for name in _result_names(folder):
            _delete(folder / name)
    discard_later_steps(folder / EXPORTS, step)
    # Last, so that after a crash the command is refused or repeated until all else is deleted.
    discard_later_steps(folder / checkpoint.CHECKPOINTS, step)


def _result_names(folder: Path) -> list[str]:
    """Names of what a run exports at its end; card and whole models only if they are the run's."""
    names = [FILE_NAME, WEIGHTS, CONFIG, *_names_after_folder(folder)]
    record = _read_record(folder)
    if record is not None and record.get("card"):
        names.append(CARD)
    if _trained_whole(folder):
        names.extend(WHOLE_MODELS)
    return names


def _delete(path: Path) -> None:
    """Delete a file or a folder, which need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
