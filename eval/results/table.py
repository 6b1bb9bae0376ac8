"""A result as a table of rows: its values, their summaries, and their origin.

    table.write(result, folder, report)
    result = table.read(folder)          # raises UserError if the result is damaged

A folder holds one result: ``rows.csv`` (a line for each value), ``summary.csv`` (a line for each
group, metric, item and step), ``report.md``, figures, and ``result.json`` (everything else), which
is written last. Results may be published, so they contain no absolute paths of the machine.
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
# Returns pydantic's adapter of a type, cached because creating it is slow
adapter_of: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
# Files of a result
FILE, ROWS, SUMMARY, REPORT = "result.json", "rows.csv", "summary.csv", "report.md"


@dataclass(frozen=True)
class Row:
    """One measured value."""

    # Label of the subject
    subject: str
    # Label of the subject's group; the subjects of a group are averaged
    group: str
    # Seed, such as the training seed of a run; None if there is none
    seed: int | None
    # Name of the metric
    metric: str
    # What the value belongs to, such as a prompt, question or layer; "" for the whole subject
    item: str = ""
    # Optimizer step; None for a value of the whole run or of its end
    step: int | None = None
    # None if the value is not defined
    value: float | None = None
    # Text that belongs to the value, such as the path of a file in the result's folder, a caption,
    # or the start of an answer
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The mean of a metric in one group, and the mean difference from the control."""

    group: str
    metric: str
    item: str = ""
    step: int | None = None
    # Unit that is averaged and paired: "seed" or "item"
    over: str = "seed"
    # Number of units in the mean
    count: int = 0
    # Mean, its standard error (0 for one value) and its 95 % interval; None if not defined
    mean: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    # Group whose values are subtracted in the differences; "" without differences
    control: str = ""
    # Mean difference over all pairs (the group's value minus the control's), and its interval
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
        """Number of pairs of values."""
        return self.higher + self.equal + self.lower

    def better(self, higher_is_better: bool | None) -> int:
        """Return the number of pairs in which the group is better; equal pairs do not count."""
        return self.higher if higher_is_better else self.lower


@dataclass(frozen=True)
class Metric:
    """Title, direction and format of a metric; values are multiplied by ``scale`` when shown."""

    title: str
    explanation: str = ""
    # None for a metric that has no better direction
    higher_is_better: bool | None = False
    scale: float = 1.0
    form: str = ".3g"


@dataclass(frozen=True)
class Entry:
    """A subject in a result's list: a run, a file of an adapter, or the base model."""

    # Unique name in the result
    label: str
    # Label of the subject's group; the subjects of a group are averaged
    group: str
    # "run", "file" or "base"
    kind: str = "run"
    # The subject as the command line names it, without machine paths
    source: str = ""
    # Method and seed of the training; None if unknown
    method: str | None = None
    seed: int | None = None
    # Hash of the weights; "" if the command does not use the weights
    digest: str = ""
    # Hub id or folder of the base model; None if unknown
    base_model: str | None = None
    # Further facts, which depend on the command; JSON-serializable
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Origin of a result."""

    # The command line; absolute paths are shortened to names
    command: str
    # Versions of Python and packages in the process that trained the runs or computed the result
    versions: dict[str, Any]
    # Commit of the code in this process; None outside a checkout
    commit: str | None
    # True if the code differed from the commit
    uncommitted_changes: bool | None
    # Device of this process
    device: dict[str, Any]
    # Names of the fields above that differ between the runs; these have the value of the first run
    differing: list[str]


@dataclass(frozen=True)
class Result:
    """Everything that a report, a figure or the viewer shows."""

    # Command that measured the result, as in ``python -m eval.KIND``
    kind: str
    subjects: Sequence[Entry] = ()
    # Title and format of metrics, by name; other metrics are shown unscaled, under their names
    metrics: dict[str, Metric] = field(default_factory=dict)
    # Group that the others are compared with; "" for no comparison
    control: str = ""
    # Settings of the measurement; JSON-serializable
    settings: dict[str, Any] = field(default_factory=dict)
    # Sentences that help to read the result correctly
    notes: list[str] = field(default_factory=list)
    # PNG files in the result's folder
    figures: list[str] = field(default_factory=list)
    provenance: Provenance | None = None
    rows: Sequence[Row] = ()
    summaries: Sequence[Summary] = ()

    @property
    def groups(self) -> list[str]:
        """The groups, in the order of the subjects."""
        return list(dict.fromkeys(entry.group for entry in self.subjects))

    def members(self, group: str) -> list[Entry]:
        """Return the subjects of a group."""
        return [entry for entry in self.subjects if entry.group == group]

    def metric(self, name: str) -> Metric:
        """Return the title and format of a metric."""
        return self.metrics.get(name) or Metric(name)

    def select(self, metric: str, group: str | None = None, item: str | None = None) -> list[Row]:
        """Return the rows of a metric; None for ``group`` or ``item`` selects all of them."""
        rows = []
        for row in self.rows:
            if row.metric == metric and group in (None, row.group) and item in (None, row.item):
                rows.append(row)
        return rows

    def summary(
        self, group: str, metric: str, item: str = "", step: int | None = None
    ) -> Summary | None:
        """Return a metric's summary in a group; None if the metric was not measured there."""
        return self._index.get((group, metric, item, step))

    def over_training(self, group: str, metric: str, item: str = "") -> list[Summary]:
        """Return the summaries of a metric at all steps, sorted by step."""
        points = []
        for line in self.summaries:
            is_same = (line.group, line.metric, line.item) == (group, metric, item)
            if is_same and line.step is not None:
                points.append(line)
        return sorted(points, key=lambda point: point.step or 0)

    def curve(self, group: str, metric: str, item: str = "") -> list[Summary]:
        """Return the summaries of a metric at the steps with the largest number of runs."""
        points = self.over_training(group, metric, item)
        most_runs = max((point.count for point in points), default=0)
        # Means over different numbers of runs would make the curve jump.
        return [point for point in points if point.count == most_runs]

    @cached_property
    def _index(self) -> dict[tuple[str, str, str, int | None], Summary]:
        return {(line.group, line.metric, line.item, line.step): line for line in self.summaries}


