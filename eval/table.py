"""A result as one long table: what was measured, what it comes to, and where it comes from.

    table.write(result, folder, report)
    result = table.read(folder)          # refuses what is not a whole result, in one sentence

A folder holds one result: ``rows.csv`` (a line per value), ``summary.csv`` (a line per group,
metric, item and step), ``report.md``, figures, and ``result.json`` (all else), written last.
Results are shared and published, so a path of one machine never enters them.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bilora_diffusion.core.durable import dump_json, strict_json, write_text
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import finite, without_paths

SCHEMA_VERSION = 1
FILE, ROWS, SUMMARY, REPORT = "result.json", "rows.csv", "summary.csv", "report.md"


@dataclass(frozen=True)
class Row:
    """One value.

    Args:
        subject: label of what was measured.
        group: what it is averaged in.
        seed: of what is averaged over, such as a run's training; None without one.
        metric: what the value is.
        item: a part of the subject or of what it was asked: a prompt, a question, a layer.
        step: optimizer steps taken; None where it is of the whole run or its end.
        value: None where it is not defined.
        note: what belongs to it: a file beside the result, a caption, the beginning of an answer.
    """

    subject: str
    group: str
    seed: int | None
    metric: str
    item: str = ""
    step: int | None = None
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """One metric of one group, and how it differs from the control's.

    Args:
        over: what is averaged and paired: "seed" or "item".
        count: how many of those.
        mean, error, low, high: mean, its standard error (0 for one value) and its 95 % interval;
            None where there is none.
        control: the group that the following are differences to; "" without one.
        difference: mean over pairs of the group's value minus the control's.
        higher, equal, lower: pairs in which the group's value is so.
    """

    group: str
    metric: str
    item: str = ""
    step: int | None = None
    over: str = "seed"
    count: int = 0
    mean: float | None = None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    control: str = ""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    higher: int = 0
    equal: int = 0
    lower: int = 0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the mean."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def difference_interval(self) -> tuple[float, float] | None:
        """Interval of the mean difference."""
        low, high = self.difference_low, self.difference_high
        return None if low is None or high is None else (low, high)

    @property
    def pairs(self) -> int:
        """Number of values that were compared with the control's."""
        return self.higher + self.equal + self.lower

    def better(self, higher_is_better: bool | None) -> int:
        """The pairs in which the group is better; an equal one is not."""
        return self.higher if higher_is_better else self.lower


@dataclass(frozen=True)
class Metric:
    """Title, direction and form of a metric."""

    title: str
    explanation: str = ""
    higher_is_better: bool | None = False
    scale: float = 1.0
    form: str = ".3g"


