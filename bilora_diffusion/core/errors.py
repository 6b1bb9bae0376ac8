"""Errors in the user's input and in training, and the one-sentence reports that scripts print."""

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

# Environment variables in which launchers store a process's rank.
RANKS = ("RANK", "LOCAL_RANK")
MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Name of an attribute that is added to exceptions: path of the file with the traceback.
TRACE = "bilora_trace"
# Exit code if the reader of stdout has closed the pipe: 128 + SIGPIPE, as in a shell.
READER_LEFT = 141
# End of the message for weights that exist only as pickles. The braces take "", or an addition such
# as " but model.bin".
PICKLED = (
    "there are no safetensors{}, and reading a pickle can run code: convert it, for example by"
    " https://huggingface.co/spaces/safetensors/convert, or by save_pretrained if you trust it"
)
T = TypeVar("T")


class UserError(ValueError):
    """Bad input. The message is one sentence that names the wrong value and the fix."""


class TrainingError(RuntimeError):
    """Failed training or export, such as a loss that is not finite or a file of another model."""


class Interrupted(KeyboardInterrupt):
    """Interruption by a signal. The message says what was saved and how to resume.

    Attributes:
        number: signal number.
        run_folder: folder of the interrupted training run; None if no run had started, or if the
            message already says how to resume.
    """

    def __init__(
        self, message: str = "", number: int = signal.SIGINT, run_folder: Path | None = None
    ) -> None:
        super().__init__(message)
        self.number = number
        self.run_folder = run_folder


@contextmanager
def ends_in(sentence: str) -> Iterator[None]:
    """Replace the message of an interruption inside the context with ``sentence``."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(sentence, getattr(stop, "number", signal.SIGINT)) from None


# Exceptions that libraries raise deliberately for bad input. PyTorch raises RuntimeError.
LIBRARY_ERRORS = (ValueError, OSError, RuntimeError, ImportError)


@contextmanager
def as_user_error(
    sentence: str, fix: str, errors: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Convert a library's error inside the context into a one-sentence `UserError`.

    Args:
        sentence: the problem in the user's terms, such as "config.json can't be read".
        fix: what the user should do, without a final period.
        errors: exceptions to convert. The default is all of them, since a library may raise any
            exception for a damaged file. A `UserError`, a `TrainingError` and a full disk's error
            are never converted. Pass `LIBRARY_ERRORS` if the context runs much of this
            package's own code: any other exception, such as an AttributeError, is then a bug, and
            `report_errors` keeps its traceback.
    """
    try:
        yield
    except (UserError, TrainingError):
        raise
    except errors as error:
        if disk_is_full(error):
            raise  # `report_errors` has its own message for a full disk
        if isinstance(error, OSError) and "`safetensors`" in str(error):
            raise UserError(f"{sentence}, since {PICKLED.format('')}.") from error
        raise UserError(f"{sentence} ({reason(error)}): {fix}.") from error


@contextmanager
def add_source(place: str) -> Iterator[None]:
    """Prefix the message of a `UserError` inside the context with ``place``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}{error}") from error


def read_or_refuse(subject: str, fix: str, load: Callable[[], T]) -> T:
    """Return the result of ``load``, which reads a model or a file; convert errors to UserError."""
    with as_user_error(f"{subject} can't be read", fix):
        return load()


def reason(error: BaseException) -> str:
    """Return an error's message on one line, cut at a space to at most about 240 characters."""
    text = " ".join(str(error).split())
    # Pillow's message ends with a buffer's address, Transformers' with advice for programmers.
    if "cannot identify image file" in text:
        text = "not an image file that Pillow can read"
    if text.startswith("You set `ignore_mismatched_sizes`"):
        text = "the shapes of its weights differ from those in its config.json"
    text, _, _ = text.partition(". If you want to")
    if len(text) > 240:
        head, _, _ = text[:240].rpartition(" ")
        return f"{head or text[:240]} ..."
    return text.rstrip(".: ") or type(error).__name__


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return a hint for an unknown ``word``, such as ' (did you mean "bilora"?)', or ''."""
    close_matches = difflib.get_close_matches(word, list(choices), n=1)
    if not close_matches:
        return ""
    return f' (did you mean "{close_matches[0]}"?)'


def strip_controls(line: str) -> str:
    """Replace non-printable characters, which could control the terminal, with "?".

    File names and texts in files may come from other people.
    """
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def is_main_process() -> bool:
    """Return whether this is the main process, which prints the messages of a distributed run."""
    variables = RANKS
    # accelerate joins MPI processes only on CPUs; on other devices each one is a separate run.
    if "ACCELERATE_USE_CPU" in os.environ:
        variables += MPI_RANKS
    return all(os.environ.get(variable, "0") == "0" for variable in variables)


@dataclass
class ExitCode:
    """A process's exit code; `report_errors` sets its number."""

    number: int = 0


