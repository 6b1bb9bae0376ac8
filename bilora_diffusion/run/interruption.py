"""Ctrl-C and SIGTERM: a run finishes its step, saves a checkpoint and prints how to resume.

A Ctrl-C during step 137 leads to the following:

1. `Interruption` stores the number of the signal and prints that the run stops after this step. A
   second Ctrl-C stops immediately.
2. `train.loop` logs step 137 and takes the measurements that are due. `Trainer.stop_signal` then
   returns the number, and `train.resume.save` writes ``checkpoints/step-137``.
3. `train.setup` raises `Interrupted`, and `train.loop.record_outcome` records the status
   "interrupted" in run.json.
4. `train.command` releases the engine and the run folder, and adds the command that resumes
   (`describe_interruption`).
5. `core.errors.report_errors` prints the message. The exit code is 128 plus the number of the
   signal: 130.

Before the first step there is nothing to save, so the first signal stops a single process
immediately; several processes stop together after a step.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ..core.errors import MPI_RANKS, Interrupted, is_main_process
from . import checkpoint, runlog

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds within which two signals are one Ctrl-C, which may arrive both from the terminal and from
# a launcher that passes it on.
ONE_PRESS_SECONDS = 1.0
# Replaces the hub token in a printed command; the shell expands it.
TOKEN = "$HF_TOKEN"
# Environment variables of launchers (accelerate, torchrun, MPI); each launcher sets one of them.
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", *MPI_RANKS)


class Interruption:
    """Context in which SIGINT and SIGTERM ask the run to stop.

    An ignored signal, such as SIGINT in a shell's background job, stays ignored. Outside the main
    thread no handlers are installed.

    Args:
        patient: whether the first signal lets the current step finish. It is False before the first
            step, when nothing can be saved: the signal then raises `Interrupted`.

    Attributes:
        number: number of the first signal; None before it arrives.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.number: int | None = None
        self._first_press: float | None = None  # time of the first Ctrl-C
        self._earlier_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._process = os.getpid()
        # Python allows signal handlers only in the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
        self._earlier_handlers.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker inherits the handlers; the run itself ends the worker
        if number == signal.SIGINT:
            if self._first_press is None:
                self._first_press = time.monotonic()
            # A second Ctrl-C, pressed by hand.
            elif time.monotonic() - self._first_press > ONE_PRESS_SECONDS:
                raise Interrupted(number=number)
        if self.number is not None:
            return
        self.number = number
        if not self.patient:
            raise Interrupted(number=number)
        if is_main_process():
            end = "stopping after this step and its measurements, with a checkpoint"
            line = f"\n{end}; press Ctrl-C again to stop immediately\n"
            os.write(2, line.encode())  # `print` may itself have been interrupted


def find_launch(arguments: Sequence[str]) -> str | None:
    """Return the part of this command line before the script's arguments, quoted for a shell.

    It starts with the launcher and its options if a launcher started this process, otherwise with
    the interpreter. Call this at the start, since a launcher may end before this process.

    Args:
        arguments: the script's arguments, as they were typed.

    Returns:
        The text; None if it is not known, as in a notebook or under another launcher.
    """
    words = sys.orig_argv
    prefix = ""
    if any(name in os.environ for name in LAUNCHED):
        try:
            launcher = psutil.Process(os.getppid())
            words = launcher.cmdline()
            # This variable joins CPU processes into one run; it may have been typed before the
            # command.
            joins = launcher.environ().get("ACCELERATE_USE_CPU")
        except psutil.Error:
            return None
        if joins is not None:
            prefix = f"ACCELERATE_USE_CPU={shlex.quote(joins)} "
    count = len(words) - len(arguments)
    if count < 1 or words[count:] != list(arguments):
        return None
    program = words[:count]
    # For a command such as `bilora` or `torchrun` the system starts Python with the command's file.
    if len(program) > 1:
        name = Path(program[1]).name
        command = shutil.which(name)
        if command is not None and os.path.realpath(command) == os.path.realpath(program[1]):
            program[:2] = [name]
    return prefix + shlex.join(program)


def describe_interruption(
    stop: Interrupted,
    arguments: Sequence[str] | None,
    launch: str | None,
    overwrites: bool,
    control_folder: Path | None = None,
) -> Interrupted:
    """Return an interruption whose message contains the command that resumes the run.

    If there is nothing to resume, return ``stop`` itself.

    Args:
        stop: interruption of a run (`train.setup.run`).
        arguments: the script's arguments, as they were typed; None for a call from Python.
        launch: the command line before the arguments (`find_launch`).
        overwrites: whether the run was to replace an earlier one.
        control_folder: folder of the control run of ``--compare``, which runs last.
    """
    folder = stop.run_folder
    if folder is None:
        return stop
    has_finished = runlog.is_finished(folder)
    if has_finished and control_folder in (None, folder):
        return stop

    saved = checkpoint.latest(folder)
    place = ""
    if has_finished:
        state = f"before the one in {control_folder} started"
    else:
        state = "nothing was saved yet" if saved is None else f"{saved} is saved"
        if control_folder is not None:
            place = f" of the run in {folder}"
    instruction = "resume with"
    if arguments is None:
        command = "the same arguments and --resume_from_checkpoint auto"
    else:
        command = resume_command(arguments, overwrites)
        if launch is None:
            instruction += " the same launcher and script, and these arguments:"
        else:
            command = f"{launch} {command}"
        if TOKEN in command and "HF_TOKEN" not in os.environ:
            instruction = f"set HF_TOKEN to the token, and {instruction}"
    return Interrupted(
        f"{stop}{place}, {state}: {instruction}\n\n    {command}\n",
        stop.number,
    )


def resume_command(arguments: Sequence[str], overwrites: bool) -> str:
    """Return a script's arguments that resume from the newest checkpoint, quoted for a shell.

    If a flag is given twice, the last value is used, so the added flags override the others and the
    recipe. If a run has no checkpoint yet, such as a control that has not started, "auto" starts
    it.

    Args:
        arguments: the script's arguments, as they were typed.
        overwrites: whether the run was to replace an earlier one.
    """
    added = ["--resume_from_checkpoint", "auto"]
    if overwrites:
        added = ["--overwrite_output_dir", "false", *added]
    words = list(arguments)
    # The flags are not added twice, so the command does not grow with each interruption.
    if words[-len(added) :] != added:
        words += added
    quoted: list[str] = []
    is_secret = False  # whether the word is the value of a token flag before it
    for word in words:
        flag, equals_sign, _ = word.partition("=")
        is_token_flag = flag.replace("-", "_") == "__hub_token"
        if is_secret:
            quoted.append(f'"{TOKEN}"')  # a shell expands it in double quotes
        elif is_token_flag and equals_sign:
            quoted.append(f'{flag}="{TOKEN}"')
        else:
            quoted.append(shlex.quote(word))
        is_secret = is_token_flag and not equals_sign
    return " ".join(quoted)
