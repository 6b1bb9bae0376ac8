"""The run folder: its content, and what a command may do in it.

A folder with ``run.json`` holds a run, and one with only checkpoints may hold one. In any other
folder, files with the names of a run's files belong to someone else and are neither replaced nor
deleted. A ``README.md`` that the run did not write is always kept.
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

# Folder of adapters that were exported from checkpoints.
EXPORTS = "exports"
# Folders of the models that full fine-tuning exports.
WHOLE_MODELS = (*COMPONENTS, "model")
# Names of a run's main files and folders besides ``run.json``.
RUN_NAMES = (METRICS, checkpoint.CHECKPOINTS, FILE_NAME, WEIGHTS, CONFIG)
# Other files and folders that a run writes, and that a new run deletes.
SIDE_NAMES = (CONTACT_SHEET, VALIDATION, "logs", EXPORTS, snapshots.FOLDER, ERROR)


def refuse_unusable(folder: Path) -> None:
    """Check that a run folder can be created at a path.

    Raises:
        UserError: the path, or the part of it that exists, is a file or not writable.
    """
    # The folder and some of its parents may not exist.
    existing_part = folder
    while not existing_part.exists():
        existing_part = existing_part.parent
    if not existing_part.is_dir():
        raise UserError(f"{existing_part} is a file: give a folder as --output_dir")
    if not os.access(existing_part, os.W_OK | os.X_OK):
        raise UserError(f"{existing_part} is not writable: give another --output_dir")


OR_ANOTHER = "give another --output_dir, or delete it with --overwrite_output_dir"
OR_ANEW = "or start again with --overwrite_output_dir"


def guard(
    folder: Path,
    resume: str | Path | None,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    exports_weights: bool = False,
) -> Path | None:
    """Check whether a command may use its output folder, without changing anything.

    - Without ``resume``, a run starts in a folder that holds no run; ``overwrite`` also allows one
      that does.
    - With ``resume``, a run continues from one of its checkpoints, or from another run's checkpoint
      if the folder holds no run. "auto" starts a run that has no checkpoint yet.
    - Files that no run wrote are never replaced.

    Args:
        folder: ``--output_dir``, which need not exist; if it does, the caller has locked it.
        resume: ``--resume_from_checkpoint``.
        settings: options that are compared with the recorded ones (`RunConfig.resume_settings`);
            if they are equal, the recorded run is this run.
        overwrite: ``--overwrite_output_dir``. With a checkpoint, the run's later steps will be
            deleted (`rewind`); without one, the whole run (`clear`).
        exports_weights: whether the method exports whole models.

    Returns:
        The checkpoint to resume from; None if the run starts at step 0.

    Raises:
        UserError: the folder's content does not allow it, or the checkpoint does not exist.
    """
    foreign = _find_foreign(folder)
    if foreign is not None:
        raise UserError(
            f"{foreign} was not written by a run, and this run would replace it: move it away, or"
            " give another --output_dir"
        )
    record = _read_record(folder)
    has_checkpoint = checkpoint.latest(folder) is not None
    if resume is None and record is None and has_checkpoint:
        raise UserError(
            f"{folder} holds checkpoints without their run's run.json: resume with"
            " --resume_from_checkpoint auto, move them away, or give another --output_dir"
        )
    if resume is None and record is not None and not overwrite:
        raise UserError(_describe_occupied(folder, record, settings or {}, has_checkpoint))
    if exports_weights:
        _refuse_foreign_models(folder)
    if resume is None:
        return None

    if not has_checkpoint and record is not None and record["status"] == "finished":
        raise UserError(
            f"{folder} holds a finished run without a checkpoint to resume from: give another"
            " --output_dir, or start again with --overwrite_output_dir and without"
            " --resume_from_checkpoint"
        )
    chosen = checkpoint.resolve(folder, resume)
    if chosen is None:
        return None
    # A new run may start from another run's checkpoint, but only in a folder without a run.
    root = folder / checkpoint.CHECKPOINTS
    is_empty = record is None and not has_checkpoint
    if not is_empty and root.resolve() not in chosen.resolve().parents:
        raise UserError(
            f"the checkpoint {chosen} does not belong to the run in {folder}: give another"
            f" --output_dir, or a checkpoint in {root}"
        )
    later_steps = [] if overwrite else checkpoint.later_steps(folder, chosen)
    if later_steps:
        later = ", ".join(f"step-{step}" for step in later_steps)
        raise UserError(
            f"{folder} holds checkpoints later than {chosen.name} ({later}): resume from the newest"
            " with --resume_from_checkpoint auto, or delete the later steps with"
            " --overwrite_output_dir"
        )
    return chosen


def _describe_occupied(
    folder: Path, record: Mapping[str, Any], settings: Mapping[str, Any], has_checkpoint: bool
) -> str:
    """Return the message for a folder with a run: this one, or one with other options."""
    # The record also has options that are not in ``settings``.
    recorded_settings = {}
    for name in settings.keys() & record["config"].keys():
        recorded_settings[name] = record["config"][name]
    differences = describe_differences(recorded_settings, settings)
    if differences:
        return (
            f"{folder} holds another run ({differences}): resume it with"
            f" --resume_from_checkpoint auto if these options may change, {OR_ANOTHER}"
        )
    if record["status"] == "finished":
        if not has_checkpoint:
            return f"{folder} holds this run, which is finished: {OR_ANOTHER}"
        return (
            f"{folder} holds this run, which is finished: export it again with"
            f" --resume_from_checkpoint auto, {OR_ANEW}"
        )
    end = "failed" if record["status"] == "failed" else "interrupted"
    saved_steps = checkpoint.steps(folder)
    if not saved_steps:
        return (
            f"{folder} holds this run, {end} before its first checkpoint: repeat it with"
            f" --resume_from_checkpoint auto, {OR_ANEW}"
        )
    return (
        f"{folder} holds this run, {end} and saved up to step {saved_steps[-1]} of"
        f" {record['num_steps']}: resume with --resume_from_checkpoint auto, {OR_ANEW}"
    )


def _find_foreign(folder: Path) -> Path | None:
    """Return the first entry that a run would replace but no run wrote; None if there is none."""
    record = _read_record(folder)
    if record is not None:
        # Files with a run's names belong to the run, but the card only if the run wrote one.
        names = [] if record.get("card") else [CARD]
    elif checkpoint.latest(folder) is not None:
        # There are checkpoints without a record: other files may belong to their run, but not
        # these.
        names = [RUN, CARD]
    else:
        names = [RUN, *RUN_NAMES, *_names_after_folder(folder), *SIDE_NAMES, CARD]
    for name in names:
        if os.path.lexists(folder / name):
            return folder / name
    return None


def _names_after_folder(folder: Path) -> tuple[str, ...]:
    """Return the names that contain the folder's name: the kohya file and ComfyUI's workflows."""
    return kohya_file_name(folder), workflow_file_name(folder), base_workflow_file_name(folder)


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Return the folder's ``run.json``; None if there is none, or if it is not a run's JSON.

    Raises:
        UserError: a value has the wrong type, or another version wrote the record.
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
    """Check that full fine-tuning would not replace models that come from elsewhere.

    Raises:
        UserError: the folder holds such models.
    """
    if _trained_whole(folder):
        return
    for name in WHOLE_MODELS:
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} was not written by full fine-tuning, and this run would replace"
                " it: give another --output_dir"
            )


def _trained_whole(folder: Path) -> bool:
    """Return whether the folder's run trained all weights of its models."""
    if not (folder / RUN).exists():
        return False
    method = read_run(folder)["method"]
    # A removed method may have written the folder; no removed method trained all weights.
    return method in methods.names() and methods.get(method).exports_weights


