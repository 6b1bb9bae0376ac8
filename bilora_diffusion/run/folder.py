"""The run folder: what lies in it, whose it is, and which folders can't become one.

A folder is a run's by its ``run.json``. What has a name that a run writes to and stands in a folder
without one was made by somebody else, and is neither replaced nor deleted; so is a ``README.md``
that the run did not write.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..lora_names import (
    COMPONENTS,
    CONFIG,
    FILE_NAME,
    KOHYA_FILE_NAME_BEFORE,
    WEIGHTS,
    kohya_file_name,
    workflow_file_name,
)
from ..methods import get
from . import checkpoint, snapshots
from .runlog import CARD, ERROR, METRICS, RUN, is_finished, read_run, wrote_card

# By these a folder is known to hold a run.
RESULTS = (METRICS, checkpoint.CHECKPOINTS, FILE_NAME, KOHYA_FILE_NAME_BEFORE, WEIGHTS, CONFIG)
# What else a run leaves, and a fresh start deletes.
EXPORTS = "exports"  # adapters of checkpoints
FIT, FIT_RECORD, FIT_FIGURE = "fit", "fit.json", "fit.png"
OF_FIT = (FIT, FIT_RECORD, FIT_FIGURE)
BESIDES = ("validation", "logs", EXPORTS, *OF_FIT, snapshots.FOLDER, ERROR)
WHOLE_MODELS = (*COMPONENTS, "model")  # what full fine-tuning leaves
# Folders of the system, in which nobody keeps runs, but for the places named after them.
SYSTEM = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/sbin", "/sys"),
    *("/usr", "/System", "/Library", "/Applications"),
)
WITHIN_SYSTEM = ("/dev/shm", "/usr/local", "/usr/src")
SHARED = ("/home", "/root", "/run", "/tmp", "/Users", "/var")  # only folders in them


def refuse_unusable(folder: Path) -> None:
    """Refuse a place where no run folder can be: a file, a system folder, one without rights.

    Raises:
        UserError: ``folder`` is such a place.
    """
    path = folder.absolute().resolve()
    try:
        home = Path.home().resolve()
    except RuntimeError:  # a user without one
        home = None
    itself = path in (Path(path.anchor), home, *map(Path, SHARED))
    inside = any(path.is_relative_to(root) for root in SYSTEM)
    if itself or (inside and not any(Path(free) in path.parents for free in WITHIN_SYSTEM)):
        kind = "your home folder" if path == home else "a folder of the system"
        raise UserError(f"--output_dir {folder} is {kind}: give a new folder, such as runs/icons")
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file: give a folder as --output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable: give another --output_dir")


def guard(folder: Path, resume: str | Path | None, overwrite: bool) -> None:
    """Refuse an output folder whose content forbids it, before anything is loaded or trained.

    Args:
        folder: ``--output_dir``, locked; need not exist. Nothing in it is changed.
        resume: ``--resume_from_checkpoint`` as given, or the checkpoint it was resolved to.
        overwrite: ``--overwrite_output_dir``.

    Raises:
        UserError: when ``folder`` holds files that a run would replace and did not write, or a run
            that is neither resumed nor to be overwritten.
    """
    _refuse_foreign(folder, resume)
    if overwrite or not holds_run(folder):
        return
    if resume is None:
        raise UserError(
            f"{folder} holds another run: give another --output_dir, continue it with "
            "--resume_from_checkpoint latest, or delete it with --overwrite_output_dir"
        )
    found = checkpoint.resolve(folder, resume)
    # Starting afresh is right after a kill before the first checkpoint, not after a whole run.
    if found is None and is_finished(folder):
        raise UserError(
            f"{folder} holds a finished run without a checkpoint: give another --output_dir, "
            "or delete it with --overwrite_output_dir"
        )
    if found is not None and folder.resolve() not in found.resolve().parents:
        raise UserError(
            f"{folder} holds another run than checkpoint {found}: give another --output_dir, or a "
            f"checkpoint in {folder / checkpoint.CHECKPOINTS}"
        )


def _refuse_foreign(folder: Path, resume: str | Path | None) -> None:
    """Refuse a folder that holds what a run would replace and no run has written."""
    record = _own(folder)
    if record is not None or (resume is not None and checkpoint.latest(folder) is not None):
        suspects = [] if wrote_card(record or {}) else [CARD]
    else:
        named = kohya_file_name(folder), workflow_file_name(folder)
        suspects = [RUN, *RESULTS, *named, *BESIDES, CARD]
    for name in suspects:
        if os.path.lexists(folder / name):
            raise UserError(
                f"{folder / name} was not written by a run, which would replace it: move it away,"
                " or give another --output_dir"
            )


def _own(folder: Path) -> dict[str, Any] | None:
    """The folder's ``run.json``, None where there is none, or one of something else.

    Raises:
        UserError: it is of another version.
    """
    try:
        record = json.loads((folder / RUN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("method"), str):
        return None
    return read_run(folder)


def refuse_foreign_models(folder: Path) -> None:
    """Refuse a folder in which full fine-tuning would replace models that are not its own.

    Raises:
        UserError: it holds such models.
    """
    for name in WHOLE_MODELS:
        if (folder / name).exists() and not trained_whole(folder):
            raise UserError(
                f"{folder / name} exists and is not of a run of full fine-tuning, which would "
                "replace it: give another --output_dir"
            )


def trained_whole(folder: Path) -> bool:
    """Test that the folder's run trained all weights of its models."""
    return (folder / RUN).exists() and get(read_run(folder)["method"]).exports_weights


def holds_run(folder: Path) -> bool:
    """Test for anything by which a run is known."""
    return any((folder / name).exists() for name in (RUN, *RESULTS, kohya_file_name(folder)))


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete an earlier run but for ``keep``, which `guard` must have allowed; ``run.json`` goes
    last, so that a crash leaves it known.
    """
    if not holds_run(folder):
        return
    whole = WHOLE_MODELS if trained_whole(folder) else ()
    card = (CARD,) if wrote_card(_own(folder) or {}) else ()
    named = kohya_file_name(folder), workflow_file_name(folder)
    for name in (*BESIDES, *card, *whole, *RESULTS, *named, RUN):
        path = folder / name
        if name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
