"""The lock of a run folder: one command at a time writes into it.

It is ``flock`` on a hidden file, which the system releases however the process ends. On a file
system without locks, a ``run.json`` that says "running" and is fresh stands for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from ..durable import disk_is_full
from ..errors import UserError, is_main_process
from .runlog import HEARTBEAT_SECONDS, RUN, read_run

FILE = ".run.lock"  # hidden, so that it is neither uploaded nor looked at
STALE_SECONDS = 12 * HEARTBEAT_SECONDS
"""A run that was silent for so long is taken to be dead, where only its record can tell."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a run folder within the context; it is made where it is missing.

    Nothing is left of the lock, nor of a folder into which nothing was written. Of a distributed
    run only the main process takes it.

    Raises:
        UserError: another command holds it, or the folder cannot be written.
    """
    if not is_main_process():
        yield
        return
    path = folder / FILE
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        file = _open(path)
        # What this process forks, such as data loaders' workers, may outlive it.
        os.register_at_fork(after_in_child=file.close)
        try:
            yield
        finally:
            if not file.closed:
                if _is_at(path, file):
                    path.unlink(missing_ok=True)
                file.close()
    finally:
        with contextlib.suppress(OSError):
            for place in missing:
                place.rmdir()


def hold_around(path: Path) -> AbstractContextManager[None]:
    """`hold` for the run folder that ``path`` is or lies in; nothing where there is none."""
    path = path.absolute()
    runs = (place for place in (path, *path.parents) if (place / RUN).is_file())
    run = next(runs, None)
    return contextlib.nullcontext() if run is None else hold(run)


def _open(path: Path) -> IO[bytes]:
    """The file, locked."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # whoever made the folder has just removed it
            continue
        except OSError as error:
            if disk_is_full(error):
                raise
            raise UserError(
                f"{path} cannot be written ({error.strerror}): delete it, or give another folder"
            ) from error
        file = os.fdopen(handle, "r+b", buffering=0)
        try:
            _lock(file, path)
        except UserError:
            file.close()
            raise
        if _is_at(path, file):
            return file
        file.close()  # whoever held it has deleted it: the next one locks another file


def _lock(file: IO[bytes], path: Path) -> None:
    folder = path.parent
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = "".join(filter(str.isprintable, file.read(200).decode("ascii", "replace")))
        raise UserError(
            f"{holder or 'another command'} is writing into {folder}: wait until it has ended, or"
            " give another folder"
        ) from None
    except OSError:  # a file system without locks
        _refuse_fresh(folder)
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


def _refuse_fresh(folder: Path) -> None:
    """Refuse a folder whose record says that a run is going on."""
    try:
        silent = time.time() - (folder / RUN).stat().st_mtime
        running = read_run(folder).get("status") == "running"
    except (OSError, UserError):
        return
    if running and silent < STALE_SECONDS:
        raise UserError(
            f"a run was writing into {folder} {silent:.0f} seconds ago: wait until it has ended"
            f" ({STALE_SECONDS:.0f} seconds if it was killed), or give another folder"
        )


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file has not been deleted or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False
