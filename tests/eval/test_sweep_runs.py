"""Runs in processes: finished, failing and interrupted ones.

The training script is replaced by a fast one; `tests/scripts/test_sweep.py` has the real one.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from eval.sweep import runs
from eval.sweep.plan import Run
from eval.sweep.runs import Runner, last_sentence

SCRIPT = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(exist_ok=True)
(folder / "pid").write_text(str(os.getpid()))
print("hello", " ".join(sys.argv[1:]), flush=True)
if "--sleep" in sys.argv:
    time.sleep(600)
if "--fail" in sys.argv:
    sys.exit("error: no such thing: " + str(folder / "x.png"))
record = {"schema_version": 1, "method": "lora", "status": "finished", "config": {}}
(folder / "run.json").write_text(json.dumps(record))
"""


class DirectRunner(Runner):
    """A runner without accelerate's launcher, whose import takes seconds."""

    def command(self, run):
        words = super().command(run)
        return [sys.executable, *words[words.index(str(self.script)) :]]


@pytest.fixture
def runner(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "runs").mkdir()
    return DirectRunner(script, Path("recipe.yaml"), tmp_path / "runs")


def make_runs(*names, flags=()):
    return [Run(name, "variant", 0, flags) for name in names]


def test_a_failing_run_does_not_stop_the_others_and_only_it_is_repeated(runner):
    a, c = make_runs("a", "c")
    (b,) = make_runs("b", flags=("--fail",))
    outcomes = runner.run_all([a, b, c])
    statuses = [outcome.status for outcome in outcomes]
    assert statuses == ["finished", "failed", "finished"]
    assert (outcomes[1].exit_code, outcomes[1].error) == (1, "no such thing: x.png")
    record = json.loads((runner.runs_dir / "sweep.json").read_text())
    assert [entry["status"] for entry in record["runs"]] == statuses
    # Only the failed run is repeated, with a new log.
    run_record, log = runner.runs_dir / "a" / "run.json", runner.runs_dir / "a.log"
    before = run_record.stat().st_mtime_ns, log.stat().st_mtime_ns
    outcomes = runner.run_all(make_runs("a", "b", "c"))
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    assert (run_record.stat().st_mtime_ns, log.stat().st_mtime_ns) == before
    assert (runner.runs_dir / "b.log").read_text().count("hello") == 1


@pytest.mark.parametrize(
    ("interruption", "sigint_handler"),
    [
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_IGN),  # as in a shell's background job
    ],
)
def test_an_interrupt_ends_all_running_processes(runner, interruption, sigint_handler):
    pid_files = [runner.runs_dir / "a" / "pid", runner.runs_dir / "b" / "pid"]

    def interrupt():
        deadline = time.monotonic() + 100  # processes start slowly on a busy machine
        while not all(file.exists() for file in pid_files) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), interruption)

    before = signal.signal(signal.SIGINT, sigint_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            dataclasses.replace(runner, jobs=2).run_all(make_runs(*"abc", flags=("--sleep",)))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    for file in pid_files:
        # The file is empty if the script ended between creating it and writing to it.
        assert not psutil.pid_exists(int(file.read_text() or 0))
        assert runs.describe_state(file.parent) == "begins at step 0"
    assert not (runner.runs_dir / "c").exists()


LAUNCHER = "Traceback:\n  File x\nsubprocess.CalledProcessError: Command 'python' "


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("step 1\nerror: bad value\n", "bad value"),
        (f"50%|## | 1/2\rerror: not finite\n{LAUNCHER}returned 2.", "not finite"),
        ("100%|#####|\rlast words of /folder/x.png\n\n", "last words of x.png"),
        ("", "no output"),
    ],
)
def test_the_error_is_the_scripts_message_or_the_last_line(output, sentence):
    assert last_sentence(output) == sentence


def test_simultaneous_runs_share_cores_and_gpus(runner, monkeypatch):
    monkeypatch.delenv(runs.THREADS, raising=False)
    monkeypatch.setenv(runs.GPUS, "4,5,7")
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 16)
    assert runner.environment(0) is None
    several = dataclasses.replace(runner, jobs=4)
    environments = [several.environment(slot) for slot in range(4)]
    assert [environment[runs.GPUS] for environment in environments] == ["4", "5", "7", "4"]
    assert {environment[runs.THREADS] for environment in environments} == {"4"}
    monkeypatch.setenv(runs.GPUS, "")
    assert several.environment(1)[runs.GPUS] == ""
    monkeypatch.setenv(runs.THREADS, "1")
    assert several.environment(1)[runs.THREADS] == "1"
