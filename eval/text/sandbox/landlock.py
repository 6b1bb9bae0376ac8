"""Landlock: files are written in one folder only and read where Python is; no TCP, no signals.

See ``man 7 landlock``. Version 3 of its interface (Linux 6.2) is the first that guards truncation;
TCP is guarded from version 4 on (6.7), signals and abstract sockets from version 6 on (6.12).
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

from . import libc

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
LEAST_VERSION = 3
EXECUTE, READ_FILE, READ_FOLDER = 1 << 0, 1 << 2, 1 << 3
FILES, FILES_5 = (1 << 15) - 1, (1 << 16) - 1  # the second with ioctl of devices
TCP = 0b11
SCOPES = 0b11


def version() -> int:
    """Version of the kernel's interface.

    Raises:
        OSError: there is none.
    """
    return libc.syscall(CREATE_RULESET, None, 0, 1)


def restrict(folder: str) -> None:
    """Put this process, for good, under the rules.

    Args:
        folder: where it may do everything.

    Raises:
        OSError: the kernel has no Landlock, or an older one.
    """
    found = version()
    if found < LEAST_VERSION:
        raise OSError(f"Landlock has version {found}, and {LEAST_VERSION} is needed")
    files = FILES_5 if found >= 5 else FILES
    rules = struct.pack("=Q", files)
    if found >= 4:
        rules += struct.pack("=Q", TCP)
    if found >= 6:
        rules += struct.pack("=Q", SCOPES)
    ruleset = libc.syscall(CREATE_RULESET, rules, len(rules), 0)
    try:
        _allow(ruleset, folder, files)
        for place in _readable():
            _allow(ruleset, place, EXECUTE | READ_FILE | READ_FOLDER)
        libc.syscall(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _readable() -> list[str]:
    """Python's own folders and those of shared libraries."""
    libraries = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share"]
    places = [sys.prefix, sys.base_prefix, *sys.path, *libraries]
    return [place for place in dict.fromkeys(places) if os.path.isdir(place)]


def _allow(ruleset: int, place: str, rights: int) -> None:
    handle = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle))
        libc.syscall(ADD_RULE, ruleset, 1, rule, 0)
    finally:
        os.close(handle)
