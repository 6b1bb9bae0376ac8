"""Seccomp: the kernel refuses new processes, programs, sockets and signals; threads are allowed.

A filter in the kernel's classic BPF; see ``man 2 seccomp``. Numbers of system calls are those of
the kernel's tables for x86-64 and arm64.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import NamedTuple

from . import libc

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
THREAD = 0x00010000  # CLONE_THREAD
X32 = 0x40000000
CLONE3 = 435
ON_BOTH = (424, 425, 428, 429, 430, 434, 442)
"""Signals by pidfd, io_uring_setup, open_tree, move_mount, fsopen, pidfd_open, mount_setattr."""


class Processor(NamedTuple):
    """What the filter has to know: the audit number, clone, and what is refused."""

    audit: int
    clone: int
    refused: tuple[int, ...]


# In this order: sockets and pairs of them; fork and vfork, which arm64 lacks; execve(at); signals;
# ptrace and other processes' memory; namespaces and mounts; bpf, keys, performance counters, page
# faults; sessions and process groups.
PROCESSORS = {
    "x86_64": Processor(
        0xC000003E,
        56,
        (
            *(41, 53, 57, 58, 59, 322, 62, 200, 234, 129, 297, 101, 310, 311),
            *(272, 308, 165, 166, 155, 161, 321, 248, 249, 250, 298, 323, 112, 109),
        ),
    ),
    "aarch64": Processor(
        0xC00000B7,
        220,
        (
            *(198, 199, 221, 281, 129, 130, 131, 138, 240, 117, 270, 271),
            *(97, 268, 40, 39, 41, 51, 280, 217, 218, 219, 241, 282, 157, 154),
        ),
    ),
}


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def restrict() -> None:
    """Put this process, for good, under the filter; `libc.give_up_privileges` has to come first.

    Raises:
        OSError: the kernel has no seccomp, or the processor is another.
    """
    machine = os.uname().machine
    if machine not in PROCESSORS:
        raise OSError(f"the numbers of system calls on {machine} are unknown")
    code = b"".join(_filter(PROCESSORS[machine]))
    kept = ctypes.create_string_buffer(code)
    program = _Program(len(code) // 8, ctypes.cast(kept, ctypes.c_void_p))
    libc.prctl(libc.PR_SET_SECCOMP, 2, ctypes.byref(program))


def _filter(processor: Processor) -> list[bytes]:
    """Instructions; a comparison goes on behind its own refusal when it does not hold."""
    refuse = _instruction(RETURN, REFUSE | errno.EPERM)
    found = [
        _instruction(LOAD, ARCHITECTURE),
        _instruction(EQUAL, processor.audit, then=1),
        _instruction(RETURN, KILL),
        _instruction(LOAD, NUMBER),
        _instruction(AT_LEAST, X32, otherwise=1),
        refuse,
        # Its flags are in memory that a filter cannot read; the C library then calls clone.
        _instruction(EQUAL, CLONE3, otherwise=1),
        _instruction(RETURN, REFUSE | errno.ENOSYS),
    ]
    for number in (*processor.refused, *ON_BOTH):
        found += [_instruction(EQUAL, number, otherwise=1), refuse]
    return [
        *found,
        _instruction(EQUAL, processor.clone, otherwise=3),
        _instruction(LOAD, FIRST_ARGUMENT),
        _instruction(ANY_BIT, THREAD, then=1),
        refuse,
        _instruction(RETURN, ALLOW),
    ]


def _instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
