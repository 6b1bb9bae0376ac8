"""The run folder: what is in it, whose it is, and what a command may do in it.

A folder is a run's by its ``run.json``. What has a name that a run writes to and stands in a folder
without one was made by somebody else, and is neither replaced nor deleted; so is a ``README.md``
that the run did not write.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from enum import Enum
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
from .record import RUN, VALIDATION, discard_later_steps, read_search
from .runlog import CARD, ERROR, METRICS, read_run
from .settings import describe_differences

# Folder of the adapters of checkpoints.
EXPORTS = "exports"
# Folder of the runs of a search.
FIT = "fit"
FIT_RECORD = "fit.json"
FIT_FIGURE = "fit.png"
SEARCH_NAMES = (FIT, FIT_RECORD, FIT_FIGURE)
# Folders of the models that full fine-tuning leaves.
WHOLE_MODELS = (*COMPONENTS, "model")
# A folder with one of these, or with ``run.json``, holds a run.
RUN_NAMES = (METRICS, checkpoint.CHECKPOINTS, FILE_NAME, WEIGHTS, CONFIG)
# What else a run leaves, and a new start deletes.
SIDE_NAMES = (VALIDATION, "logs", EXPORTS, *SEARCH_NAMES, snapshots.FOLDER, ERROR)


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


class State(Enum):
    """What an output folder holds that a run would replace."""

    EMPTY = "nothing that a run would replace"
    FOREIGN = "something that no run wrote, under a name that a run writes"
    CHECKPOINTS = "checkpoints without the record of their run"
    UNSAVED = "an unfinished run without a checkpoint"
    INTERRUPTED = "an unfinished run with a checkpoint"
    FINISHED = "a finished run"
    INTERRUPTED_FIT = "an unfinished search, or one whose last run is unfinished"
    FINISHED_FIT = "a finished search and its last run"


class Start(Enum):
    """The options of a command that decide what to do in its output folder."""

    RUN = "none of them"
    RESUME = "--resume_from_checkpoint with a checkpoint's name or path, or latest"
    AUTO = "--resume_from_checkpoint auto"
    FIT = "--fit"
    FIT_RESUME = "--fit with RESUME"
    FIT_AUTO = "--fit with AUTO"
    OVERWRITE = "--overwrite_output_dir without a checkpoint, with --fit or without"


class Action(Enum):
    """What a command does in its output folder, if it is not refused."""

    BEGIN = "begin at step 0; `clear` may delete"
    RESUME = "go on from a checkpoint, which must exist"
    SEARCH = "go on with a search, or with its last run from the newest checkpoint, if any"


OR_ANOTHER = "give another --output_dir, or delete it with --overwrite_output_dir"
FOREIGN = (
    "{foreign} was not written by a run, which would replace it: move it away, or give another"
    " --output_dir"
)
NO_RECORD = (
    "{folder} holds checkpoints without the run.json of their run: go on with"
    " --resume_from_checkpoint auto, move them away, or give another --output_dir"
)
OCCUPIED = (
    "{folder} holds another run ({differences}): continue it with --resume_from_checkpoint auto"
    " where these options may change, " + OR_ANOTHER
)
# For the run of the same options, by the state of the folder.
OR_ANEW = "or start anew with --overwrite_output_dir"
SAME_RUN = {
    State.UNSAVED: "{folder} holds this run, {end} before its first checkpoint: begin it again with"
    " --resume_from_checkpoint auto, " + OR_ANEW,
    State.INTERRUPTED: "{folder} holds this run, {end} and saved up to step {saved} of {num_steps}:"
    " go on with --resume_from_checkpoint auto, " + OR_ANEW,
    State.FINISHED: "{folder} holds this run, finished: make only what is missing of it with"
    " --resume_from_checkpoint auto, " + OR_ANEW,
}
NO_CHECKPOINT = "{folder} holds a finished run without a checkpoint: " + OR_ANOTHER
NO_FIT = (
    "{folder} holds no search to go on with: drop --resume_from_checkpoint, or give the"
    " --output_dir of an interrupted --fit"
)
NOT_A_FIT = "{folder} holds a run without a search, which --fit can't go on with: " + OR_ANOTHER
FIT_ONLY = "{folder} holds an interrupted --fit: go on with it by --fit, " + OR_ANOTHER
FIT_DONE = (
    "{folder} holds a finished --fit: give another --output_dir, where its checkpoints can be"
    " resumed by their path, or delete it with --overwrite_output_dir"
)
LATER_STEPS = (
    "{folder} holds later checkpoints than {chosen} ({later}): go on from the newest with"
    " --resume_from_checkpoint auto, or delete what the run holds of later steps with"
    " --overwrite_output_dir"
)
# The action for each state of the folder, with a column for each `Start` in its order. A sentence
# in place of an action refuses the command.
BEGIN, RESUME, SEARCH = Action
TABLE: dict[State, tuple[Action | str, ...]] = {
    State.EMPTY: (BEGIN, RESUME, BEGIN, BEGIN, NO_FIT, BEGIN, BEGIN),
    State.FOREIGN: (FOREIGN,) * 7,
    State.CHECKPOINTS: (NO_RECORD, RESUME, RESUME, NO_RECORD, NO_RECORD, NO_RECORD, NO_RECORD),
    State.UNSAVED: (OCCUPIED, RESUME, BEGIN, NOT_A_FIT, NOT_A_FIT, NOT_A_FIT, BEGIN),
    State.INTERRUPTED: (OCCUPIED, RESUME, RESUME, NOT_A_FIT, NOT_A_FIT, NOT_A_FIT, BEGIN),
    State.FINISHED: (OCCUPIED, RESUME, RESUME, NOT_A_FIT, NOT_A_FIT, NOT_A_FIT, BEGIN),
    State.INTERRUPTED_FIT: (FIT_ONLY, FIT_ONLY, FIT_ONLY, SEARCH, SEARCH, SEARCH, BEGIN),
    State.FINISHED_FIT: (FIT_DONE, FIT_DONE, FIT_DONE, FIT_DONE, RESUME, RESUME, BEGIN),
}


def guard(
    folder: Path,
    resume: str | Path | None,
    *,
    settings: Mapping[str, Any] | None = None,
    fit: bool = False,
    overwrite: bool = False,
    exports_weights: bool = False,
) -> Path | None:
    """Decide by `TABLE` what a command does in its output folder; nothing in it is changed.

    Args:
        folder: ``--output_dir``, which is locked and need not exist.
        resume: ``--resume_from_checkpoint``.
        settings: options that decide what is learned, as JSON holds them; a run that was recorded
            with the same ones is this run.
        fit: ``--fit``.
        overwrite: ``--overwrite_output_dir``. With a checkpoint it deletes what the run holds of
            later steps (`rewind`), without one all of the run (`clear`).
        exports_weights: whether the method leaves whole models.

    Returns:
        The checkpoint to go on from; None where the run, or the last run of a search, begins.

    Raises:
        UserError: the content of the folder forbids it, or the checkpoint does not exist.
    """
    state = classify(folder)
    row = dict(zip(Start, TABLE[state], strict=True))
    action = row[_start(resume, fit, overwrite)]
    if action is OCCUPIED:
        raise UserError(_describe_occupied(folder, state, settings or {}))
    if isinstance(action, str):
        raise UserError(action.format(folder=folder, foreign=_find_foreign(folder)))
    if exports_weights:
        _refuse_foreign_models(folder)
    if action is BEGIN:
        return None

    # The command goes on with what the folder holds.
    if fit:
        read_search(folder / FIT_RECORD)  # to refuse a damaged record before the data are read
    newest = checkpoint.latest(folder)
    if action is SEARCH and resume in (None, "auto", "latest"):
        return newest
    if newest is None and state in (State.FINISHED, State.FINISHED_FIT):
        raise UserError(NO_CHECKPOINT.format(folder=folder))
    chosen = checkpoint.resolve(folder, resume)
    # A checkpoint of another run may start a run in an empty folder, but not in that of a run.
    root = folder / checkpoint.CHECKPOINTS
    if state is not State.EMPTY and chosen and root.resolve() not in chosen.resolve().parents:
        raise UserError(
            f"{folder} holds another run than checkpoint {chosen}: give another --output_dir, or a "
            f"checkpoint in {root}"
        )
    if chosen is not None and not overwrite:
        later_steps = checkpoint.later_steps(folder, chosen)
        if later_steps:
            later = ", ".join(f"step-{step}" for step in later_steps)
            raise UserError(LATER_STEPS.format(folder=folder, chosen=chosen.name, later=later))
    return chosen


def _describe_occupied(folder: Path, state: State, settings: Mapping[str, Any]) -> str:
    """The sentence that refuses a folder with a run: this run, or another one and its options."""
    record = read_run(folder)
    # The record has all options.
    recorded_settings = {}
    for name in settings.keys() & record["config"].keys():
        recorded_settings[name] = record["config"][name]
    differences = describe_differences(recorded_settings, settings)
    if differences:
        return OCCUPIED.format(folder=folder, differences=differences)
    return SAME_RUN[state].format(
        folder=folder,
        end="failed" if record["status"] == "failed" else "interrupted",
        saved=max(checkpoint.steps(folder), default=None),
        num_steps=record["num_steps"],
    )


def classify(folder: Path) -> State:
    """The state of an output folder, which need not exist.

    Raises:
        UserError: its ``run.json`` is damaged, or of another version.
    """
    if _find_foreign(folder) is not None:
        return State.FOREIGN
    record = _read_record(folder)
    has_checkpoint = checkpoint.latest(folder) is not None
    if record is None:
        return State.CHECKPOINTS if has_checkpoint else State.EMPTY
    is_finished = record["status"] == "finished"
    if (folder / FIT_RECORD).exists():
        return State.FINISHED_FIT if is_finished else State.INTERRUPTED_FIT
    if is_finished:
        return State.FINISHED
    return State.INTERRUPTED if has_checkpoint else State.UNSAVED


def _start(resume: str | Path | None, fit: bool, overwrite: bool) -> Start:
    """The column of `TABLE` for a command."""
    if resume is None:
        if overwrite:
            return Start.OVERWRITE
        return Start.FIT if fit else Start.RUN
    if resume == "auto":
        return Start.FIT_AUTO if fit else Start.AUTO
    return Start.FIT_RESUME if fit else Start.RESUME


def _find_foreign(folder: Path) -> Path | None:
    """The first entry that a run would replace and no run wrote; None without one."""
    record = _read_record(folder)
    if record is not None:
        # All names of a run are the run's, but its card only where it wrote one.
        names = [] if record.get("card") else [CARD]
    elif checkpoint.latest(folder) is not None:
        # Checkpoints without their record: other names may be the run's too, but not these.
        names = [RUN, FIT_RECORD, CARD]
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
                f"{folder / name} exists and is not of a run of full fine-tuning, which would "
                "replace it: give another --output_dir"
            )


def _trained_whole(folder: Path) -> bool:
    """Test that the folder's run trained all weights of its models."""
    if not (folder / RUN).exists():
        return False
    method = read_run(folder)["method"]
    # A method that has left may have written the folder; none of these trained all weights.
    return method in methods.names() and methods.get(method).exports_weights


def clear(folder: Path, overwrite: bool) -> None:
    """Delete the earlier run where `guard` lets a run begin; what no run wrote stays.

    ``run.json`` is deleted last, so that the folder is known as a run's after a crash.

    Args:
        folder: the run folder.
        overwrite: whether to delete all of the run. Otherwise it has no checkpoint. Its record
            stays until the next one replaces it, and so does a search whose last run begins.
    """
    known_names = (RUN, *RUN_NAMES, kohya_file_name(folder))
    if not any((folder / name).exists() for name in known_names):
        return
    names = [*SIDE_NAMES, METRICS, checkpoint.CHECKPOINTS, *_result_names(folder), RUN]
    kept_names = () if overwrite else (RUN, checkpoint.CHECKPOINTS, *SEARCH_NAMES)
    for name in names:
        if name not in kept_names:
            _delete(folder / name)


def rewind(folder: Path, step: int) -> None:
    """Delete the run's checkpoints and exported files of steps after that of a checkpoint.

    The log of these steps is deleted by `RunLog.start`. A crash in between leaves an interrupted
    run that goes on from its newest checkpoint.

    Args:
        folder: the run folder.
        step: step of the checkpoint that the run goes on from.
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
