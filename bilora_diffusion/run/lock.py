"""The lock of a run folder, which lets only one command at a time write into it.

`filelock` calls ``flock`` on a hidden file. The operating system releases the lock when the process
ends for any reason, so a crash leaves no lock behind. On a file system without ``flock``, the
hidden file itself is the lock.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from ..core.errors import UserError, is_main_process
from .record import RUN

LOCK_FILE = ".run.lock"  # hidden, so that it is neither uploaded nor listed


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder inside the context; create the folder if it is missing.

    On exit the lock file is deleted, and so are new folders that stayed empty. In a distributed run
    only the main process takes the lock. The lock file names the process and its host.

    Raises:
        UserError: another command holds the lock, or the folder can't be created or written.
    """
    if not is_main_process():
        yield
        return
    # Innermost first, the order in which empty folders can be deleted.
    new_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        _acquire(lock, folder)
        try:
            yield
        finally:
            # Deleted before the release: a command that opened this file in the meantime then
            # notices that it is gone, and locks a new file.
            (folder / LOCK_FILE).unlink(missing_ok=True)
            lock.release()
    finally:
        with contextlib.suppress(OSError):  # raised for a folder with files, which stays
            for new_folder in new_folders:
                new_folder.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        _name_owner(folder / LOCK_FILE)
    except Timeout as error:
        raise UserError(
            f"{_describe_owner(folder)} is writing into {folder}: wait until it has ended, or give"
            " another folder"
        ) from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be locked ({error.strerror}): check its permissions and the free"
            " disk space, or give another folder"
        ) from error


def _name_owner(lock_file: Path) -> None:
    """Write the process and its host into a lock file that this process has locked."""
    process = f"{os.getpid()}\n"
    with contextlib.suppress(OSError):  # the lock does not need the content; the disk may be full
        # On a file system without locks, `filelock` has already written both.
        if not lock_file.read_text().startswith(process):
            lock_file.write_text(f"{process}{platform.node()}\n")


def _describe_owner(folder: Path) -> str:
    """Describe the process that holds a folder's lock, from the lock file."""
    with contextlib.suppress(OSError, ValueError):
        process, host = (folder / LOCK_FILE).read_text().splitlines()[:2]
        return f"process {int(process)} on {host}"
    return "another command"  # the lock file does not name its process yet


def locked_around(path: Path) -> AbstractContextManager[None]:
    """Return a context that locks the run folder that a path is or is in, if there is one."""
    path = path.absolute()
    for folder in (path, *path.parents):
        if (folder / RUN).is_file():
            return locked(folder)
    return contextlib.nullcontext()
