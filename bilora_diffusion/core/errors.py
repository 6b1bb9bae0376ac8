"""Errors of the user's input and of training, and how a script reports them in one sentence."""

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

# Variables in which launchers say which of its processes a process is.
RANKS = ("RANK", "LOCAL_RANK")
MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Attribute of an exception: the file that holds its trace.
TRACE = "bilora_trace"
# Exit code where nobody reads the output any more: 128 + SIGPIPE, as a shell has it.
READER_LEFT = 141
# End of the sentence on weights that exist as pickles only; the braces take a place.
PICKLED = (
    "there are no safetensors{}, and reading a pickle can run code: convert it, for example by"
    " https://huggingface.co/spaces/safetensors/convert, or by save_pretrained where you trust it"
)
T = TypeVar("T")


class UserError(ValueError):
    """Bad input. The message is one sentence that names the value and the fix."""


class TrainingError(RuntimeError):
    """Training or export can't go on: a loss is not finite, or a file does not match the model."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work. The message says what is saved and how to resume.

    Attributes:
        number: number of the signal.
        run_folder: folder of the training run that it ended; None where no run had begun.
    """

    def __init__(
        self, message: str = "", number: int = signal.SIGINT, run_folder: Path | None = None
    ) -> None:
        super().__init__(message)
        self.number = number
        self.run_folder = run_folder


@contextmanager
def ends_in(sentence: str) -> Iterator[None]:
    """Replace the message of an interruption within the context by ``sentence``."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(sentence, getattr(stop, "number", signal.SIGINT)) from None


# What libraries raise on purpose for bad input; PyTorch's own errors are RuntimeErrors.
LIBRARY_ERRORS = (ValueError, OSError, RuntimeError, ImportError)


@contextmanager
def as_user_error(
    sentence: str, fix: str, errors: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Context manager: turns an error of a library into a `UserError` of one sentence.

    Args:
        sentence: what can't be done, in the user's words, such as "config.json can't be read".
        fix: what to do, without a period.
        errors: exceptions that are turned. A damaged file raises anything in its library. Where
            much of this package's own code runs, give `LIBRARY_ERRORS`: any other exception, such
            as an AttributeError, is a defect of that code, whose trace `report_errors` keeps.
    """
    try:
        yield
    except (UserError, TrainingError):
        raise
    except errors as error:
        if disk_is_full(error):
            raise  # `report_errors` has a sentence of its own for it
        if isinstance(error, OSError) and "`safetensors`" in str(error):
            raise UserError(f"{sentence}, since {PICKLED.format('')}.") from error
        raise UserError(f"{sentence} ({reason(error)}): {fix}.") from error


