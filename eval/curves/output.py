"""What the commands that read recorded runs have in common: arguments, files, exit codes."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion.durable import write_text
from bilora_diffusion.errors import run_cli

from ..command import Parser, open_folder
from ..groups import add_arguments
from ..provenance import command_line
from ..records import Format
from . import groups


@dataclass(frozen=True)
class Reading:
    """A command that reads groups of runs, sums them up, and draws.

    Args:
        format: of the result.
        described: the module's docstring.
        flag: one more argument, and what ``add_argument`` takes for it.
        measure: the result of the groups, the arguments and the command line; a dataclass with
            ``figures``.
        draw: writes the figures of a result to a folder, and returns their names.
        to_markdown: the report of a result.
    """

    format: Format
    described: str | None
    flag: tuple[str, dict[str, Any]]
    measure: Callable[[list[groups.Group], Namespace, str], Any]
    draw: Callable[[Any, Path], list[str]]
    to_markdown: Callable[[Any], str]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Read, measure, draw and write.

        Returns:
            The exit code: 0, or 2 after a sentence that says what to mend.
        """
        words = sys.argv[1:] if argv is None else list(argv)

        def work() -> None:
            args = self._parser().read(words)
            found = groups.gather(args.runs, args.group)
            folder = open_folder(args.output_dir)
            self._write(
                self.measure(found, args, command_line(f"eval.{self.format.module}", words)), folder
            )

        return run_cli(work)

    def _parser(self) -> Parser:
        parser = Parser(f"eval.{self.format.module}", self.described)
        add_arguments(parser)
        flag, options = self.flag
        parser.add_argument(flag, **options)
        parser.add_output(self.format.module)
        return parser

    def _write(self, result: Any, folder: Path) -> None:
        """Write all files and print the report."""
        drawn = replace(result, figures=self.draw(result, folder))
        report = self.to_markdown(drawn)
        markdown = f"{self.format.module}.md"
        self.format.write(drawn, folder)
        write_text(folder / markdown, report)
        names = ", ".join([self.format.file, markdown, *drawn.figures])
        print(f"{report}\nwritten: {folder}/{names}")
