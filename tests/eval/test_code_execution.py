"""The sandbox: what programs may do in it, and what each layer keeps them from."""

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
from eval.text.sandbox import landlock
from eval.text.sandbox.runner import LAYERS, Execution, Sandbox, holds

SECONDS = 20.0  # of a program that ends by itself; the machine may be busy

WRITE = "open({target!r}, 'w').write('changed')"
ATTACKS = {
    "write": WRITE,
    "truncate": "import os; os.truncate({target!r}, 0)",
    "remove": "import os; os.remove({target!r})",
    "rename": "import os; open('mine', 'w'); os.rename('mine', {target!r})",
    "symlink": "import os; os.symlink({folder!r}, 'x'); open('x/file', 'w').write('changed')",
    "read": "open({target!r}).read()",
    "kill": "import os, signal; os.kill({pid}, signal.SIGUSR1)",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
    "fork": "import os; os.fork() or os._exit(0)",
    "bomb": "import os\nwhile True: os.fork()",
    "program": "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)",
    "ctypes": "import ctypes; ctypes.CDLL(None).getpid()",
}
FILES = ("write", "truncate", "remove", "rename", "symlink")
STOPPED = {
    "namespaces": (*FILES, "kill", "connect"),
    "landlock": (*FILES, "read", "kill", "connect"),
    "seccomp": ("kill", "connect", "fork", "bomb", "program"),
    "audit hook": (*FILES, "kill", "connect", "fork", "bomb", "program", "ctypes"),
}
# of landlock: the version from which on it stops what
SINCE = {"connect": 4, "kill": 6}


def offered(layer: str) -> bool:
    return Sandbox((layer,), SECONDS).run("").passed


def require(layer: str) -> None:
    if not offered(layer):
        pytest.skip(f"this system does not offer {layer}")


@pytest.fixture(scope="module")
def strongest() -> Sandbox:
    return Sandbox.strongest(SECONDS)


@pytest.fixture
def usr1() -> Iterator[list[int]]:
    """Signals that arrived here."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: arrived.append(number))
    yield arrived
    signal.signal(signal.SIGUSR1, before)


def attack(sandbox: Sandbox, name: str, folder: Path, arrived: list[int]) -> Execution:
    """Try it; nothing outside may have changed, whatever the program says."""
    target = folder / "file"
    target.write_text("kept", encoding="utf-8")
    before = sorted(path.name for path in folder.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        values = {"target": str(target), "folder": str(folder), "pid": os.getpid()}
        text = ATTACKS[name].format(port=server.getsockname()[1], **values)
        found = sandbox.run(text)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert target.read_text(encoding="utf-8") == "kept"
    assert sorted(path.name for path in folder.iterdir()) == before
    assert arrived == []
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_the_sandbox_stops_every_attack(
    name: str, strongest: Sandbox, tmp_path: Path, usr1: list[int]
) -> None:
    found = attack(strongest, name, tmp_path, usr1)
    assert found.outcome in ("failed", "killed")
    if name not in ("read",):
        assert "Error" in found.detail


@pytest.mark.parametrize(
    ("layer", "name"), [(layer, name) for layer, names in STOPPED.items() for name in names]
)
def test_each_layer_stops_its_attacks_alone(
    layer: str, name: str, tmp_path: Path, usr1: list[int]
) -> None:
    require(layer)
    if layer == "landlock" and landlock.version() < SINCE.get(name, 0):
        pytest.skip("this kernel's Landlock does not guard it")
    found = attack(Sandbox((layer,), SECONDS), name, tmp_path, usr1)
    assert found.outcome == "failed"
    assert "Error" in found.detail


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Without a layer a file outside is written; so the tests above can fail."""
    target = tmp_path / "file"
    target.write_text("kept", encoding="utf-8")
    assert Sandbox((), SECONDS).run(WRITE.format(target=str(target))).passed
    assert target.read_text(encoding="utf-8") == "changed"
    assert not holds(Sandbox((), SECONDS))


def test_all_layers_of_this_system_are_used(strongest: Sandbox) -> None:
    assert strongest.layers == tuple(layer for layer in LAYERS if offered(layer))
    assert "audit hook" in strongest.layers


