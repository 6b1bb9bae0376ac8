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

from ..core.durable import disk_is_full
from ..core.errors import UserError, is_main_process
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
        with _locked(path) as file:
            # What this process forks, such as data loaders' workers, may outlive it.
            os.register_at_fork(after_in_child=file.close)
            try:
                yield
            finally:
                if not file.closed and _is_at(path, file):
                    path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            for place in missing:
                place.rmdir()


def hold_around(path: Path) -> AbstractContextManager[None]:
    """`hold` for the run folder that ``path`` is or lies in; nothing where there is none."""
    path = path.absolute()
    run = next((place for place in (path, *path.parents) if (place / RUN).is_file()), None)
    return contextlib.nullcontext() if run is None else hold(run)


def _locked(path: Path) -> IO[bytes]:
    """The file, open and locked."""
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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                holder = "".join(filter(str.isprintable, file.read(200).decode("ascii", "replace")))
            raise UserError(
                f"{holder or 'another command'} is writing into {path.parent}: wait until it has"
                " ended, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            if (silent := _silent_seconds(path.parent)) < STALE_SECONDS:
                file.close()
                raise UserError(
                    f"a run was writing into {path.parent} {silent:.0f} seconds ago: wait until it"
                    f" has ended ({STALE_SECONDS:.0f} seconds if it was killed), or give another"
                    " folder"
                ) from None
        if _is_at(path, file):
            with contextlib.suppress(OSError):  # a full disk
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()  # whoever held it has deleted it: the next one locks another file


def _silent_seconds(folder: Path) -> float:
    """Seconds since the run whose record says that it goes on wrote it; infinite without one."""
    with contextlib.suppress(OSError, UserError):
        if read_run(folder).get("status") == "running":
            return time.time() - (folder / RUN).stat().st_mtime
    return float("inf")


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Test that an open file has not been deleted or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False
