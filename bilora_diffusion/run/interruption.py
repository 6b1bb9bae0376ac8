"""Ctrl-C and SIGTERM: a run finishes its step, saves a checkpoint and says how to go on.

The first signal only leaves a note, which the loop reads between two steps; a second Ctrl-C stops
at once. Before the first step there is nothing to save, so that the first one does too.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from ..core.errors import Interrupted, is_main_process
from . import checkpoint, runlog

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_PRESS_SECONDS = 1.0
"""Ctrl-C may come twice: from the terminal, and from a launcher that passes it on."""
TOKEN = "$HF_TOKEN"
"""Stands for a secret in a printed command; the shell puts it in."""


class Stop(NamedTuple):
    """End of a run by a signal."""

    number: int  # of the signal
    step: int  # optimizer steps taken
    num_steps: int  # of the whole run
    run: str | None = None  # name of a run of ``--fit``


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
        self._first_press: float | None = None  # time of the first Ctrl-C
        self._earlier_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._process = os.getpid()
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
            return  # a data loader's worker has the handlers, too; the run itself ends it
        if number == signal.SIGINT:
            if self._first_press is None:
                self._first_press = time.monotonic()
            elif time.monotonic() - self._first_press > ONE_PRESS_SECONDS:
                raise KeyboardInterrupt
        if self.number is not None:
            return
        self.number = number
        if not self.patient:
            raise KeyboardInterrupt
        if is_main_process():
            line = "\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n"
            os.write(2, line.encode())  # `print` may itself have been interrupted


@contextlib.contextmanager
def ends_in(sentence: str) -> Iterator[None]:
    """Within the context an interruption ends in ``sentence``, whatever the run itself says."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(sentence, getattr(stop, "number", signal.SIGINT)) from None


def farewell(
    folder: Path,
    stop: Stop,
    arguments: Sequence[str] | None,
    overwrites: bool,
    control_folder: Path | None = None,
) -> Interrupted:
    """The last words of an interrupted run, with the command that goes on from what is saved.

    Args:
        folder: run folder of the run that was stopped.
        arguments: the script's, as they were typed; None for a call from Python.
        overwrites: whether the run was to replace an earlier one.
        control_folder: that of the control run of ``--compare``, which comes last.
    """
    has_finished = stop.step == stop.num_steps and runlog.is_finished(folder)
    if has_finished and control_folder in (None, folder):
        sentence = f"interrupted when the run in {folder} had already finished"
        return Interrupted(sentence, stop.number)

    saved = checkpoint.latest(folder / (stop.run or ""))
    state = "nothing was saved yet" if saved is None else f"{saved} is saved"
    if has_finished:
        state = f"that run is finished, the one in {control_folder} not yet begun"
    # "auto" also starts anew where there is no checkpoint, or where a search or a comparison has
    # only some of its runs.
    has_several_runs = stop.run is not None or control_folder is not None
    value = "auto" if saved is None or has_several_runs else "latest"
    place = "" if stop.run is None else f" of {stop.run}"
    if control_folder is not None:
        place = f" of the run in {folder}"
    if arguments is None:
        command = f"the same arguments and --resume_from_checkpoint {value}"
    else:
        resumed = resuming(arguments, value, overwrites)
        command = shlex.join([sys.argv[0], *resumed]).replace(f"'{TOKEN}'", f'"{TOKEN}"')
    return Interrupted(
        f"interrupted at step {stop.step} of {stop.num_steps}{place}, {state}: go on with the same"
        f" launcher and\n\n    {command}\n",
        stop.number,
    )


def resuming(arguments: Sequence[str], value: str, overwrites: bool) -> list[str]:
    """A script's arguments that go on from a checkpoint instead of starting.

    The last of two flags holds, so that what is added overrules the flags and the recipe.

    Args:
        value: of ``--resume_from_checkpoint``.
        overwrites: whether the run was to replace an earlier one.
    """
    added = ["--resume_from_checkpoint", value]
    if overwrites:
        added = ["--overwrite_output_dir", "false", *added]
    words = list(arguments)
    for position, word in enumerate(words):
        flag, _, _ = word.partition("=")
        if flag.replace("-", "_") == "__hub_token":  # a secret is not repeated
            if "=" in word:
                words[position] = f"{flag}={TOKEN}"
            elif position + 1 < len(words):
                words[position + 1] = TOKEN
    if words[-len(added) :] == added:  # it was resumed before
        return words
    return words + added
