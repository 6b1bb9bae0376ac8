"""Run an evaluation from its command line."""

from collections.abc import Callable, Sequence
from pathlib import Path

from eval.results import table
from eval.results.table import Result


def result_of(main: Callable[[Sequence[str]], int], out: Path, *words: object) -> Result:
    """Run a command with these arguments and return the result that it writes into ``out``."""
    argv = [str(word) for word in words]
    assert main([*argv, "--output_dir", str(out)]) == 0
    return table.read(out)
