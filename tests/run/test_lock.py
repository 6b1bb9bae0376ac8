"""The lock of a run folder, and what a signal does to a run."""

import contextlib
import errno
import fcntl
import os
import signal
import time

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.export.cli import main as export
from bilora_diffusion.image.script import train
from bilora_diffusion.run import interruption, lock
from bilora_diffusion.run.interruption import Interruption, resuming
from bilora_diffusion.run.lock import hold
from bilora_diffusion.run.runlog import RunLog
from bilora_diffusion.train import command
from tests.run.recorded_runs import save
from tests.scripts.runs import flags


def refused(folder):
    with pytest.raises(UserError, match=str(folder)), hold(folder):
        pass


@contextlib.contextmanager
def forked(act):
    """A child process that has done this and sleeps; it is killed at the end of the context."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            os.write(done, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    try:
        assert os.read(ready, 1)
        yield
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_is_one_commands_and_nothing_is_left(tmp_path):
    folder = tmp_path / "a" / "b"
    with hold(folder):
        assert [path.name for path in folder.iterdir()] == [lock.FILE]
        with pytest.raises(UserError, match=f"{os.getpid()} .*{folder}"), hold(folder):
            pass
        assert (folder / lock.FILE).exists()
        with hold(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    with hold(folder):
        (folder / "notes.txt").touch()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_killed_process_holds_nothing_and_what_it_forked_neither(tmp_path):
    held, worker = hold(tmp_path), tmp_path / "worker"

    def act():
        held.__enter__()
        if (number := os.fork()) == 0:  # as a data loader's worker
            signal.pause()
        worker.write_text(str(number))

    with forked(act):
        refused(tmp_path)
    try:
        assert (tmp_path / lock.FILE).exists()
        with hold(tmp_path):
            pass
    finally:
        os.kill(int(worker.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK"])
def test_of_several_processes_only_the_main_one_takes_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with hold(tmp_path):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with hold(tmp_path):
                pass
        assert (tmp_path / lock.FILE).exists()


def test_without_locks_a_fresh_record_of_a_run_that_goes_on_refuses(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    log = RunLog(tmp_path)
    with hold(tmp_path):  # a new folder
        log.start({}, method="lora", seed=0, resume_step=None)
    refused(tmp_path)
    then = time.time() - lock.STALE_SECONDS - 1
    os.utime(tmp_path / "run.json", (then, then))
    with hold(tmp_path):
        log.close("finished")
    with hold(tmp_path):
        pass


ORDERS = {
    "start": {},
    "resume": {"resume_from_checkpoint": "latest"},
    "fit": {"fit": True, "overwrite_output_dir": True},
}


class Reached(Exception):
    """The first run was let in."""


@pytest.mark.parametrize(("first", "second"), [("start", "fit"), ("fit", "resume")])
def test_a_second_run_is_refused_before_it_reads_or_deletes(tmp_path, monkeypatch, first, second):
    folder = tmp_path / "run"

    def goes_on(_):
        with monkeypatch.context() as patch:
            patch.setattr(command, "build_accelerator", lambda _: pytest.fail("was let in"))
            with pytest.raises(UserError, match=f"writing into {folder}"):
                train(flags(folder, **ORDERS[second]))
            assert first == "start" or export([str(folder), "--step", "1"]) == 2
        raise Reached

    monkeypatch.setattr(command, "build_accelerator", goes_on)
    if first != "start":
        RunLog(folder).start({}, method="lora", seed=0, resume_step=None)
        save(folder, 1)
    with pytest.raises(Reached):
        train(flags(folder, **ORDERS[first]))
    assert folder.exists() == (first != "start")


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_the_first_signal_waits_for_the_loop_once_something_can_be_saved(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interruption() as run:
        os.kill(os.getpid(), number)
    assert run.number == number
    with Interruption(patient=True) as run:
        assert run.number is None
        os.kill(os.getpid(), number)
        assert run.number == number
    assert signal.getsignal(number) is before


def test_only_a_second_press_of_ctrl_c_stops_at_once(monkeypatch):
    """A launcher passes Ctrl-C on, as a SIGTERM or a second SIGINT right after the first."""
    with Interruption(patient=True) as run:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert run.number == signal.SIGTERM
        monkeypatch.setattr(interruption, "ONE_PRESS_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_ctrl_c_stays_ignored():
    """A shell makes its background jobs ignore SIGINT; SIGTERM ends them all the same."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption(patient=True) as run:
        os.kill(os.getpid(), signal.SIGINT)
        assert run.number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.number == signal.SIGTERM


@pytest.mark.parametrize(
    ("given", "overwrites", "expected"),
    [
        (["--rank", "2"], False, ["--rank", "2"]),
        (["--overwrite_output_dir", "--rank", "2"], True, ["--rank", "2"]),
        (["--resume_from_checkpoint", "auto", "-x"], False, ["-x"]),
        (["--config", "r.yaml"], True, ["--config", "r.yaml", "--overwrite_output_dir", "false"]),
        (["--hub_token", "secret"], False, ["--hub_token", "$HF_TOKEN"]),
    ],
)
def test_the_command_that_goes_on(given, overwrites, expected):
    line = ["accelerate", "launch", "train.py"]
    found = resuming([*line, *given], len(given), "latest", overwrites)
    assert found == [*line, *expected, "--resume_from_checkpoint", "latest"]
