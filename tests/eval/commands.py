"""Runs an evaluation as its command line does."""

from collections.abc import Callable, Sequence
from pathlib import Path

from eval.results import table
from eval.results.table import Result


def result_of(main: Callable[[Sequence[str]], int], out: Path, *words: object) -> Result:
    """The result that a command with these words leaves in the folder ``out``."""
    argv = [str(word) for word in words]
    assert main([*argv, "--output_dir", str(out)]) == 0
    return table.read(out)
