"""Signals during a run, and the printed command that resumes the run."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bilora_diffusion.core.errors import Interrupted
from bilora_diffusion.run import interruption
from bilora_diffusion.run.interruption import (
    Interruption,
    describe_interruption,
    find_launch,
    resume_command,
)
from tests.scripts.runs import ROOT


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_the_first_signal_waits_for_the_loop_once_a_checkpoint_can_be_saved(number):
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as error, Interruption() as run:
        os.kill(os.getpid(), number)
    assert run.number == error.value.number == number
    with Interruption(patient=True) as run:
        assert run.number is None
        os.kill(os.getpid(), number)
        assert run.number == number
    assert signal.getsignal(number) is handler


def test_only_a_second_press_of_ctrl_c_stops_immediately(monkeypatch):
    """A launcher forwards Ctrl-C as a SIGTERM, or as a second SIGINT right after the first."""
    with Interruption(patient=True) as run:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert run.number == signal.SIGTERM
        monkeypatch.setattr(interruption, "ONE_PRESS_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_ctrl_c_stays_ignored():
    """A shell's background jobs ignore SIGINT, but SIGTERM still ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption(patient=True) as run:
        os.kill(os.getpid(), signal.SIGINT)
        assert run.number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.number == signal.SIGTERM


# Prints the message of an interrupted run. If started with the command in this message, it prints
# its arguments and environment.
STAND_IN = """#!/usr/bin/env python
import json, os, signal, sys
arguments = sys.argv[1:]
if "auto" in arguments:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    print(json.dumps([arguments, precision, os.environ.get("WORLD_SIZE")]))
    sys.exit()
from pathlib import Path
from bilora_diffusion.core.errors import Interrupted
from bilora_diffusion.run.interruption import describe_interruption, find_launch
stop = Interrupted("interrupted at step 2 of 8", signal.SIGINT, Path("none"))
launch = find_launch(arguments)
print(describe_interruption(stop, arguments, launch, overwrites=False))
"""
SECRET = "hf_typed"


def by_shell(line, folder):
    """Run a command line in a shell with another token than the typed one; return its output."""
    binaries = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent)])
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_TOKEN": "hf_of_the_shell",
    }
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "precision", "world_size"),
    [
        ("python 'my script.py'", None, None),
        pytest.param("python -u -m stand_in", None, None, marks=pytest.mark.matrix),
        ("stand-in train", None, None),
        (
            "accelerate launch --cpu --num_processes 1 --mixed_precision bf16 stand_in.py",
            "bf16",
            None,
        ),
        pytest.param(
            "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 1 -m stand_in",
            None,
            "1",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_a_shell_runs_the_printed_command_unchanged(launch, precision, world_size, tmp_path):
    command = tmp_path / "bin" / "stand-in"
    command.parent.mkdir()
    for path in (tmp_path / "my script.py", tmp_path / "stand_in.py", command):
        path.write_text(STAND_IN)
    command.chmod(0o755)
    arguments = ["--instance_prompt", "it's a TOK dog", f"--hub_token={SECRET}"]
    message = by_shell(f"{launch} {shlex.join(arguments)}", tmp_path)
    assert SECRET not in message
    (line,) = [line.strip() for line in message.splitlines() if "auto" in line]
    assert line.startswith(launch)
    added = ["--resume_from_checkpoint", "auto"]
    resumed_arguments = [*arguments[:-1], "--hub_token=hf_of_the_shell", *added]
    if launch == "stand-in train":
        resumed_arguments.insert(0, "train")
    output = by_shell(line, tmp_path).splitlines()[-1]
    assert json.loads(output) == [resumed_arguments, precision, world_size]


def test_a_shell_inserts_the_token_into_the_printed_command(tmp_path, monkeypatch):
    script = tmp_path / "it's a script.py"
    script.write_text(STAND_IN)
    arguments = ["--instance_prompt", "a $HOME", f"--hub_token={SECRET}", "--hub-token", SECRET]
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, str(script), *arguments])
    launch = find_launch(arguments)
    stop = Interrupted("interrupted at step 2 of 8", run_folder=tmp_path)
    message = str(describe_interruption(stop, arguments, launch, overwrites=True))
    assert SECRET not in message
    (line,) = [line.strip() for line in message.splitlines() if "auto" in line]
    words, _, _ = json.loads(by_shell(line, tmp_path))
    token = "hf_of_the_shell"
    assert words[:4] == ["--instance_prompt", "a $HOME", f"--hub_token={token}", "--hub-token"]
    added = ["--overwrite_output_dir", "false", "--resume_from_checkpoint", "auto"]
    assert words[4:] == [token, *added]


@pytest.mark.parametrize(
    ("arguments", "overwrites", "expected"),
    [
        (["--rank", "2"], False, "--rank 2"),
        (["--config", "r.yaml"], True, "--config r.yaml --overwrite_output_dir false"),
        (["--hub_token", "secret", "-x"], False, '--hub_token "$HF_TOKEN" -x'),
    ],
)
def test_the_command_that_resumes_has_the_necessary_arguments(arguments, overwrites, expected):
    command = resume_command(arguments, overwrites)
    assert command == f"{expected} --resume_from_checkpoint auto"
    # The command does not grow with each interruption.
    assert resume_command(shlex.split(command), overwrites) == command


def test_if_the_launcher_and_the_token_are_unknown_the_message_asks_for_both(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("PMI_RANK", "0")  # an MPI process whose parent is not `mpirun`
    arguments = ["--hub_token", SECRET]
    launch = find_launch(arguments)
    assert launch is None
    stop = Interrupted("interrupted at step 2 of 8", run_folder=tmp_path)
    message = str(describe_interruption(stop, arguments, launch, overwrites=False))
    assert "set HF_TOKEN to the token" in message
    assert "the same launcher and script" in message
    assert SECRET not in message
