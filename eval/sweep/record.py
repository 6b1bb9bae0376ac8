"""The result that is in the output folder of a scored sweep, to which the command adds runs."""

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

# Settings that all runs of a result have in common
COMMON = ("recipe", "options", "scores")


class Record:
    """The result of a folder, which may have none yet.

    A run with rows was scored in full, since a result is written when everything is scored.

    Args:
        folder: ``--output_dir``.
        kind: of the results; one of another command is none.

    Attributes:
        result: None without one.
        subjects, rows: of each run with rows, by its name. The name has a hash of the run's
            options.
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
            # The training loss at which all variants are compared changes with each run.
            if not row.metric.startswith(EQUAL_TRAINING):
                self.rows.setdefault(row.subject, []).append(row)
        for entry in result.subjects:
            if entry.label in self.rows:
                self.subjects[entry.label] = Subject(**asdict(entry))

    def require_alike(self, settings: Mapping[str, Any], planned: Sequence[Run]) -> None:
        """Refuse runs whose scores can't be compared with the recorded ones.

        Args:
            settings: those in `COMMON`.
            planned: the runs that are to be added, or are recorded.
        """
        if self.result is None:
            return
        for name, recorded_value, value in self._common_values(settings):
            if recorded_value != value:
                raise UserError(
                    f"{self.folder} has a result with {name} {recorded_value!r}, and the command"
                    f" line means {value!r}: give another --output_dir."
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
        """Name, recorded value and present value of each setting, and of each key of one."""
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
        """A setting with an entry for each variant; {} if there is none."""
        return {} if self.result is None else dict(self.result.settings.get(name) or {})

    def provenance(self, current: Provenance, is_extended: bool) -> Provenance:
        """The provenance of a result with the recorded rows.

        Args:
            current: of this process.
            is_extended: this process scored runs too. If it did not, the recorded one stays.
        """
        earlier = self.result.provenance if self.result is not None else None
        if earlier is None:
            return current
        if not is_extended:
            return earlier
        joint = table.provenance_of_runs(current.command, [asdict(earlier), asdict(current)])
        assert joint is not None
        return replace(joint, differing=list(dict.fromkeys([*earlier.differing, *joint.differing])))
