"""Run programs in the sandbox, one fresh process each.

sandbox = Sandbox.strongest()          # refuses where no layer holds
found = sandbox.run("assert 1 + 1 == 2")
found.passed, found.outcome, found.detail
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bilora_diffusion.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ("namespaces", "landlock", "seccomp", "audit hook")
"""From the strongest to the least."""
MEMORY, DISK = 1 << 30, 16 << 20
MOST = 1 << 16
"""Bytes of a report; a program that writes more is ended."""
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from eval.text.sandbox import child"


@dataclass(frozen=True)
class Execution:
    """What became of a program.

    Args:
        outcome: "passed", "failed" (it raised), "timed out", "killed" (it ended without having
            come to its end), or "unprotected" (a layer is not to be had; nothing was run).
        detail: the exception, or the reason.
    """

    outcome: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass(frozen=True)
class Sandbox:
    """How programs are run.

    Args:
        layers: of ``LAYERS``; all of them must be to be had.
        seconds: wall time of a program; its CPU time is limited to one more.
        memory: bytes of address space.
        disk: bytes of one file; all files together take 64 MB at most within namespaces.
    """

    layers: tuple[str, ...]
    seconds: float = 10.0
    memory: int = MEMORY
    disk: int = DISK

    @classmethod
    def strongest(cls, seconds: float = 10.0, allowed: Collection[str] = LAYERS) -> Sandbox:
        """All layers that this system offers, tried by what they are to prevent.

        Raises:
            UserError: none holds.
        """
        offered = [name for name in LAYERS if name in allowed and cls((name,)).run("").passed]
        while offered:
            found = cls(tuple(offered), seconds)
            if holds(cls(tuple(offered))):
                return found
            offered.pop()
        raise UserError(
            "no protection for running programs holds on this system (tried:"
            f" {', '.join(allowed) or 'none'}): run this benchmark on Linux."
        )

    def run(self, program: str) -> Execution:
        """Run a program to its end, or to its time's; nothing of it is left then.

        Nothing of the environment, the working folder or the input reaches it, and what it prints
        goes nowhere.
        """
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            secret = secrets.token_hex(16)
            order = {
                "program": program,
                "folder": os.path.realpath(folder),
                "layers": self.layers,
                "memory": self.memory,
                "disk": self.disk,
                "seconds": self.seconds,
                "secret": secret,
                "root": str(ROOT),
            }
            return self._judge(*self._talk(json.dumps(order).encode()), secret)

    def _talk(self, order: bytes) -> tuple[bytes, bool]:
        """The report, and whether the time was over."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", f"{START}; child.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(order)
            return _read(process.stdout.fileno(), time.monotonic() + self.seconds)
        finally:
            # Before it is waited for: until then nobody else can get its number.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()

    def _judge(self, report: bytes, late: bool, secret: str) -> Execution:
        if late:
            return Execution("timed out", f"after {self.seconds:g} s")
        try:
            answer = json.loads(report)
            outcome, detail = str(answer["outcome"]), str(answer["detail"])
        except (ValueError, KeyError, TypeError):
            return Execution("killed", "it ended without a report")
        if outcome == "passed" and answer.get("secret") != secret:
            return Execution("killed", "it wrote its own report")
        return Execution(outcome, detail)


def _read(source: int, deadline: float) -> tuple[bytes, bool]:
    found = b""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while len(found) <= MOST:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return found, True
            part = os.read(source, MOST)
            if not part:
                break
            found += part
    return found, False


def holds(sandbox: Sandbox) -> bool:
    """Whether a file outside can't be written and this process can't be signalled, by trying."""
    with tempfile.TemporaryDirectory(prefix="outside-") as folder:
        target = Path(folder, "file")
        target.write_text("kept", encoding="utf-8")
        found = sandbox.run(_TRIAL.format(target=str(target), pid=os.getpid()))
        return found.passed and target.read_text(encoding="utf-8") == "kept"


_TRIAL = """
import os
for attempt in (lambda: open({target!r}, "w"), lambda: os.kill({pid}, 0)):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit
open("inside", "w").write("fine")
"""
