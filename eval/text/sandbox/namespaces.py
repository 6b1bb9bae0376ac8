"""Namespaces of its own: no network, no other process, one writable folder; needs no root.

User, mount, network, process, IPC and host name. See ``man 7 namespaces``.
"""

from __future__ import annotations

import os
import signal

from . import libc

NEW_USER, NEW_MOUNT, NEW_NETWORK, NEW_PROCESS = 0x10000000, 0x00020000, 0x40000000, 0x20000000
NEW_IPC, NEW_HOST_NAME = 0x08000000, 0x04000000
MS_NOSUID, MS_NODEV, MS_RDONLY, MS_REC, MS_PRIVATE = 2, 4, 1, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
NOBODY = 65534
DISK = 64 << 20
"""Bytes that the writable folder takes, in memory."""


def enter(folder: str) -> None:
    """Go on in a new process, the first of its process namespace; this one waits and ends with it.

    Its uid is nobody's, so that starting a program gives no capability back. Everything mounted is
    read-only but ``folder``, which is empty and in memory, and ``/proc`` is empty.

    Raises:
        OSError: the system does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    libc.call(
        "unshare",
        NEW_USER | NEW_MOUNT | NEW_NETWORK | NEW_PROCESS | NEW_IPC | NEW_HOST_NAME,
    )
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    _mount(folder)
    child = os.fork()
    if child:
        for number in (0, 1, 2):  # the reader of the report is to see its end
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        os.closerange(3, 256)
        os.waitpid(child, 0)
        os._exit(0)
    # The first process of a namespace takes all others with it when it ends.
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)


def _mount(folder: str) -> None:
    private = MS_REC | MS_PRIVATE
    libc.call("mount", b"none", b"/", None, private, None)
    attributes = b"".join(v.to_bytes(8, "little") for v in (MOUNT_ATTR_RDONLY, 0, 0, 0))
    libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))
    options = f"size={DISK},mode=700".encode()
    libc.call("mount", b"work", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV, options)
    libc.call("mount", b"none", b"/proc", b"tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, b"size=4k")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
