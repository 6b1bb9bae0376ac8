"""Program inside the sandbox: it limits itself, runs another, and reports its outcome.

It is started by its path and knows nothing of this package, which is not there in the sandbox.
"""

from __future__ import annotations

import json
import os
import resource
import sys

NOBODY = 65534


def main() -> None:
    """Read an order from stdin, obey it, report on stdout, end.

    The order is JSON: program, secret, and limits by the names of ``resource``. The report is JSON:
    outcome ("passed" or "failed"), detail, and the secret where it passed, which is how a program
    that writes a report of its own is told from one that came to its end. It is no guard against
    one that looks for the secret: program and tests share a process, so it could change these too.
    """
    order = json.loads(sys.stdin.buffer.read())
    for name, value in order["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    if os.getuid() == 0:  # the kernel does not limit root's processes
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    answer = run(order.pop("program"), order.pop("secret"))
    os.write(report, json.dumps(answer).encode())
    os._exit(0)


def run(program: str, secret: str) -> dict[str, str]:
    """Run a program; returns its outcome."""
    # BaseException: a program that leaves by sys.exit has not come to its end.
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        return {"outcome": "failed", "detail": f"{type(error).__name__}: {error}"[:300]}
    return {"outcome": "passed", "detail": "", "secret": secret}


if __name__ == "__main__":
    main()
