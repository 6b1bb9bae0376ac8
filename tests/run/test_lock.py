"""The lock of a run folder: who gets it, when it is free again, and what it leaves."""

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.export import main as export
from bilora_diffusion.image.script import main as train
from bilora_diffusion.run import lock
from bilora_diffusion.run.lock import hold
from bilora_diffusion.run.runlog import RunLog
from bilora_diffusion.train import running
from tests.run.checkpoints import save
from tests.scripts.runs import flags


def refused(folder: Path) -> None:
    with pytest.raises(UserError, match=str(folder)), hold(folder):
        pass


@contextlib.contextmanager
def forked(act: Callable[[], object]) -> Iterator[None]:
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

    def act() -> None:
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
    def flock(*_: object) -> NoReturn:
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

    def goes_on(_: object) -> NoReturn:
        with monkeypatch.context() as patch:
            patch.setattr(running, "build_accelerator", lambda _: pytest.fail("was let in"))
            with pytest.raises(UserError, match=f"writing into {folder}"):
                train(flags(folder, **ORDERS[second]))
            assert first == "start" or export([str(folder), "--step", "1"]) == 2
        raise Reached

    monkeypatch.setattr(running, "build_accelerator", goes_on)
    if first != "start":
        RunLog(folder).start({}, method="lora", seed=0, resume_step=None)
        save(folder, 1)
    with pytest.raises(Reached):
        train(flags(folder, **ORDERS[first]))
    assert folder.exists() == (first != "start")
