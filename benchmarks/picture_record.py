"""The result that lies in the output folder of `pictures.py`, to which it adds runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bilora_diffusion.core.errors import UserError
from eval import table
from eval.subjects import Subject
from eval.sweep_plan import Run
from eval.table import Provenance, Result, Row


class Record:
    """The result of a folder, which may have none yet.

    All its runs were scored in full, since a result is written when everything is scored.

    Args:
        folder: ``--output_dir``.

    Attributes:
        result: None without one.
        subjects, rows: of each run, by its name. The name has a hash of the run's options.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result: Result | None = None
        self.subjects: dict[str, Subject] = {}
        self.rows: dict[str, list[Row]] = {}
        if (folder / table.FILE).is_file():
            self.result = table.read(folder)
            for entry in self.result.subjects:
                self.subjects[entry.label] = Subject(**asdict(entry))
            for row in self.result.rows:
                self.rows.setdefault(row.subject, []).append(row)

    def require_alike(self, settings: Mapping[str, Any], planned: Sequence[Run]) -> None:
        """Refuse runs whose scores can't stand beside the recorded ones.

        Args:
            settings: those that all runs of a result have in common.
            planned: the runs that are to be added, or are recorded.
        """
        if self.result is None:
            return
        # Results of earlier versions do not name their steps, their rows do.
        steps = sorted({row.step for row in self.result.select("i2t") if row.step is not None})
        recorded_settings = {**self.result.settings, "steps": steps}
        for name, value in settings.items():
            recorded_value = recorded_settings.get(name)
            if recorded_value != value:
                raise UserError(
                    f"{self.folder} has a result with {name} {recorded_value!r}, and the command"
                    f" line means {value!r}: give another --output_dir."
                )
        names = {run.name for run in planned}
        recorded_pairs = {}
        for name, subject in self.subjects.items():
            if name not in names:
                recorded_pairs[subject.group, subject.seed] = name
        for run in planned:
            rival = recorded_pairs.get((run.variant, run.seed))
            if rival is not None:
                raise UserError(
                    f"{self.folder} has {run.variant} with seed {run.seed} trained with other"
                    f" options or in another precision ({rival}): give another --output_dir."
                )

    def variants(self) -> dict[str, Any]:
        """The recorded variants' options by label."""
        return {} if self.result is None else dict(self.result.settings["variants"])

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
