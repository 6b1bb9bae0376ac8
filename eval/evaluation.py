"""Base class of the commands: it gathers subjects, measures rows, and writes figures and a report.

A command defines the rows of a subject and the figures that show them:

    class Flips(Evaluation):
        name = "flips"

        def rows(self, subject: Subject) -> Iterator[Row]:
            yield subject.row("flips", count(subject.folder))

    main = Flips.main

Tables are described by columns, and figures by panels.

Hooks import torch and scipy inside their bodies, so that ``--help`` does not wait for the imports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from bilora_diffusion.core.errors import UserError, strip_controls

from .command import Parser, open_folder, remove_last_figures, require_free, run
from .results import compare, plot, report, table
from .results.plot import Panel
from .results.report import Column
from .results.table import Metric, Result, Row, Summary, command_line, provenance_of_runs
from .subjects import Subject, gather


class Evaluation:
    """Base class of a command; a subclass overrides the hooks that differ.

    The hooks are called in this order: ``arguments``, ``subjects``, ``prepare``, ``produce``,
    ``rows`` for each subject, ``complete``, ``draw_figures``, ``report``. The output folder is not
    created or changed before ``prepare`` has returned.

    Attributes:
        name: kind of the result.
        module: module of the command, as in ``python -m MODULE``; by default ``eval.NAME``.
        described: text of ``--help``; by default the docstring of the subclass's module. Its first
            paragraph is shown above the flags.
        options: dataclasses of the flags; see `bilora_diffusion.core.fields`.
        runs: help text of the argument that names the runs.
        title: title of the report; by default the name.
        metrics: titles and formats of the metrics, by name.
        unit: unit that is averaged and paired: "seed" or "item".
        args: the parsed command line.
        command: the command line as text, without machine paths.
        folder: output folder.
        settings, notes: settings and notes of the result; hooks add to them.
        exit_code: exit code if the result is written but the command has failed in part; else None.
    """

    name: ClassVar[str]
    module: ClassVar[str] = ""
    title: ClassVar[str] = ""
    described: ClassVar[str | None] = None
    options: ClassVar[Sequence[type]] = ()
    runs: ClassVar[str] = "run folders"
    metrics: ClassVar[Mapping[str, Metric]] = {}
    unit: ClassVar[str] = compare.SEED

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args = args
        self.command = command
        self.folder: Path = args.output_dir
        self.settings: dict[str, Any] = {}
        self.notes: list[str] = []
        self.exit_code: int | None = None

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> int:
        """Run the command, and return its exit code."""
        words = sys.argv[1:] if argv is None else list(argv)
        command = command_line(cls.module or f"eval.{cls.name}", words)
        return run(lambda: cls(cls.parser().read(words), command).work())

    @classmethod
    def parser(cls) -> Parser:
        """Return the command-line parser."""
        # By default the docstring of the module in which the subclass is defined
        described = cls.described or sys.modules[cls.__module__].__doc__
        parser = Parser(cls.module or f"eval.{cls.name}", described, cls.options)
        cls.arguments(parser)
        return parser

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        """Add the arguments that are not options: run folders, ``--group``, ``--output_dir``."""
        parser.add_runs(cls.runs)
        parser.add_output(cls.name)

    def subjects(self) -> Sequence[Subject]:
        """Return the subjects to measure."""
        return gather(self.args.runs, self.args.group)

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Check the arguments and the subjects before anything is measured or written."""

    def produce(self, subjects: Sequence[Subject]) -> Sequence[Subject] | None:
        """Train the runs or generate the images to measure; every process of the command calls it.

        Returns:
            The subjects to measure; None in a process that does not measure.
        """
        return subjects

    def rows(self, subject: Subject) -> Iterable[Row]:
        """Return the measurements of one subject."""
        raise NotImplementedError

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        """Return the result, without its figures."""
        return self.result(subjects, rows, compare.summaries(rows, unit=self.unit))

    def result(
        self,
        subjects: Sequence[Subject],
        rows: Sequence[Row],
        summaries: Sequence[Summary],
        control: str = "",
        **fields: Any,
    ) -> Result:
        """Return a result with the command's settings and notes.

        Args:
            fields: further fields of the result. By default, ``metrics`` are the command's metrics,
                and ``provenance`` is the provenance of the runs.
        """
        records = [subject.record for subject in subjects if subject.record]
        fields.setdefault("metrics", dict(self.metrics))
        fields.setdefault("provenance", provenance_of_runs(self.command, records))
        return Result(
            kind=self.name,
            subjects=subjects,
            control=control,
            settings=self.settings,
            notes=self.notes,
            rows=rows,
            summaries=summaries,
            **fields,
        )

    def panels(self, result: Result) -> Mapping[str, Sequence[Sequence[Panel]]]:
        """Return a mapping from each picture's name to its rows of panels."""
        return {}

    def draw_figures(self, result: Result, folder: Path) -> list[str]:
        """Draw the pictures into the folder, and return their names."""
        pictures = self.panels(result)
        for name, rows in pictures.items():
            plot.panels(result, folder / name, rows)
        return list(pictures)

    def introduction(self, result: Result) -> str:
        """Return the sentences above the tables."""
        return f"Mean with {report.INTERVALS}."

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        """Return each table's columns by its heading; the heading of a table may be "".

        By default, a single table has all metrics.
        """
        columns: dict[tuple[str, str], Column] = {}
        for line in result.summaries:
            # Summaries with a step are points of a curve, not cells of a table.
            if line.step is None:
                columns[line.metric, line.item] = Column(line.metric, line.item)
        return {"": list(columns.values())}

    def facts(self, result: Result) -> Mapping[str, Callable[[str], str]] | None:
        """Return the ``facts`` for :func:`~eval.results.report.comparison`."""
        return None

    def control_mark(self, result: Result) -> str:
        """Return the word that marks the control in tables, after its name."""
        return "control"

    def report(self, result: Result) -> str:
        """Return the text of ``report.md``."""
        title = self.title or self.name.replace("_", " ").capitalize()
        parts = [f"# {title}", self.introduction(result)]
        for heading, columns in self.columns(result).items():
            text = report.comparison(result, columns, self.facts(result), self.control_mark(result))
            if heading:
                text = report.section(heading, text)
            parts.append(text)
        parts += self.further(result)
        return report.page(*parts)

    def further(self, result: Result) -> list[str]:
        """Return the parts below the tables: by default, figures, notes and the provenance."""
        return [report.closing(result)]

    def work(self) -> int | None:
        """Measure the subjects and write the result; return the exit code, or None for 0."""
        subjects = self.subjects()
        self.prepare(subjects)
        # Check before the long work that the result can be written, and that the folder does not
        # hold another command's result.
        open_folder(self.folder)
        require_free(self.folder, self.name)
        subjects_to_measure = self.produce(subjects)
        if subjects_to_measure is None:
            return None
        rows: list[Row] = []
        for subject in subjects_to_measure:
            rows += self.rows(subject)
        self.write(self.complete(subjects_to_measure, rows))
        return self.exit_code

    def write(self, result: Result) -> None:
        """Draw the figures, write all files, and print the report and the names of the files."""
        result = replace(result, figures=self.draw_figures(result, self.folder))
        remove_last_figures(self.folder, self.command, result.figures)
        report_text = self.report(result)
        table.write(result, self.folder, report_text)
        files = [table.REPORT, table.ROWS, table.SUMMARY, table.FILE, *result.figures]
        lines = [*report_text.splitlines(), f"written: {self.folder}/{', '.join(files)}"]
        # Control characters in a run's name or a prompt would act on the terminal.
        print("\n".join(map(strip_controls, lines)))


def require_common_steps(group: str, steps: Sequence[set[int]]) -> None:
    """Raise UserError if the runs of a group have no step in common.

    Args:
        group: label of the group.
        steps: recorded steps of each run.
    """
    if not set.intersection(*steps):
        raise UserError(
            f'the runs of "{group}" have no recorded step in common: group runs that were recorded'
            " at the same steps."
        )
