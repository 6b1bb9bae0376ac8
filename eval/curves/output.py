"""What the commands that read recorded runs have in common: arguments, files, exit codes."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import run_cli

from ..command import Parser, open_folder
from ..groups import add_arguments
from ..provenance import command_line
from ..records import Format

if TYPE_CHECKING:  # imported where it is used, so that --help does not wait for torch
    from .groups import Group


@dataclass(frozen=True)
class Work:
    """What a command does with the groups of runs that it has read.

    Args:
        measure: the result of the groups, the arguments and the command line; a dataclass with
            ``figures``.
        draw: writes the figures of a result to a folder, and returns their names.
        to_markdown: the report of a result.
    """

    measure: Callable[[list[Group], Namespace, str], Any]
    draw: Callable[[Any, Path], list[str]]
    to_markdown: Callable[[Any], str]


@dataclass(frozen=True)
class Reading:
    """A command that reads groups of runs, sums them up, and draws.

    Args:
        format: of the result.
        described: the module's docstring.
        flag: one more argument, and what ``add_argument`` takes for it.
        work: imports and returns what the command does; called when the arguments are read.
    """

    format: Format
    described: str | None
    flag: tuple[str, dict[str, Any]]
    work: Callable[[], Work]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Read, measure, draw and write.

        Returns:
            The exit code: 0, or 2 after a sentence that says what to mend.
        """
        words = sys.argv[1:] if argv is None else list(argv)

        def read() -> None:
            args = self._parser().read(words)
            from . import groups

            found = groups.gather(args.runs, args.group)
            folder = open_folder(args.output_dir)
            work = self.work()
            result = work.measure(found, args, command_line(f"eval.{self.format.module}", words))
            self._write(result, work, folder)

        return run_cli(read)

    def _parser(self) -> Parser:
        parser = Parser(f"eval.{self.format.module}", self.described)
        add_arguments(parser)
        flag, options = self.flag
        parser.add_argument(flag, **options)
        parser.add_output(self.format.module)
        return parser

    def _write(self, result: Any, work: Work, folder: Path) -> None:
        """Write all files and print the report."""
        drawn = replace(result, figures=work.draw(result, folder))
        report = work.to_markdown(drawn)
        markdown = f"{self.format.module}.md"
        self.format.write(drawn, folder)
        write_text(folder / markdown, report)
        names = ", ".join([self.format.file, markdown, *drawn.figures])
        print(f"{report}\nwritten: {folder}/{names}")
