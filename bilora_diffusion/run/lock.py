"""The lock of a run folder: one command at a time writes into it.

`filelock` takes ``flock`` on a hidden file. The system releases it however the process ends, so a
crash leaves no stale lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from ..core.errors import UserError, is_main_process
from .record import RUN

LOCK_FILE = ".run.lock"  # hidden: neither uploaded nor listed


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a run folder within the context; the folder is made if it is missing.

    Neither the lock file nor a folder that stayed empty is left behind. In a distributed run only
    the main process takes the lock.

    Raises:
        UserError: another command holds it, or the folder cannot be written.
    """
    if not is_main_process():
        yield
        return
    new_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        _acquire(lock, folder)
        try:
            yield
        finally:
            # Before the release: whoever opened this file meanwhile sees that it is gone and
            # locks a new one.
            (folder / LOCK_FILE).unlink(missing_ok=True)
            lock.release()
    finally:
        with contextlib.suppress(OSError):  # a folder with files stays
            for new_folder in new_folders:
                new_folder.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"another command is writing into {folder}: wait until it has ended, or give another"
            " folder"
        ) from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be locked ({error.strerror}): check its rights and the room on its"
            " disk, or give another folder"
        ) from error


def hold_around(path: Path) -> AbstractContextManager[None]:
    """`hold` for the run folder that ``path`` is or lies in; nothing if there is none."""
    path = path.absolute()
    for folder in (path, *path.parents):
        if (folder / RUN).is_file():
            return hold(folder)
    return contextlib.nullcontext()
