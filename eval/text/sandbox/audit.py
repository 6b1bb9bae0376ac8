"""An audit hook: Python itself refuses writes outside the folder, processes, signals and sockets.

The least of the layers: it is there on every system, but what runs beside Python's own functions
(a C library, a flaw of the interpreter) does not ask it. See PEP 578.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "sqlite3.", "syslog.", "pty.", "shutil.", "winreg."),
    *("urllib.", "http.", "ftplib.", "smtplib.", "fcntl.", "resource.setrlimit", "mmap."),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("os.kill", "signal.pthread_kill", "os.symlink", "os.link", "os.chown", "os.setxattr"),
    *("os.removexattr", "os.chflags", "os.lockf", "resource.prlimit", "sys.addaudithook"),
)
"""Beginnings of events' names."""
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime")
"""Events of which the first argument, or the first two, are paths that change."""
MODULES = frozenset({"_ctypes", "_posixsubprocess", "_socket", "_posixshmem", "_multiprocessing"})
"""Modules of C code with functions that raise no event."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def restrict(folder: str) -> None:
    """Refuse, for good, what a program with one folder for itself does not need.

    Args:
        folder: where files may change.
    """
    for name in [*MODULES, "ctypes", "socket", "subprocess"]:
        sys.modules.pop(name, None)
    sys.addaudithook(_hook(os.path.realpath(folder)))


def _hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    # Bound now: a program can replace what modules hold, but not what this function has taken.
    realpath, isdir, fsdecode = os.path.realpath, os.path.isdir, os.fsdecode
    refused, changes, modules, writes = REFUSED, CHANGES, MODULES, WRITES

    def outside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        real = realpath(fsdecode(path))
        return not f"{real}/".startswith(f"{folder}/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import" and arguments[0] in modules:
            raise ImportError(f"{arguments[0]} is not there in the sandbox")
        if event == "open":
            path, _, flags = arguments
            # a folder's handle would let relative paths begin elsewhere
            if outside(path) and (flags & writes or isdir(path)):
                raise PermissionError(f"{path!r} is outside the sandbox")
        elif event.startswith(changes):
            if any(outside(path) for path in arguments[: 1 + (event == "os.rename")]):
                raise PermissionError(f"{event} outside the sandbox")
        elif event.startswith(refused):
            raise PermissionError(f"{event} is refused in the sandbox")

    return hook