def clear(folder: Path, overwrite: bool) -> None:
    """Delete the earlier run after `guard` has allowed a new one; keep files that no run wrote.

    ``run.json`` is deleted last, so that after a crash the folder still counts as a run folder.

    Args:
        folder: the run folder.
        overwrite: whether to delete the whole run. Otherwise the run has no checkpoint, and its
            record stays until the new record replaces it.
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
    """Delete the run's final files, and the checkpoints and exports of steps after ``step``.

    `RunLog.start` deletes these steps from the log. After a crash before that, the run counts as
    interrupted and resumes from its newest checkpoint.

    Args:
        folder: the run folder.
        step: step of the checkpoint that the run resumes from.
    """
    record = _read_record(folder)
    if record is not None:
        # First, so that a run whose files are missing does not count as finished.
        record["status"] = "interrupted"
        write_text(folder / RUN, dump_json(record))
        for name in _result_names(folder):
            _delete(folder / name)
    discard_later_steps(folder / EXPORTS, step)
    # Last: after a crash, the remaining checkpoints show that the deletion is incomplete, and this
    # step can be resumed only with --overwrite_output_dir, which deletes the rest.
    discard_later_steps(folder / checkpoint.CHECKPOINTS, step)


def _result_names(folder: Path) -> list[str]:
    """Return the names of a run's final files; card and whole models only if the run wrote them."""
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