@contextmanager
def report_errors() -> Iterator[ExitCode]:
    """Report an exception inside the context on stderr, in one sentence.

    A `UserError`, a `TrainingError` or an interruption may occur in all processes of a distributed
    run; only the main process reports it. ``BILORA_TRACEBACK=1`` also prints the traceback.

    Yields:
        The exit code, whose number is set when the context exits: 0 if there is no exception; 2
        after a `UserError`, a `TrainingError` or a full disk; 128 plus the signal number (130 for
        Ctrl-C) after an interruption; 141, without a message, if the reader of stdout has closed
        the pipe; 1 after any other exception, whose report names the file with the traceback.
    """
    exit_code = ExitCode()
    try:
        yield exit_code
    except (Exception, KeyboardInterrupt) as error:
        exit_code.number = _report(error)
        if exit_code.number != READER_LEFT:
            print_trace_if_asked(error)


def print_trace_if_asked(error: BaseException) -> None:
    """Print a reported error's traceback if ``BILORA_TRACEBACK=1`` is set."""
    if os.environ.get("BILORA_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)


def run_cli(main: Callable[[], None]) -> int:
    """Run a script's ``main``, report its error (`report_errors`) and return the exit code."""
    with report_errors() as exit_code:
        main()
    return exit_code.number


def _report(error: BaseException) -> int:
    """Print the message for the exception that ended a script; return the exit code."""
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
        _print_error("the disk is full: free some space and run the same command again")
        return 2
    _print_error(f"{describe_error(error)}; {describe_trace(error)}")
    return 1


def describe_error(error: BaseException) -> str:
    """Return a sentence about an error; for the package's own errors it is their message."""
    if isinstance(error, UserError | TrainingError):
        return str(error)
    text = f"unexpected {type(error).__name__}"
    if str(error):
        text += f": {reason(error)}"
    return text


def describe_trace(error: BaseException, folder: Path | None = None) -> str:
    """Return a clause that names the file with an error's traceback; write the file if necessary.

    Args:
        error: the exception.
        folder: folder of a new file, as in `keep_trace`.
    """
    trace = getattr(error, TRACE, None) or keep_trace(error, folder)
    if trace is None:
        return "set BILORA_TRACEBACK=1 to see the trace, which could not be written to a file"
    return f"the trace is in {trace}"


def keep_trace(error: BaseException, folder: Path | None = None) -> Path | None:
    """Write an exception's traceback to a file, which the message of `report_errors` then names.

    Args:
        error: the exception.
        folder: folder of the file; None for a new temporary folder.

    Returns:
        Path of the file; None if it can't be written.
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
    """Return whether stdout's reader, such as ``| head``, is gone; if so, redirect stdout."""
    stdout = 1
    poll = select.poll()
    # The mask is empty, so poll reports only errors, such as a closed pipe.
    poll.register(stdout, 0)
    if not poll.poll(0):
        return False
    # Python flushes stdout when it exits, which would raise BrokenPipeError again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