def write(result: Result, folder: Path, report: str) -> None:
    """Write all files of a result except the figures, ``result.json`` last."""
    write_text(folder / ROWS, to_csv(Row, result.rows))
    write_text(folder / SUMMARY, to_csv(Summary, result.summaries))
    write_text(folder / REPORT, report)
    # The adapter dumps only the fields of `Entry`, even of a `Subject`: no folders, no records.
    record = adapter_of(Result).dump_python(result, exclude={"rows", "summaries"})
    text = dump_json(strict_json({"schema_version": SCHEMA_VERSION, **record})[0])
    write_text(folder / FILE, text)


def read(folder: Path, rows: bool = True) -> Result:
    """Read the result in a folder; if ``rows`` is false, without the rows.

    Raises:
        UserError: the folder holds no result, or the result is damaged or has an unknown version.
    """
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
    """Return the content of ``result.json``, after a check of its version and kind."""
    path = folder / FILE
    try:
        record = json.loads(regular_file(path).read_text(encoding="utf-8"))
        version = record.pop("schema_version")
        kind = record["kind"]
        # JSON may contain half of a surrogate pair, which can't be printed.
        json.dumps(record, ensure_ascii=False).encode()
        # Messages contain "run python -m eval.KIND again", which users copy into a terminal.
        if not isinstance(kind, str) or not kind.isidentifier():
            raise TypeError(kind)
    except OSError as error:
        raise UserError(f"{folder} has no readable {FILE}: give another folder") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: measure the result again") from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version!r}, not {SCHEMA_VERSION}: run python -m"
            f" eval.{kind} again"
        )
    return record


def to_csv(kind: Any, lines: Iterable[Any]) -> str:
    """Return instances of a dataclass as CSV.

    Numbers are not rounded. None and numbers that are not finite become empty fields.

    Args:
        kind: the dataclass, whose fields are the columns.
        lines: instances of the dataclass.
    """
    text = _Lines()
    names = [column.name for column in fields(kind)]
    writer = csv.DictWriter(text, names, lineterminator="\r\n")
    writer.writeheader()
    for line in lines:
        values, _ = strict_json({name: getattr(line, name) for name in names})
        writer.writerow(values)
    return text.getvalue()


class _Lines(io.StringIO):
    """A text buffer that replaces the line end CR LF with LF, as in all files of a result.

    The CSV writer needs the line end CR LF: it quotes a field with a CR or LF only if the line end
    contains this character, and a model's answer may contain either.
    """

    def write(self, line: str) -> int:
        return super().write(line.removesuffix("\r\n") + "\n")


def from_csv(kind: Any, path: Path) -> list[Any]:
    """Read a CSV file that :func:`to_csv` has written, as instances of the dataclass ``kind``.

    Raises:
        ValueError: the columns or the types of the values differ from the dataclass's.
    """
    names = [column.name for column in fields(kind)]
    # An empty field is "" in a text column, and None in any other column.
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
    """Return ``python -m MODULE ARGV``, quoted for a shell and without machine paths."""
    return f"python -m {module} {shlex.join(without_paths(word) for word in argv)}"


def provenance_of_runs(command: str, records: Sequence[Mapping[str, Any]]) -> Provenance | None:
    """Return the provenance of a result, from the records of its runs; None if it has no runs."""
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
    """Return the provenance of a result that this process computes."""
    from bilora_diffusion.run import provenance  # here, so that --help does not wait for torch

    commit, changes = provenance.commit()
    versions = provenance.versions(*packages)
    return Provenance(command, versions, commit, changes, provenance.device(device), [])
