"""Programs that nobody has read, run by bubblewrap where they can do no harm.

sandbox = Sandbox.tried()              # refuses where it does not hold
execution = sandbox.run("assert 1 + 1 == 2")
execution.passed, execution.outcome, execution.detail

A program has a fresh process in namespaces of its own: no network, no other process, no file but
Python's and the shared libraries', read-only, and an empty folder in memory, which is gone when the
program ends. See ``man 1 bwrap``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bilora_diffusion.core.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
FOLDER = "/scratch"
"""Working folder of a program."""
DISK = 64 << 20
"""Bytes of all files of a program."""
LIMITS = {
    "RLIMIT_AS": 1 << 30,
    "RLIMIT_FSIZE": 16 << 20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_NPROC": 64,
    "RLIMIT_CORE": 0,
}
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share")
MOST = 1 << 16
"""Bytes of a report that are read."""


@dataclass(frozen=True)
class Execution:
    """Outcome of a program.

    Args:
        outcome: "passed", "failed" (it raised), "timed out", "killed" (it ended without having
            come to its end), or "unprotected" (there is no sandbox; nothing was run).
        detail: the exception, or the reason.
    """

    outcome: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass(frozen=True)
class Sandbox:
    """Bubblewrap, and the seconds that a program may take."""

    bwrap: str
    seconds: float = 10.0

    @classmethod
    def tried(cls, seconds: float = 10.0) -> Sandbox:
        """The sandbox of this system, after a program has tried what it is to prevent."""
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise UserError(
                "the sandbox needs Linux and the command bwrap, which is not there: install"
                " bubblewrap 0.8 or newer (Debian and Ubuntu: apt-get install bubblewrap)."
            )
        if breach := cls(bwrap).breach():
            raise UserError(
                f"the sandbox does not hold on this system ({breach}): let bubblewrap 0.8 or newer"
                " make user namespaces (in a container: start it with --privileged), or run this"
                " benchmark elsewhere."
            )
        return cls(bwrap, seconds)

    @property
    def version(self) -> str:
        """Such as "bubblewrap 0.8.0"."""
        asked = [self.bwrap, "--version"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()

    def breach(self) -> str:
        """Forbidden act of a program, or the reason why none could be run; "" for none."""
        with (
            tempfile.NamedTemporaryFile("w", prefix="outside-") as target,
            socket.create_server(("127.0.0.1", 0)) as server,
        ):
            os.chmod(target.name, 0o666)  # only the sandbox is to close it
            values = {"target": target.name, "pid": os.getpid(), "port": server.getsockname()[1]}
            return self.run(_TRIAL.format(**values)).detail

    def run(self, program: str) -> Execution:
        """Run a program to its end, or to its time's; nothing of it is left then.

        Nothing of the environment, the working folder or the input reaches it, and what it prints
        goes nowhere.
        """
        secret = secrets.token_hex(16)
        limits = LIMITS | {"RLIMIT_CPU": int(self.seconds) + 1}
        order = json.dumps({"program": program, "secret": secret, "limits": limits})
        # Files, whose size is limited, where a program could flood pipes.
        with tempfile.TemporaryFile() as report, tempfile.TemporaryFile() as complaint:
            try:
                subprocess.run(
                    self.command(),
                    input=order.encode(),
                    stdout=report,
                    stderr=complaint,
                    env={},
                    cwd="/",
                    start_new_session=True,
                    timeout=self.seconds,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return Execution("timed out", f"after {self.seconds:g} s")
            report.seek(0)
            complaint.seek(0)
            return _judge(report.read(MOST), complaint.read(MOST), secret)

    def command(self) -> list[str]:
        """The command line around Python."""
        if os.geteuid() == 0:  # becomes nobody inside, once everything is mounted
            identity = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            identity = ["--unshare-user", "--disable-userns"]
        readable = dict.fromkeys([*LIBRARIES, sys.base_prefix, sys.prefix])
        # Made by name, since folders on the way to a mount would be closed to nobody.
        above = dict.fromkeys(str(p) for r in readable for p in reversed(Path(r).parents[:-1]))
        binds = [part for place in readable for part in ("--ro-bind-try", place, place)]
        return [
            *(self.bwrap, "--die-with-parent", "--new-session", "--clearenv"),
            *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
            *("--unshare-cgroup-try", *identity),
            *(part for place in above for part in ("--dir", place)),
            *(*binds, "--ro-bind", str(CHILD), "/child.py", "--dev", "/dev"),
            *("--perms", "0777", "--size", str(DISK), "--tmpfs", FOLDER),
            *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", FOLDER),
            *("--", sys.executable, "-I", "-B", "/child.py"),
        ]


def _judge(report: bytes, complaint: bytes, secret: str) -> Execution:
    try:
        answer = json.loads(report)
        outcome, detail = str(answer["outcome"]), str(answer["detail"])
    except (ValueError, KeyError, TypeError):
        if complaint:
            reason = " ".join(complaint.decode("utf-8", "replace").split())
            return Execution("unprotected", reason[:300])
        return Execution("killed", "it ended without a report")
    if outcome == "passed" and answer.get("secret") != secret:
        return Execution("killed", "it wrote its own report")
    return Execution(outcome, detail)


_TRIAL = """
import os, socket, time

def fork():
    for _ in range(1000):
        if not os.fork():
            time.sleep(600)

attempts = {{
    "write a file outside": lambda: open({target!r}, "w"),
    "read a file outside": lambda: open({target!r}),
    "write beside its folder": lambda: open("/file", "w"),
    "signal another process": lambda: os.kill({pid}, 0),
    "reach the network": lambda: socket.create_connection(("127.0.0.1", {port}), 5),
    "start processes without end": fork,
    "take memory without end": lambda: bytearray(1 << 31),
}}
for name, attempt in attempts.items():
    try:
        attempt()
    except (OSError, MemoryError):
        continue
    raise RuntimeError("a program could " + name)
open("inside", "w").write("fine")
"""
