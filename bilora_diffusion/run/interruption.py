"""Ctrl-C and SIGTERM: a run finishes its step, saves a checkpoint and says how to go on.

The first signal only leaves a note, which the loop reads between two steps; a second Ctrl-C stops
at once. Before the first step there is nothing to save, so that the first one does too.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import psutil

from ..core.errors import Interrupted, is_main_process
from . import checkpoint, runlog

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_PRESS_SECONDS = 1.0
"""Ctrl-C may come twice: from the terminal, and from a launcher that passes it on."""
TOKEN = "$HF_TOKEN"
CommandLine = tuple[list[str], int]
"""A command, and how many of its last words are the script's arguments."""


class Stop(NamedTuple):
    """End of a run by a signal: its number, the steps taken, those of the whole run, and the name
    of a run of ``--fit``.
    """

    number: int
    step: int
    num_steps: int
    run: str | None = None


class Interruption:
    """Within the context, SIGINT and SIGTERM ask the run to stop, and ``number`` tells which did.

    An ignored SIGINT, as in a job that a shell started in the background, stays ignored. Outside of
    the main thread nothing is installed.

    Args:
        patient: whether the first signal waits for the loop; False where nothing can be saved yet,
            and the signal raises `KeyboardInterrupt`.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.number: int | None = None
        self._pressed: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _received(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that reads data: the run's own ends it
            return
        now, pressed = time.monotonic(), self._pressed
        if number == signal.SIGINT:
            self._pressed = now if pressed is None else pressed
            if pressed is not None and now - pressed > ONE_PRESS_SECONDS:
                raise KeyboardInterrupt
        if self.number is None:
            self.number = number
            if not self.patient:
                raise KeyboardInterrupt
            if is_main_process():  # not by print, which may itself have been interrupted
                line = "\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n"
                os.write(2, line.encode())


@contextlib.contextmanager
def ends_in(said: str) -> Iterator[None]:
    """Within the context an interruption says ``said``, whatever ran says of itself."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(said, getattr(stop, "number", signal.SIGINT)) from None


def farewell(folder: Path, stop: Stop, typed: CommandLine | None, overwrites: bool) -> Interrupted:
    """The last words of an interrupted run, with the command that goes on from what is saved.

    Args:
        typed: the command that started it; None for a call from Python.
        overwrites: whether the run was to replace an earlier one.
    """
    number, step, num_steps, run = stop
    if step == num_steps and runlog.is_finished(folder):
        return Interrupted(f"interrupted when the run in {folder} had already finished", number)
    saved = checkpoint.latest(folder / (run or ""))
    value = "auto" if saved is None or run is not None else "latest"
    kept = "nothing was saved yet" if saved is None else f"{saved} is saved"
    how = f"the same arguments and --resume_from_checkpoint {value}"
    if typed is not None:
        words = resuming(*typed, value, overwrites)
        how = shlex.join(words).replace(f"'{TOKEN}'", f'"{TOKEN}"')
    where = "" if run is None else f" of {run}"
    said = f"interrupted at step {step} of {num_steps}{where}, {kept}: go on with\n\n    {how}\n"
    return Interrupted(said, number)


def command_line(own: Sequence[str], arguments: Sequence[str]) -> CommandLine:
    """The command that was typed: the process's own, or that of the outermost launcher (accelerate
    launch, torchrun, timeout), whose command line ends with the script's arguments, too.

    Ask at the start: Ctrl-C may end a launcher before what it launched.
    """
    line, count = list(own), len(arguments)
    try:
        ancestors = psutil.Process().parents() if count else []
    except psutil.Error:
        ancestors = []
    for ancestor in ancestors:
        with contextlib.suppress(psutil.Error):
            words = ancestor.cmdline()
            if ancestor.pid > 1 and len(words) > count and words[-count:] == list(arguments):
                line = words
    return line, count


def resuming(line: Sequence[str], count: int, value: str, overwrites: bool) -> list[str]:
    """A training command that goes on from a checkpoint instead of starting.

    Args:
        line, count: as of `CommandLine`.
        value: of ``--resume_from_checkpoint``.
        overwrites: whether the run was to replace an earlier one, by a flag or by its recipe.
    """
    start = len(line) - count
    words, kept = list(line[start:]), []
    while words:
        word = words.pop(0)
        name, _, given = word.partition("=")
        name = name.replace("-", "_").removeprefix("__")
        if name == "hub_token":  # a secret is not repeated
            kept += ["--hub_token", TOKEN]
        elif name in ("resume_from_checkpoint", "overwrite_output_dir"):
            overwrites = overwrites and name != "overwrite_output_dir"
        else:
            kept.append(word)
            continue
        if not given and words and not words[0].startswith("-"):
            words.pop(0)
    off = ["--overwrite_output_dir", "false"] if overwrites else []
    return [*line[:start], *kept, *off, "--resume_from_checkpoint", value]
