"""The existing result in the output folder of a scored sweep, to which the command adds runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bilora_diffusion.core.errors import UserError

from ..results import table
from ..results.compare import EQUAL_TRAINING
from ..results.table import Provenance, Result, Row
from ..subjects import Subject
from .plan import Run

# Settings that must be the same for all runs of a result
COMMON = ("recipe", "options", "scores")


class Record:
    """The result in an output folder, if there is one.

    Each run with rows is completely scored, because a result is written after all scores.

    Args:
        folder: ``--output_dir``.
        kind: kind of the result; results of any other kind are ignored.

    Attributes:
        result: the result; None if there is none.
        subjects, rows: subject and rows of each run with rows, by the run's name, which contains a
            hash of the run's options. Rows at equal training loss are left out.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.result: Result | None = None
        self.subjects: dict[str, Subject] = {}
        self.rows: dict[str, list[Row]] = {}
        if not (folder / table.FILE).is_file():
            return
        result = table.read(folder)
        if result.kind != kind:
            return
        self.result = result
        for row in result.rows:
            # A new run may change the common training loss, so these rows are not reused.
            if not row.metric.startswith(EQUAL_TRAINING):
                self.rows.setdefault(row.subject, []).append(row)
        for entry in result.subjects:
            if entry.label in self.rows:
                self.subjects[entry.label] = Subject(**asdict(entry))

    def require_alike(self, settings: Mapping[str, Any], planned: Sequence[Run]) -> None:
        """Raise UserError if scores of planned runs can't be compared with the recorded scores.

        Args:
            settings: the new settings, with all names in `COMMON`.
            planned: all runs of the plan, whether recorded or not.
        """
        if self.result is None:
            return
        for name, recorded_value, value in self._common_values(settings):
            if recorded_value != value:
                raise UserError(
                    f"{self.folder} has a result with {name} {recorded_value!r}, but this command"
                    f" has {value!r}: give another --output_dir."
                )
        names = {run.name for run in planned}
        recorded_names = {}
        for name, subject in self.subjects.items():
            if name not in names:
                recorded_names[subject.group, subject.seed] = name
        for run in planned:
            recorded_name = recorded_names.get((run.variant, run.seed))
            if recorded_name is not None:
                raise UserError(
                    f"{self.folder} has {run.variant} with seed {run.seed} trained with other"
                    f" options or in another precision ({recorded_name}): give another"
                    " --output_dir."
                )

    def _common_values(self, settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Return (name, recorded value, new value) of each setting, or of each of its keys."""
        assert self.result is not None
        values = []
        for name in COMMON:
            recorded, present = self.result.settings.get(name), settings[name]
            if not (isinstance(recorded, dict) and isinstance(present, dict)):
                values.append((name, recorded, present))
                continue
            for key in {**recorded, **present}:
                values.append((f"{name}.{key}", recorded.get(key), present.get(key)))
        return values

    def setting(self, name: str) -> dict[str, Any]:
        """Return a recorded setting that has an entry for each variant; {} if it is missing."""
        return {} if self.result is None else dict(self.result.settings.get(name) or {})

    def provenance(self, current: Provenance, is_extended: bool) -> Provenance:
        """Return the provenance of a result that includes the recorded rows, if there are any.

        Args:
            current: provenance of this process.
            is_extended: whether this process has scored runs; if not, the recorded provenance is
                returned unchanged.
        """
        earlier = self.result.provenance if self.result is not None else None
        if earlier is None:
            return current
        if not is_extended:
            return earlier
        joint = table.provenance_of_runs(current.command, [asdict(earlier), asdict(current)])
        assert joint is not None
        return replace(joint, differing=list(dict.fromkeys([*earlier.differing, *joint.differing])))
