"""Errors of the user's input and of training, and how a script says so."""

from __future__ import annotations

import difflib
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .durable import disk_is_full

RANKS = ("RANK", "LOCAL_RANK")
MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
T = TypeVar("T")
TRACE = "bilora_trace"  # attribute of an exception: the file that holds its trace
READER_LEFT = 141  # exit code where nobody reads the output: 128 + SIGPIPE
PICKLED = (
    "there are no safetensors{}, and reading a pickle can run code: convert it, for example by"
    " https://huggingface.co/spaces/safetensors/convert, or by save_pretrained where you trust it"
)


class UserError(ValueError):
    """Bad input. The message is one sentence that names the value and the fix."""


class TrainingError(RuntimeError):
    """Training or export can't go on (a non-finite loss, a file that does not match the model)."""


class Diverged(TrainingError):
    """A loss is not finite, which the run's own options are to blame for."""


class Interrupted(KeyboardInterrupt):
    """A signal, by its number, ended the work. The message says what is saved and how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def translated(sentence: str, fix: str) -> Iterator[None]:
    """Within the context, whatever a library raises becomes one sentence; a full disk stays one.

    Args:
        sentence: what can't be done, in the user's words, such as "config.json can't be read".
        fix: what to do, without a period.
    """
    try:
        yield
    except (UserError, TrainingError):
        raise
    except Exception as error:  # damaged files end anywhere in the libraries
        if disk_is_full(error):
            raise
        if isinstance(error, OSError) and "`safetensors`" in str(error):
            raise UserError(f"{sentence}, since {PICKLED.format('')}.") from error
        raise UserError(f"{sentence} ({reason(error)}): {fix}.") from error


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Within the context, the sentence of a ``UserError`` begins with a place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}{error}") from error


def reading(subject: str, fix: str, load: Callable[[], T]) -> T:
    """Read a part of a model, or a file, by ``load``, with its errors `translated`."""
    with translated(f"{subject} can't be read", fix):
        return load()


def reason(error: BaseException) -> str:
    """An error's message, short and in one line."""
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:  # and the address of a buffer
        text = "not an image file that Pillow knows"
    if text.startswith("You set `ignore_mismatched_sizes`"):
        text = "its weights are of other shapes than its config.json says"
    text = text.partition(". If you want to")[0]
    return text[:240].rstrip(".: ") or type(error).__name__


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The hint for an unknown `word`: `' (did you mean "bilora"?)'`, or `''`."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


def strip_controls(line: str) -> str:
    """Put "?" for what could steer the terminal: names in files are other people's text."""
    return "".join(char if char.isprintable() else "?" for char in line)


def is_main_process() -> bool:
    """Test that this is the process of a distributed run that prints, or the only one."""
    # accelerate heeds MPI's on the CPU only; elsewhere each of MPI's processes is a run of its own.
    ranks = RANKS + (MPI_RANKS if "ACCELERATE_USE_CPU" in os.environ else ())
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


@dataclass
class ExitCode:
    """What a process ends with, known when the context of `reported` is left."""

    number: int = 0


@contextmanager
def reported() -> Iterator[ExitCode]:
    """Around a script's work: say in one sentence on stderr what ended it, and go on.

    Of an error that all processes of a distributed run meet, only the main one reports it.

    Yields:
        The exit code: 0; 2 after a `UserError`, a `TrainingError` or where a disk is full; 128 and
        the signal's number (130 for Ctrl-C) after an interruption; 1 after any other exception,
        whose trace is in the file that the sentence names. With ``BILORA_TRACEBACK=1`` it is
        printed too. Of output that nobody reads any more nothing is said: 141.
    """
    code = ExitCode()
    try:
        yield code
    except (Exception, KeyboardInterrupt) as error:
        code.number = _report(error)
        if code.number != READER_LEFT:
            print_trace_if_asked(error)


def print_trace_if_asked(error: BaseException) -> None:
    """Print the trace of an error whose sentence was printed, with ``BILORA_TRACEBACK=1``."""
    if os.environ.get("BILORA_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)


def run_cli(main: Callable[[], None]) -> int:
    """Run a script's `main`, `reported`; returns the exit code."""
    with reported() as code:
        main()
    return code.number


def _report(error: BaseException) -> int:
    """Say in one sentence what ended a script; returns the exit code."""
    if isinstance(error, UserError | TrainingError):
        _say(str(error), only_main=True)
        return 2
    if isinstance(error, KeyboardInterrupt):
        if is_main_process():
            print(str(error) or "interrupted", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    if isinstance(error, BrokenPipeError) and _reader_left():
        return READER_LEFT
    if disk_is_full(error):
        _say("the disk is full: make room and give the same command again")
        return 2
    trace = getattr(error, TRACE, None) or keep_trace(error)
    _say(f"{unexpected(error)}; the trace is in {trace}")
    return 1


def unexpected(error: BaseException) -> str:
    """An exception that nobody foresaw, as the start of a sentence."""
    return f"unexpected {type(error).__name__}" + (f": {reason(error)}" if str(error) else "")


def keep_trace(error: BaseException, folder: Path | None = None) -> Path | None:
    """Write an exception's trace to a file in ``folder``, by default a temporary one, if it can be;
    `run_cli` then names it.
    """
    rank = os.environ.get("RANK", "0")
    text = "".join(traceback.format_exception(error))
    try:
        path = folder or Path(tempfile.mkdtemp(prefix="bilora-"))
        path /= "error.txt" if rank == "0" else f"error-{rank}.txt"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None
    setattr(error, TRACE, path)
    return path


def _say(sentence: str, only_main: bool = False) -> None:
    if is_main_process() or not only_main:
        print(f"error: {strip_controls(' '.join(sentence.split()))}", file=sys.stderr)


def _reader_left() -> bool:
    """Test that nobody reads stdout any more, as after ``| head``; then it is led nowhere."""
    stdout = 1
    poll = select.poll()
    poll.register(stdout, 0)  # errors are reported without a mask
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # Python flushes it at its end
    return True
