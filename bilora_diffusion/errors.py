"""What goes wrong through the user's input or during training, and how a script says so."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input. The message is one sentence that names the value and the fix."""


class TrainingError(RuntimeError):
    """Training or export can't go on (a non-finite loss, a file that does not match the model)."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The hint for an unknown `word`: `' (did you mean "bilora"?)'`, or `''`."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


def run_cli(main: Callable[[], None]) -> int:
    """Run a script's `main` and turn the two errors above into one sentence.

    Args:
        main: the script; called without arguments.

    Returns:
        The exit code: 0, or 2 after a `UserError` or `TrainingError`. The sentence goes to stderr,
            and only from
        the main process of a distributed run. Every other exception passes through with its
        traceback.
    """
    try:
        main()
    except (UserError, TrainingError) as error:
        if all(os.environ.get(key, "0") == "0" for key in ("RANK", "LOCAL_RANK")):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
