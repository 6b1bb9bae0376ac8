"""The sandbox: what programs may do in it, what it keeps them from, and when it is refused."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bilora_diffusion.errors import UserError
from eval.text_scores.sandbox import Execution, Sandbox

ATTACKS = {
    "write": "open({target!r}, 'w').write('changed')",
    "truncate": "import os; os.truncate({target!r}, 0)",
    "remove": "import os; os.remove({target!r})",
    "rename": "import os; open('mine', 'w'); os.rename('mine', {target!r})",
    "symlink": "import os; os.symlink({folder!r}, 'x'); open('x/file', 'w').write('changed')",
    "read": "open({target!r}).read()",
    "home": "import os; os.listdir({home!r})",
    "kill": "import os, signal; os.kill({pid}, signal.SIGUSR1)",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
    "bomb": "import os\nwhile True: os.fork()",
    "memory": "x = bytearray(3 << 30)",
    "big file": "open('big', 'wb').write(bytes(1 << 25))",
    "many files": "for n in range(99): open(str(n), 'wb').write(bytes(1 << 20))",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))",
}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox.tried(20.0)  # the machine may be busy
    except UserError as error:
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.fixture
def usr1() -> Iterator[list[int]]:
    """Signals that arrived here."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: arrived.append(number))
    yield arrived
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails_and_changes_nothing(
    name: str, sandbox: Sandbox, tmp_path: Path, usr1: list[int]
) -> None:
    target = tmp_path / "file"
    target.write_text("kept", encoding="utf-8")
    target.chmod(0o666)  # only the sandbox is to close it
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        text = ATTACKS[name].format(
            target=str(target),
            folder=str(tmp_path),
            home=str(Path(__file__).parent),
            pid=os.getpid(),
            port=server.getsockname()[1],
        )
        assert sandbox.run(text).outcome in ("failed", "killed")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert target.read_text(encoding="utf-8") == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert usr1 == []


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("assert sum([1, 2]) == 3", "passed"),
        ("assert False", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("import os; os._exit(0)", "killed"),
        ("def broken(:", "failed"),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", "passed"),
        ("open('mine', 'w').write('x'); assert open('mine').read() == 'x'", "passed"),
        ("import os; assert not os.listdir('.')", "passed"),
        ("import os; assert set(os.environ) <= {'LC_CTYPE', 'PWD'}", "passed"),
        ("import os; assert os.getpid() < 9", "passed"),
        ("print('x' * 10 ** 6); import sys; sys.stderr.write('y'); sys.stdin.read()", "passed"),
        ("import re, heapq, itertools, collections, hashlib, string, typing, numpy", "passed"),
    ],
)
def test_what_becomes_of_a_program(program: str, outcome: str, sandbox: Sandbox) -> None:
    assert sandbox.run(program).outcome == outcome


WRITE_EVERYWHERE = """
import os
while True:
    for number in range(3, 64):
        try:
            os.write(number, {content})
        except OSError:
            pass
    {then}
"""


def test_a_program_can_not_report_for_itself_nor_flood(sandbox: Sandbox) -> None:
    forged = WRITE_EVERYWHERE.format(
        content=b'{"outcome": "passed", "detail": ""}', then="os._exit(0)"
    )
    assert sandbox.run(forged) == Execution("killed", "it wrote its own report")
    flood = WRITE_EVERYWHERE.format(content="bytes(1 << 16)", then="pass")
    assert not Sandbox(sandbox.bwrap, 1.0).run(flood).passed


def test_an_endless_program_is_ended_and_so_are_its_children(sandbox: Sandbox) -> None:
    marker = f"left-behind-{secrets.token_hex(8)}"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    words = ['python', '-c', 'import time; time.sleep(600)']\n"
        f"    os.execv({sys.executable!r}, [*words, {marker!r}])\n"
        "time.sleep({seconds})"
    )
    for seconds, outcome in ((0.2, "passed"), (600, "timed out")):
        found = Sandbox(sandbox.bwrap, 1.5).run(program.format(seconds=seconds))
        assert found.outcome == outcome
        patience = time.monotonic() + 60  # the kernel ends them in its own time
        while left_behind(marker) and time.monotonic() < patience:
            time.sleep(0.01)
        assert not left_behind(marker)


def left_behind(marker: str) -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline"])
    return [one for one in processes if marker in " ".join(one.info["cmdline"] or [])]


def test_a_sandbox_that_does_not_hold_is_noticed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_network = [word for word in sandbox.command() if word != "--unshare-net"]
    monkeypatch.setattr(Sandbox, "command", lambda _: with_network)
    with pytest.raises(UserError, match="a program could reach the network"):
        Sandbox.tried()


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (None, "apt-get install bubblewrap"),
        ("echo bwrap: No permissions to create new namespace >&2; exit 1", "No permissions"),
        ("exit 0", "without a report"),
    ],
)
def test_where_there_is_no_sandbox_nothing_is_run(
    command: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if command is not None:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(UserError, match=named):
        Sandbox.tried()