@contextmanager
def add_source(place: str) -> Iterator[None]:
    """Context manager: puts a place in front of the sentence of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}{error}") from error


def read_or_refuse(subject: str, fix: str, load: Callable[[], T]) -> T:
    """Return what ``load`` reads of a model or a file; its errors become `UserError`s."""
    with as_user_error(f"{subject} can't be read", fix):
        return load()


def reason(error: BaseException) -> str:
    """An error's message in one line of about 240 letters, cut between two words."""
    text = " ".join(str(error).split())
    # Pillow's message ends in the address of a buffer, Transformers' in advice for programmers.
    if "cannot identify image file" in text:
        text = "not an image file that Pillow knows"
    if text.startswith("You set `ignore_mismatched_sizes`"):
        text = "its weights have other shapes than its config.json says"
    text, _, _ = text.partition(". If you want to")
    if len(text) > 240:
        head, _, _ = text[:240].rpartition(" ")
        return f"{head or text[:240]} ..."
    return text.rstrip(".: ") or type(error).__name__


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The hint for an unknown `word`: `' (did you mean "bilora"?)'`, or `''`."""
    close_matches = difflib.get_close_matches(word, list(choices), n=1)
    if not close_matches:
        return ""
    return f' (did you mean "{close_matches[0]}"?)'


def strip_controls(line: str) -> str:
    """Put "?" in place of letters that could steer the terminal.

    A name that a file has, or a text in it, may be made by somebody else.
    """
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def is_main_process() -> bool:
    """Test that this is the process of a distributed run that prints, or the only one."""
    variables = RANKS
    # accelerate joins MPI's processes on CPUs only; elsewhere each of them is a run by itself.
    if "ACCELERATE_USE_CPU" in os.environ:
        variables += MPI_RANKS
    return all(os.environ.get(variable, "0") == "0" for variable in variables)


@dataclass
class ExitCode:
    """Exit code of a process; `report_errors` sets its number."""

    number: int = 0


@contextmanager
def report_errors() -> Iterator[ExitCode]:
    """Context manager: reports the exception that ends a script on stderr, in one sentence.

    All processes of a distributed run may meet one error; the main one alone reports it.

    Yields:
        The exit code, whose number is set when the context exits: 0; 2 after a `UserError`, a
        `TrainingError` or a full disk; 128 and the signal's number (130 for Ctrl-C) after an
        interruption; 141, without a sentence, where nobody reads the output any more; 1 after any
        other exception. The sentence then names the file that holds the trace, and
        ``BILORA_TRACEBACK=1`` prints it.
    """
    exit_code = ExitCode()
    try:
        yield exit_code
    except (Exception, KeyboardInterrupt) as error:
        exit_code.number = _report(error)
        if exit_code.number != READER_LEFT:
            print_trace_if_asked(error)


def print_trace_if_asked(error: BaseException) -> None:
    """Print the trace of a reported error if ``BILORA_TRACEBACK=1`` is set."""
    if os.environ.get("BILORA_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)


def run_cli(main: Callable[[], None]) -> int:
    """Run `main` of a script and report its error (`report_errors`); returns the exit code."""
    with report_errors() as exit_code:
        main()
    return exit_code.number


def _report(error: BaseException) -> int:
    """Print the sentence on what ended a script; returns the exit code."""
    if isinstance(error, UserError | TrainingError):
        if is_main_process():
            _print_error(str(error))
        return 2
    if isinstance(error, KeyboardInterrupt):
        if is_main_process():
            print(str(error) or "interrupted", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    if isinstance(error, BrokenPipeError) and _reader_left():
        return READER_LEFT
    if disk_is_full(error):
        _print_error("the disk is full: make room and give the same command again")
        return 2
    _print_error(f"{describe_error(error)}; {describe_trace(error)}")
    return 1


def describe_error(error: BaseException) -> str:
    """An error as a sentence: the package's own errors have all facts in theirs."""
    if isinstance(error, UserError | TrainingError):
        return str(error)
    text = f"unexpected {type(error).__name__}"
    if str(error):
        text += f": {reason(error)}"
    return text


def describe_trace(error: BaseException, folder: Path | None = None) -> str:
    """A clause on the place of an error's trace, which is kept now if it was not before.

    Args:
        error: the exception.
        folder: that of `keep_trace`.
    """
    trace = getattr(error, TRACE, None) or keep_trace(error, folder)
    if trace is None:
        return "set BILORA_TRACEBACK=1 to see the trace, which could not be written to a file"
    return f"the trace is in {trace}"


def keep_trace(error: BaseException, folder: Path | None = None) -> Path | None:
    """Write an exception's trace to a file, which the sentence of `report_errors` then names.

    Args:
        error: the exception.
        folder: folder of the file; None for a new temporary one.

    Returns:
        The file; None if it can't be written.
    """
    rank = os.environ.get("RANK", "0")
    name = "error.txt" if rank == "0" else f"error-{rank}.txt"
    text = "".join(traceback.format_exception(error))
    try:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="bilora-"))
        path = folder / name
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None
    setattr(error, TRACE, path)
    return path


def _print_error(sentence: str) -> None:
    line = " ".join(sentence.split())
    print(f"error: {strip_controls(line)}", file=sys.stderr)


def _reader_left() -> bool:
    """Test that nobody reads stdout any more, as after ``| head``; if so, redirect it."""
    stdout = 1
    poll = select.poll()
    # The empty mask waits for no data; a closed pipe is an error, which is reported without a mask.
    poll.register(stdout, 0)
    if not poll.poll(0):
        return False
    # Python flushes stdout when it ends, which would raise once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
