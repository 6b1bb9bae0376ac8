"""interruption: what a signal does to a run, and the command that goes on."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from bilora_diffusion.run import interruption
from bilora_diffusion.run.interruption import Interruption, command_line, resuming


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_the_first_signal_waits_for_the_loop_once_something_can_be_saved(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interruption() as run:
        os.kill(os.getpid(), number)
    assert run.number == number
    with Interruption(patient=True) as run:
        assert run.number is None
        os.kill(os.getpid(), number)
        assert run.number == number
    assert signal.getsignal(number) is before


def test_only_a_second_press_of_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes Ctrl-C on, as a SIGTERM or a second SIGINT right after the first."""
    with Interruption(patient=True) as run:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert run.number == signal.SIGTERM
        monkeypatch.setattr(interruption, "ONE_PRESS_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
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
def test_the_command_that_goes_on(given: list[str], overwrites: bool, expected: list[str]) -> None:
    line = ["accelerate", "launch", "train.py"]
    found = resuming([*line, *given], len(given), "latest", overwrites)
    assert found == [*line, *expected, "--resume_from_checkpoint", "latest"]


def test_the_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outermost ancestor that ends with the same arguments is the launcher."""

    ancestors = {
        9: "python -m torch.distributed.run t.py --rank 2",
        8: "accelerate launch t.py --rank 2",
        7: "bash -c make",
        1: "tini t.py --rank 2",
    }
    parents = [SimpleNamespace(pid=pid, cmdline=line.split) for pid, line in ancestors.items()]
    this = SimpleNamespace(pid=10, parents=lambda: parents)
    monkeypatch.setattr(interruption.psutil, "Process", lambda: this)
    own = ["python", "t.py", "--rank", "2"]
    assert command_line(own, ["--rank", "2"]) == (["accelerate", "launch", "t.py", *own[2:]], 2)
    assert command_line(["python", "t.py"], []) == (["python", "t.py"], 0)