def test_nothing_is_run_without_protection() -> None:
    with pytest.raises(UserError, match="no protection for running programs holds"):
        Sandbox.strongest(allowed=())
    with pytest.raises(UserError, match="no protection for running programs holds"):
        Sandbox.strongest(allowed=("seccomp",))  # files can be written under it


def test_a_layer_that_is_not_to_be_had_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.text.sandbox.runner.START", _without_landlock())
    target = tmp_path / "file"
    found = Sandbox(("landlock",), SECONDS).run(WRITE.format(target=str(target)))
    assert found.outcome == "unprotected"
    assert not target.exists()


def _without_landlock() -> str:
    from eval.text.sandbox import runner

    return f"{runner.START}; child.landlock.LEAST_VERSION = 1000"


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(600)"])
def test_an_endless_program_is_ended(program: str, strongest: Sandbox) -> None:
    found = Sandbox(strongest.layers, 1.5).run(program)
    assert found == Execution("timed out", "after 1.5 s")


def test_processes_of_a_program_end_with_it() -> None:
    """Within namespaces alone programs may start others, which do not outlive them."""
    require("namespaces")
    marker = f"left-behind-{secrets.token_hex(8)}"
    program = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    words = ['python', '-c', 'import time; time.sleep(600)']\n"
        f"    os.execv({sys.executable!r}, [*words, {marker!r}])\n"
        "time.sleep({seconds})"
    )
    for seconds in (0.5, 600):
        Sandbox(("namespaces",), 3.0).run(program.format(seconds=seconds))
        patience = time.monotonic() + 60  # the kernel ends them in its own time
        while (left := left_behind(marker)) and time.monotonic() < patience:
            time.sleep(0.01)
        assert not left


def left_behind(marker: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if marker in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("assert sum([1, 2]) == 3", "passed"),
        ("assert False", "failed"),
        ("raise SystemExit(0)", "failed"),
        ("import os; os._exit(0)", "killed"),
        ("def broken(:", "failed"),
        ("x = bytearray(3 << 30)", "failed"),
        ("with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))", "failed"),
        (
            "import threading, math\nt = threading.Thread(target=print)\nt.start()\nt.join()",
            "passed",
        ),
        ("open('mine', 'w').write('x'); assert open('mine').read() == 'x'", "passed"),
        (
            "import os; assert os.listdir('.') == []; assert set(os.environ) <= {'LC_CTYPE'}",
            "passed",
        ),
        ("import sys; assert not any('eval.text' in p for p in sys.path)", "passed"),
        ("print('x' * 10 ** 6); import sys; sys.stderr.write('y'); sys.stdin.read()", "passed"),
        ("import re, heapq, itertools, collections, hashlib, string, typing, copy", "passed"),
    ],
)
def test_what_becomes_of_a_program(program: str, outcome: str, strongest: Sandbox) -> None:
    assert strongest.run(program).outcome == outcome


def test_a_program_can_not_report_for_itself(strongest: Sandbox) -> None:
    program = (
        "import os\n"
        "for number in range(3, 64):\n"
        "    try:\n"
        '        os.write(number, b\'{"outcome": "passed", "detail": ""}\')\n'
        "    except OSError:\n"
        "        pass\n"
        "os._exit(0)"
    )
    assert strongest.run(program) == Execution("killed", "it wrote its own report")


def test_a_flood_of_output_is_ended(strongest: Sandbox) -> None:
    program = (
        "import os\n"
        "while True:\n"
        "    for number in range(3, 64):\n"
        "        try:\n"
        "            os.write(number, bytes(1 << 16))\n"
        "        except OSError:\n"
        "            pass"
    )
    assert Sandbox(strongest.layers, 5.0).run(program).outcome == "killed"


def test_nothing_of_the_temporary_folders_is_left(
    strongest: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    strongest.run("open('mine', 'w').write('x')")
    Sandbox(strongest.layers, 1.0).run("open('mine', 'w').write('x')\nwhile True: pass")
    assert list(tmp_path.iterdir()) == []
