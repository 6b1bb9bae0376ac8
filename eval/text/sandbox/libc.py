"""Linux calls that Python 3.11 has no function for."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CAPSET = {"x86_64": 126, "aarch64": 91}
CAPABILITY_VERSION = 0x20080522


def call(name: str, *arguments: Any) -> int:
    """A function of the C library.

    Raises:
        OSError: it failed, or this is not Linux.
    """
    if sys.platform != "linux":
        raise OSError(f"{name} is there on Linux only")
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype = ctypes.c_long
    found = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return found


def syscall(number: int, *arguments: Any) -> int:
    """A system call by number.

    Raises:
        OSError: it failed, or this is not Linux.
    """
    return call("syscall", number, *arguments)


def prctl(option: int, *arguments: Any) -> None:
    """Change a property of this process.

    Raises:
        OSError: it failed, or this is not Linux.
    """
    call("prctl", option, *arguments, *[0] * (4 - len(arguments)))


def give_up_privileges() -> None:
    """No capability any more, and none by starting a program.

    Raises:
        OSError: it failed, or this is no Linux on a known processor.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    number = CAPSET.get(os.uname().machine)
    if number is None:
        raise OSError(f"the number of capset on {os.uname().machine} is unknown")
    head = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    syscall(number, ctypes.byref(head), ctypes.byref((ctypes.c_uint32 * 6)()))
