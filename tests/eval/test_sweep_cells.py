"""Cells as processes: finished ones are left alone, failing ones recorded, running ones waited for.

The training script is a stand-in that starts in no time; `tests/scripts/test_sweep.py` has the real
one.
"""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval.sweep import cells
from eval.sweep.cells import Runner, explain
from eval.sweep.grid import Cell

SCRIPT = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(exist_ok=True)
(folder / "pid").write_text("running")
print("hello", " ".join(sys.argv[1:]), flush=True)
if "--sleep" in sys.argv:
    time.sleep(600)
if "--wait" in sys.argv:
    while not (folder.parent / "go").exists():
        time.sleep(0.01)
if "--fail" in sys.argv:
    sys.exit("error: no such thing: " + str(folder / "x.png"))
record = {"schema_version": 1, "method": "lora", "status": "finished", "config": {}}
(folder / "run.json").write_text(json.dumps(record))
"""


class Direct(Runner):
    """Starts the script without accelerate, whose import takes seconds."""

    def command(self, cell):
        words = super().command(cell)
        return [sys.executable, *words[words.index(str(self.script)) :]]


@pytest.fixture
def runner(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "runs").mkdir()
    return Direct(script, Path("recipe.yaml"), tmp_path / "runs")


def cell(name, *flags):
    return Cell(name, "arm", 0, flags)


def test_a_failing_cell_leaves_the_others_and_only_it_is_repeated(runner):
    outcomes = runner.run_all([cell("a"), cell("b", "--fail"), cell("c")])
    assert [outcome.status for outcome in outcomes] == ["finished", "failed", "finished"]
    assert outcomes[1].exit_code == 1
    assert outcomes[1].error == "no such thing: x.png"
    record = json.loads((runner.runs_dir / "sweep.json").read_text())
    assert [c["status"] for c in record["cells"]] == ["finished", "failed", "finished"]
    # a finished one is not repeated, and a failed one is, with a log of its own
    files = [runner.runs_dir / name for name in ("a/run.json", "a.log")]
    before = [file.stat().st_mtime_ns for file in files]
    again = runner.run_all([cell("a"), cell("b"), cell("c")])
    assert [outcome.status for outcome in again] == ["finished"] * 3
    assert [file.stat().st_mtime_ns for file in files] == before
    assert (runner.runs_dir / "b.log").read_text().count("hello") == 1


def when(files, act):
    """Acts in a thread of its own once the files are there."""

    def wait():
        patience = time.monotonic() + 100  # a busy machine may take long to start a process
        while not all(map(Path.exists, files)) and time.monotonic() < patience:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("end", "sigint"),
    [
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_IGN),  # as in a job that a shell started in the background
    ],
)
def test_an_interrupt_ends_all_running_cells(runner, end, sigint):
    before = signal.signal(signal.SIGINT, sigint)
    runner = dataclasses.replace(runner, jobs=2)
    running = [runner.runs_dir / name / "pid" for name in "ab"]  # whichever is the later one
    thread = when(running, lambda: os.kill(os.getpid(), end))
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run_all([cell(name, "--sleep") for name in "abc"])
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    for name in "ab":
        with open(runner.runs_dir / f"{name}.log", "ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody writes any more
        assert cells.state(runner.runs_dir / name) == "begun"
    assert not (runner.runs_dir / "c").exists()


def test_a_cell_that_outlived_its_sweep_is_waited_for(runner, capsys):
    with open(runner.runs_dir / "a.log", "ab") as log:  # as a sweep that was killed leaves it
        fcntl.flock(log, fcntl.LOCK_EX)
        left = subprocess.Popen(runner.command(cell("a", "--wait")), stdout=log)
    go = runner.runs_dir / "go"
    thread = when([runner.runs_dir / "a" / "pid"], lambda: (time.sleep(0.3), go.touch()))
    (outcome,) = runner.run_all([cell("a", "--wait")])
    thread.join()
    assert left.wait() == 0
    assert outcome.status == "finished"
    assert "waiting for a" in capsys.readouterr().err
    assert (runner.runs_dir / "a.log").read_text().count("hello") == 1


LAUNCHER = "Traceback:\n  File x\nsubprocess.CalledProcessError: Command 'python' "
STATUS_2 = f"{LAUNCHER}returned non-zero exit status 2."
BAR = "\rlora: 50%|## | 1/2 [00:34<00:34]"
NO_ROOM = "[rank0]: torch.OutOfMemoryError: no room"


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (2, "step 1\nerror: bad value\n", (2, "bad value")),
        (1, f"{BAR}error: not finite\n{BAR}\n{STATUS_2}", (2, "not finite")),
        (1, f"{LAUNCHER}died with <Signals.SIGKILL: 9>.", (-9, "killed by SIGKILL")),
        (1, f"[rank0]: Traceback\n{NO_ROOM}\ntorch.distributed.elastic.x:\n===\n", (1, NO_ROOM)),
        (1, "100%|#####|\rlast words\n\n", (1, "last words")),
    ],
)
def test_the_error_is_the_scripts_and_not_the_launchers(code, said, expected):
    assert explain(code, said) == expected
