"""What a signal does to a run, and the command that resumes it."""

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
def test_the_first_signal_waits_for_the_loop_once_something_can_be_saved(number):
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as error, Interruption() as run:
        os.kill(os.getpid(), number)
    assert run.number == error.value.number == number
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


# Prints what an interrupted run prints; started by that command, it prints what it was given.
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
    """What a command line prints, run by a shell that has another token than the typed one."""
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
def test_a_shell_runs_the_printed_command_as_it_stands(launch, precision, world_size, tmp_path):
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


def test_a_shell_puts_the_token_into_the_printed_command(tmp_path, monkeypatch):
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
def test_the_arguments_that_go_on(arguments, overwrites, expected):
    command = resume_command(arguments, overwrites)
    assert command == f"{expected} --resume_from_checkpoint auto"
    # It does not grow with each interruption.
    assert resume_command(shlex.split(command), overwrites) == command


def test_without_the_launcher_and_the_token_the_sentence_asks_for_both(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("PMI_RANK", "0")  # a process of MPI, whose parent is not `mpirun`
    arguments = ["--hub_token", SECRET]
    launch = find_launch(arguments)
    assert launch is None
    stop = Interrupted("interrupted at step 2 of 8", run_folder=tmp_path)
    message = str(describe_interruption(stop, arguments, launch, overwrites=False))
    assert "set HF_TOKEN to the token" in message
    assert "the same launcher and script" in message
    assert SECRET not in message