@dataclass(frozen=True)
class Entry:
    """Something that was measured, as a result lists it.

    Args:
        label: unique.
        group: what it is averaged in.
        kind: "run", "file" or "base".
        source: as it was named, without machine paths.
        method, seed: of training; None where unknown.
        digest: of the weights; "" where they played no part.
        base_model: where known.
        about: what else its command has to say of it, as JSON can hold it.
    """

    label: str
    group: str
    kind: str = "run"
    source: str = ""
    method: str | None = None
    seed: int | None = None
    digest: str = ""
    base_model: str | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Origin of a result.

    Args:
        command: the command line, absolute paths shortened to names.
        versions: of Python and the packages that trained.
        commit: of the code that trained; None outside a checkout.
        uncommitted_changes: whether that code differed from the commit.
        device: the machine that trained.
        differing: which of the above are not the same in all runs; the first run's are given.
    """

    command: str
    versions: dict[str, Any]
    commit: str | None
    uncommitted_changes: bool | None
    device: dict[str, Any]
    differing: list[str]


@dataclass(frozen=True)
class Result:
    """Everything that a report, a figure or the viewer shows.

    Args:
        kind: the command that made it, as in ``python -m eval.KIND``.
        metrics: by name; one that is not here is shown as it is.
        control: the group that others are compared with; "" without one.
        settings: how it was measured, as JSON can hold it.
        notes: sentences that a reader has to know.
        figures: PNG files beside the result.
    """

    kind: str
    subjects: Sequence[Entry] = ()
    metrics: dict[str, Metric] = field(default_factory=dict)
    control: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
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
        """One line of ``summary.csv``; None where it was not measured."""
        return self._index.get((group, metric, item, step))

    def over_training(self, group: str, metric: str, item: str = "") -> list[Summary]:
        """The summaries of a metric at each step, in order."""
        key, lines = (group, metric, item), []
        for line in self.summaries:
            if line.step is not None and (line.group, line.metric, line.item) == key:
                lines.append(line)
        return sorted(lines, key=lambda line: line.step or 0)

    def curve(self, group: str, metric: str, item: str = "") -> list[Summary]:
        """A metric over training at the steps that all have of the group which were measured."""
        points = self.over_training(group, metric, item)
        measured = max((point.count for point in points), default=0)
        return [point for point in points if point.count == measured]

    @cached_property
    def _index(self) -> dict[tuple[str, str, str, int | None], Summary]:
        return {(line.group, line.metric, line.item, line.step): line for line in self.summaries}


def write(result: Result, folder: Path, report: str) -> None:
    """Write all files but the figures, ``result.json`` last."""
    write_text(folder / ROWS, to_csv(Row, result.rows))
    write_text(folder / SUMMARY, to_csv(Summary, result.summaries))
    write_text(folder / REPORT, report)
    record = _adapter(Result).dump_python(result, exclude={"rows", "summaries"})
    text = dump_json(strict_json({"schema_version": SCHEMA_VERSION, **record})[0])
    write_text(folder / FILE, text)


def read(folder: Path, rows: bool = True) -> Result:
    """The result in a folder."""
    record = head(folder)
    fix = f"run python -m eval.{record['kind']} again"
    file = ROWS
    try:
        record["rows"] = from_csv(Row, folder / ROWS) if rows else []
        file = SUMMARY
        record["summaries"] = from_csv(Summary, folder / SUMMARY)
        file = FILE
        return _adapter(Result).validate_python(record)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{folder / file} is damaged: {fix}") from error


def head(folder: Path) -> dict[str, Any]:
    """``result.json`` as it is, its version and kind checked."""
    path = folder / FILE
    try:
        record = json.loads(finite(path).read_text(encoding="utf-8"))
        version, kind = record.pop("schema_version"), record["kind"]
        # JSON can say half a letter, which nothing can print.
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
    """Dataclasses as CSV, unrounded; None and what is not finite is an empty field."""
    text = _Lines()
    names = [column.name for column in fields(kind)]
    writer = csv.DictWriter(text, names, lineterminator="\r\n")
    writer.writeheader()
    for line in lines:
        values, _ = strict_json({name: getattr(line, name) for name in names})
        writer.writerow(values)
    return text.getvalue()


class _Lines(io.StringIO):
    """Lines that end as all of our files do. The writer quotes only what is in its own end of a
    line, and an answer of a model may hold either character.
    """

    def write(self, line: str) -> int:
        return super().write(line.removesuffix("\r\n") + "\n")


def from_csv(kind: Any, path: Path) -> list[Any]:
    """Read what :func:`to_csv` wrote."""
    names = [column.name for column in fields(kind)]
    # Of text an empty field is "", of a number None.
    text_names = {column.name for column in fields(kind) if column.type == "str"}
    with finite(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"the columns are {reader.fieldnames} and not {names}")
        lines = []
        for line in reader:
            for name in names:
                if line[name] == "" and name not in text_names:
                    line[name] = None
            lines.append(line)
    return _adapter(list[kind]).validate_python(lines)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def command_line(module: str, argv: Sequence[str]) -> str:
    """``python -m MODULE ARGV`` as a person would write it, without machine paths."""
    return f"python -m {module} {shlex.join(without_paths(word) for word in argv)}"


def of_runs(command: str, records: Sequence[Mapping[str, Any]]) -> Provenance | None:
    """The provenance of a result of several runs; None without a run."""
    if not records:
        return None
    keys = ("versions", "commit", "uncommitted_changes", "device")
    first: dict[str, Any] = {key: records[0].get(key) for key in keys}
    differing = [key for key in keys if any(r.get(key) != first[key] for r in records)]
    first |= {key: first[key] or {} for key in ("versions", "device")}
    return Provenance(command=command, differing=differing, **first)


def of_this_process(command: str, device: Any, packages: Sequence[str] = ()) -> Provenance:
    """The provenance of what is computed here and now."""
    from bilora_diffusion.run import provenance  # here, so that --help does not wait for torch

    commit, changes = provenance.commit()
    versions = provenance.versions(*packages)
    return Provenance(command, versions, commit, changes, provenance.device(device), [])
