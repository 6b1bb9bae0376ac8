"""How a command line names runs that stand together, and the one that others are compared with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bilora_diffusion.errors import UserError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser, runs: str = "run folders") -> None:
    """The arguments that say which runs.

    Args:
        runs: what may be given one by one, for the help text.
    """
    parser.add_argument("runs", nargs="*", metavar="RUN", help=runs)
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="LABEL=RUN,RUN",
        help="runs that stand together under a name; can be given several times",
    )


def read_groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Label and runs of each ``--group``.

    Raises:
        UserError: one is not LABEL=RUN,RUN.
    """
    found = []
    for word in words:
        label, equals, rest = word.partition("=")
        runs = [run.strip() for run in rest.split(",")]
        if not (equals and label.strip() and all(runs)):
            raise UserError(f'--group "{word}" names no runs: write LABEL=RUN,RUN.')
        found.append((label.strip(), runs))
    return found


def control(labels: Sequence[str], wanted: str) -> int:
    """Position of the ``--control``.

    Raises:
        UserError: there is no such label.
    """
    if wanted not in labels:
        raise UserError(
            f'--control is "{wanted}"{did_you_mean(wanted, labels)}: use one of'
            f" {', '.join(labels)}."
        )
    return labels.index(wanted)
