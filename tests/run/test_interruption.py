"""What a signal does to a run, and the command that goes on."""

import os
import signal
import sys

import pytest

from bilora_diffusion.run import interruption
from bilora_diffusion.run.interruption import (
    Interruption,
    Stop,
    describe_interruption,
    resume_arguments,
)


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_the_first_signal_waits_for_the_loop_once_something_can_be_saved(number):
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interruption() as run:
        os.kill(os.getpid(), number)
    assert run.number == number
    with Interruption(patient=True) as run:
        assert run.number is None
        os.kill(os.getpid(), number)
        assert run.number == number
    assert signal.getsignal(number) is handler


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
    ("arguments", "overwrites", "expected"),
    [
        (["--rank", "2"], False, ["--rank", "2"]),
        (["--config", "r.yaml"], True, ["--config", "r.yaml", "--overwrite_output_dir", "false"]),
        (["--hub_token", "secret", "-x"], False, ["--hub_token", "$HF_TOKEN", "-x"]),
        (["--hub-token=secret"], False, ["--hub-token=$HF_TOKEN"]),
    ],
)
def test_the_arguments_that_go_on(arguments, overwrites, expected):
    resumed = resume_arguments(arguments, "latest", overwrites)
    assert resumed == [*expected, "--resume_from_checkpoint", "latest"]
    assert resume_arguments(resumed, "latest", overwrites) == resumed


@pytest.mark.parametrize(
    ("program", "quoted_program"),
    [("bilora train", "bilora train"), ("it's/train.py", "'it'\"'\"'s/train.py'")],
)
def test_the_printed_command_has_the_program_as_a_shell_reads_it(
    program, quoted_program, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", [program])
    stop = Stop(signal.SIGINT, 2, 8)
    message = str(describe_interruption(tmp_path, stop, ["--rank", "2"], overwrites=False))
    command = f"{quoted_program} --rank 2 --resume_from_checkpoint auto"
    assert command in [line.strip() for line in message.splitlines()]


def test_a_search_that_is_stopped_between_its_runs_has_saved_them(tmp_path):
    stop = Stop(signal.SIGINT, 0, 8, run="the next run")
    message = str(describe_interruption(tmp_path, stop, [], overwrites=False))
    assert "the runs of the search before it are saved" in message
    assert "--resume_from_checkpoint auto" in message
