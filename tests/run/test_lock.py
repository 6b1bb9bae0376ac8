"""The lock of a run folder."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.export.__main__ import main as export
from bilora_diffusion.image.script import train
from bilora_diffusion.run.lock import LOCK_FILE, locked
from bilora_diffusion.run.runlog import RunLog
from bilora_diffusion.train import command
from tests.run.recorded_runs import save
from tests.scripts.runs import ROOT, flags

HOLD_AND_FORK = """
import os, signal, sys, time
from pathlib import Path
from bilora_diffusion.run.lock import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data loader's worker
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    signal.pause()
"""


def test_one_command_at_a_time_may_use_a_folder_and_the_lock_leaves_no_file(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        owner = f"process {os.getpid()} on {platform.node()} is writing into {folder}"
        with pytest.raises(UserError, match=owner), locked(folder):
            pass
        assert (folder / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    with locked(folder):
        (folder / "notes.txt").touch()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_killed_process_and_its_forks_do_not_hold_the_lock(tmp_path):
    command = [sys.executable, "-c", HOLD_AND_FORK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(process.stdout.readline())
    try:
        with (
            pytest.raises(UserError, match=f"process {process.pid} .*{tmp_path}"),
            locked(tmp_path),
        ):
            pass
        process.kill()
        process.wait()
        assert (tmp_path / LOCK_FILE).exists()
        owner = f"process {os.getpid()} "  # not the killed process
        with locked(tmp_path), pytest.raises(UserError, match=owner), locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK"])
def test_only_the_main_process_of_a_run_takes_the_lock(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with locked(tmp_path):
        monkeypatch.setenv(name, "1")
        with locked(tmp_path):
            pass
        monkeypatch.delenv(name)
        assert (tmp_path / LOCK_FILE).exists()


COMMANDS = {
    "start": {},
    "resume": {"resume_from_checkpoint": "latest"},
    "overwrite": {"overwrite_output_dir": True},
}


class Reached(Exception):
    """Raised when the first run has the lock."""


@pytest.mark.parametrize(("first", "second"), [("start", "overwrite"), ("overwrite", "resume")])
def test_a_second_run_is_refused_before_it_reads_or_deletes(tmp_path, monkeypatch, first, second):
    folder = tmp_path / "run"

    def start_second(_):
        with monkeypatch.context() as patch:
            patch.setattr(command, "build_accelerator", lambda _: pytest.fail("not refused"))
            with pytest.raises(UserError, match=f"writing into {folder}"):
                train(flags(folder, **COMMANDS[second]))
            if first != "start":
                assert export([str(folder), "--step", "1"]) == 2
        raise Reached

    monkeypatch.setattr(command, "build_accelerator", start_second)
    if first != "start":
        RunLog(folder).start({}, method="lora", seed=0, resume_step=None)
        save(folder, 1)
    with pytest.raises(Reached):
        train(flags(folder, **COMMANDS[first]))
    assert folder.exists() == (first != "start")
