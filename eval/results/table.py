"""A result as one long table: its values, their summaries, and their origin.

    table.write(result, folder, report)
    result = table.read(folder)          # refuses a damaged result in one sentence

A folder holds one result: ``rows.csv`` (a line per value), ``summary.csv`` (a line per group,
metric, item and step), ``report.md``, figures, and ``result.json`` (all else), which is written
last. Results are published, so they never hold a path of one machine.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bilora_diffusion.core.durable import dump_json, strict_json, write_text
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import regular_file, without_paths
from bilora_diffusion.core.statistics import Interval

SCHEMA_VERSION = 1
# Makes the adapter of a type once, since that takes long.
adapter_of: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
# Files of a result
FILE, ROWS, SUMMARY, REPORT = "result.json", "rows.csv", "summary.csv", "report.md"


@dataclass(frozen=True)
class Row:
    """One value."""

    # Label of the subject
    subject: str
    # Label of its group, whose subjects are averaged
    group: str
    # Seed of the subject, such as that of a run's training; None without one
    seed: int | None
    # Name of the quantity
    metric: str
    # The prompt, question or layer that the value belongs to; "" for the whole subject
    item: str = ""
    # Number of optimizer steps; None for a value of the whole run or its end
    step: int | None = None
    # None if it is not defined
    value: float | None = None
    # A text for the value: a file beside the result, a caption, the start of an answer
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The mean of a metric in one group, and its difference to the control's."""

    group: str
    metric: str
    item: str = ""
    step: int | None = None
    # The unit that is averaged and paired: "seed" or "item"
    over: str = "seed"
    # Number of these units
    count: int = 0
    # Mean, its standard error (0 for one value) and its 95 % interval; None if they are not defined
    mean: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    # The group that the differences are taken to; "" without one
    control: str = ""
    # Mean over pairs of the group's value minus the control's
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    # Number of pairs in which the group's value is higher, equal or lower
    higher: int = 0
    equal: int = 0
    lower: int = 0

    @property
    def interval(self) -> Interval | None:
        """Interval of the mean."""
        if self.low is None or self.high is None:
            return None
        return Interval(self.low, self.high)

    @property
    def difference_interval(self) -> Interval | None:
        """Interval of the mean difference."""
        if self.difference_low is None or self.difference_high is None:
            return None
        return Interval(self.difference_low, self.difference_high)

    @property
    def pairs(self) -> int:
        """Number of values that were compared with the control's."""
        return self.higher + self.equal + self.lower

    def better(self, higher_is_better: bool | None) -> int:
        """Number of pairs in which the group is better; equal pairs do not count."""
        return self.higher if higher_is_better else self.lower


@dataclass(frozen=True)
class Metric:
    """Title, direction and format of a metric; it is shown times its scale."""

    title: str
    explanation: str = ""
    # None for a quantity that is neither good nor bad
    higher_is_better: bool | None = False
    scale: float = 1.0
    form: str = ".3g"


@dataclass(frozen=True)
class Entry:
    """A subject as a result lists it: a run, a file of an adapter, or the base model."""

    # Its name, unique in the result
    label: str
    # Label of its group, whose subjects are averaged
    group: str
    # "run", "file" or "base"
    kind: str = "run"
    # The word of the command line that named it, without machine paths
    source: str = ""
    # Method and seed of the training; None if unknown
    method: str | None = None
    seed: int | None = None
    # Hash of the weights; "" if the command does not use them
    digest: str = ""
    # Hub id or folder; None if unknown
    base_model: str | None = None
    # Further facts of the command, as JSON can hold them
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Origin of a result."""

    # The command line, its absolute paths shortened to names
    command: str
    # Versions of Python and of the packages that trained
    versions: dict[str, Any]
    # Commit of the code that trained; None outside a checkout
    commit: str | None
    # True if that code differed from the commit
    uncommitted_changes: bool | None
    # The machine that trained
    device: dict[str, Any]
    # Names of the fields above that differ between the runs. They have the first run's value.
    differing: list[str]


@dataclass(frozen=True)
class Result:
    """Everything that a report, a figure or the viewer shows."""

    # Its command, as in ``python -m eval.KIND``
    kind: str
    subjects: Sequence[Entry] = ()
    # Title and format by the metric's name. A metric without them is shown by its name, unscaled.
    metrics: dict[str, Metric] = field(default_factory=dict)
    # The group that the others are compared with; "" without one
    control: str = ""
    # Settings of the measurement, as JSON can hold them
    settings: dict[str, Any] = field(default_factory=dict)
    # Sentences that a reader has to know
    notes: list[str] = field(default_factory=list)
    # PNG files beside the result
    figures: list[str] = field(default_factory=list)
    provenance: Provenance | None = None
    rows: Sequence[Row] = ()
    summaries: Sequence[Summary] = ()

    @property
    def groups(self) -> list[str]:
        """The groups in the order in which their subjects were named."""
        return list(dict.fromkeys(entry.group for entry in self.subjects))

    def members(self, group: str) -> list[Entry]:
        """The subjects of a group."""
        return [entry for entry in self.subjects if entry.group == group]

    def metric(self, name: str) -> Metric:
        """Title and form of a metric."""
        return self.metrics.get(name) or Metric(name)

    def select(self, metric: str, group: str | None = None, item: str | None = None) -> list[Row]:
        """The rows of a metric, of all groups and items or of one."""
        rows = []
        for row in self.rows:
            if row.metric == metric and group in (None, row.group) and item in (None, row.item):
                rows.append(row)
        return rows

    def summary(
        self, group: str, metric: str, item: str = "", step: int | None = None
    ) -> Summary | None:
        """A metric's summary in a group; None where it was not measured."""
        return self._index.get((group, metric, item, step))

    def over_training(self, group: str, metric: str, item: str = "") -> list[Summary]:
        """The summaries of a metric at each step, in order."""
        points = []
        for line in self.summaries:
            is_same = (line.group, line.metric, line.item) == (group, metric, item)
            if is_same and line.step is not None:
                points.append(line)
        return sorted(points, key=lambda point: point.step or 0)

    def curve(self, group: str, metric: str, item: str = "") -> list[Summary]:
        """A metric over training, at the steps that were measured in all runs of the group."""
        points = self.over_training(group, metric, item)
        most_runs = max((point.count for point in points), default=0)
        # A mean over fewer runs would make a jump in the curve.
        return [point for point in points if point.count == most_runs]

    @cached_property
    def _index(self) -> dict[tuple[str, str, str, int | None], Summary]:
        return {(line.group, line.metric, line.item, line.step): line for line in self.summaries}


