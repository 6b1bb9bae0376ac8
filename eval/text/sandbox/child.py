"""The process that a program runs in: it puts itself under all layers and then runs it."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

from . import audit, landlock, libc, namespaces, seccomp

PROCESSES = 64


def main() -> None:
    """Read an order from stdin, obey it, report on stdout, end.

    The order is JSON: program, folder, layers, memory, disk (bytes), seconds, secret. The report is
    JSON: outcome ("passed", "failed" or "unprotected"), detail, and the secret where it passed.
    """
    order = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.path[:] = [place for place in sys.path if place != order["root"]]
    try:
        protect(order)
    except OSError as error:
        answer = {"outcome": "unprotected", "detail": str(error)}
    else:
        answer = _run(order.pop("program"), order.pop("secret"))
    os.write(report, json.dumps(answer).encode())
    os._exit(0)


def protect(order: dict[str, Any]) -> None:
    """Limits and layers, the ones that need rights first.

    Raises:
        OSError: a layer is not to be had.
    """
    folder, layers = order["folder"], order["layers"]
    if sys.platform == "linux":  # a program is not to outlive who started it
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if "namespaces" in layers:
        namespaces.enter(folder)
    os.chdir(folder)
    _limit(order, PROCESSES if "namespaces" in layers else 0)
    if {"namespaces", "landlock", "seccomp"} & set(layers):
        libc.give_up_privileges()
    if "landlock" in layers:
        landlock.restrict(folder)
    if "seccomp" in layers:
        seccomp.restrict()
    if "audit hook" in layers:
        audit.restrict(folder)


def _limit(order: dict[str, Any], processes: int) -> None:
    seconds = int(order["seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, order["memory"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, order["disk"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        # Counted over all of the user's processes, but in a namespace over those in it.
        (resource.RLIMIT_NPROC, processes),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _run(program: str, secret: str) -> dict[str, str]:
    # BaseException: a program that leaves by sys.exit has not come to its end.
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        return {"outcome": "failed", "detail": f"{type(error).__name__}: {error}"[:300]}
    return {"outcome": "passed", "detail": "", "secret": secret}