def write(result: Result, folder: Path, report: str) -> None:
    """Write all files but the figures, ``result.json`` last."""
    write_text(folder / ROWS, to_csv(Row, result.rows))
    write_text(folder / SUMMARY, to_csv(Summary, result.summaries))
    write_text(folder / REPORT, report)
    # Also of a `Subject` it dumps the fields of `Entry` only: folders and records stay here.
    record = adapter_of(Result).dump_python(result, exclude={"rows", "summaries"})
    text = dump_json(strict_json({"schema_version": SCHEMA_VERSION, **record})[0])
    write_text(folder / FILE, text)


def read(folder: Path, rows: bool = True) -> Result:
    """The result in a folder; without ``rows`` its summaries only."""
    record = head(folder)
    fix = f"run python -m eval.{record['kind']} again"
    file = ROWS
    try:
        record["rows"] = []
        if rows:
            record["rows"] = from_csv(Row, folder / ROWS)
        file = SUMMARY
        record["summaries"] = from_csv(Summary, folder / SUMMARY)
        file = FILE
        return adapter_of(Result).validate_python(record)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{folder / file} is damaged: {fix}") from error


def head(folder: Path) -> dict[str, Any]:
    """The content of ``result.json``, its version and kind checked."""
    path = folder / FILE
    try:
        record = json.loads(regular_file(path).read_text(encoding="utf-8"))
        version = record.pop("schema_version")
        kind = record["kind"]
        # JSON can hold half of a surrogate pair, which can't be printed.
        json.dumps(record, ensure_ascii=False).encode()
        # Sentences say "run python -m eval.KIND again", which users copy into a terminal.
        if not isinstance(kind, str) or not kind.isidentifier():
            raise TypeError(kind)
    except OSError as error:
        raise UserError(f"{folder} holds no {FILE} that can be read: give another") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: make the result again") from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} is of schema version {version!r}, not {SCHEMA_VERSION}: run python -m"
            f" eval.{kind} again"
        )
    return record


def to_csv(kind: Any, lines: Iterable[Any]) -> str:
    """Dataclasses as CSV, unrounded; None and a number that is not finite are empty fields."""
    text = _Lines()
    names = [column.name for column in fields(kind)]
    writer = csv.DictWriter(text, names, lineterminator="\r\n")
    writer.writeheader()
    for line in lines:
        values, _ = strict_json({name: getattr(line, name) for name in names})
        writer.writerow(values)
    return text.getvalue()


class _Lines(io.StringIO):
    """Lines that end in a newline alone, as in all files of a result.

    The CSV writer itself must end its lines in both characters: it quotes a field only where that
    holds a character of its line end, and the answer of a model may hold either.
    """

    def write(self, line: str) -> int:
        return super().write(line.removesuffix("\r\n") + "\n")


def from_csv(kind: Any, path: Path) -> list[Any]:
    """The lines of a file that :func:`to_csv` made."""
    names = [column.name for column in fields(kind)]
    # An empty field of text is "", that of a number is None.
    text_names = {column.name for column in fields(kind) if column.type == "str"}
    with regular_file(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"the columns are {reader.fieldnames} and not {names}")
        lines = []
        for line in reader:
            for name in names:
                if line[name] == "" and name not in text_names:
                    line[name] = None
            lines.append(line)
    return adapter_of(list[kind]).validate_python(lines)


def command_line(module: str, argv: Sequence[str]) -> str:
    """``python -m MODULE ARGV`` as a person would write it, without machine paths."""
    return f"python -m {module} {shlex.join(without_paths(word) for word in argv)}"


def provenance_of_runs(command: str, records: Sequence[Mapping[str, Any]]) -> Provenance | None:
    """The provenance of a result of several runs; None without a run."""
    if not records:
        return None
    values: dict[str, Any] = {}
    differing = []
    for name in ("versions", "commit", "uncommitted_changes", "device"):
        values[name] = records[0].get(name)
        if any(record.get(name) != values[name] for record in records):
            differing.append(name)
    return Provenance(command=command, differing=differing, **values)


def provenance_of_this_process(
    command: str, device: Any, packages: Sequence[str] = ()
) -> Provenance:
    """The provenance of a result that this process computes."""
    from bilora_diffusion.run import provenance  # here, so that --help does not wait for torch

    commit, changes = provenance.commit()
    versions = provenance.versions(*packages)
    return Provenance(command, versions, commit, changes, provenance.device(device), [])
