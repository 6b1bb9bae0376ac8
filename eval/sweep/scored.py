"""A sweep that samples and scores checkpoints, and reports the scores together with the losses."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilora_diffusion.core.errors import TrainingError
from bilora_diffusion.core.files import describe_hours_per_second
from bilora_diffusion.core.values import HELDOUT_LOSS
from bilora_diffusion.run.console import quiet

from ..command import open_device
from ..results import plot, report
from ..results.report import Column
from ..results.table import Result, Row, provenance_of_this_process
from ..subjects import Subject
from . import losses, samples
from .command import Sweep
from .plan import Plan, Run
from .record import COMMON, Record
from .scoring import SCORER_SETTINGS, Scoring


class ScoredSweep(Sweep):
    """A sweep with scores of samples, which come first in the report.

    The item of a row is the kind of guidance, followed by the condition's name in brackets if the
    experiment has conditions; for a loss, the item is "".

    ``settings`` in addition to those of `Sweep`:

    - ``options``: options of all runs;
    - ``scores``: ``prompts``, ``num_prompts``, ``seeds``, ``steps``, ``guidances``, ``options`` of
      eval.clip_scores, and ``conditions`` if there are any;
    - ``sampling``, ``scorer``, ``truth_i2t``: see the settings of eval.clip_scores.

    Runs that have rows in the output folder are neither trained nor scored again.
    """

    def __init__(self, args: argparse.Namespace, command: str, plan: Plan) -> None:
        super().__init__(args, command, plan)
        quiet()
        scores = plan.experiment.scores
        assert scores is not None
        self.scoring = Scoring(scores, self.runner.runs_dir, args.processes)
        self.settings["options"] = dict(plan.experiment.options)
        self.settings["scores"] = self.scoring.settings()
        self.record = Record(self.folder, self.name)
        common = {name: self.settings[name] for name in COMMON}
        self.record.require_alike(common, plan.runs)

    def missing_runs(self) -> Sequence[Run]:
        return [run for run in self.plan.runs if run.name not in self.record.rows]

    def work(self) -> int | None:
        if not self.args.dry_run:
            return super().work()
        print(self.describe_plan())
        self._print_memory()
        return None

    def describe_plan(self) -> str:
        """Return the plan with its numbers of steps and images, and hours per second of each."""
        scores, num_runs = self.scoring.scores, len(self.plan.runs)
        steps = max(scores.steps)
        images = num_runs * self.scoring.num_images
        labels = ", ".join(condition.label for condition in self.scoring.conditions)
        size = (
            f"{num_runs * steps:,} steps, {describe_hours_per_second(num_runs * steps, 'a step')};"
            f" {images:,} images with {labels}, {describe_hours_per_second(images, 'an image')}."
        )
        return f"{super().describe_plan()}\n{size}"

    def _print_memory(self) -> None:
        """Print the memory that each variant needs, from the training script's ``--dry_run``.

        Raises:
            TrainingError: the dry run of a variant failed.
        """
        gigabytes = self.scoring.scores.memory_gigabytes
        if gigabytes:
            size = f"{gigabytes:g} GB"
            print(f"The images are generated with {size} of weights, without quantization.")
        for planned in self.plan.runs:
            if planned.seed != self.plan.seeds[0]:
                continue
            print(f"\n{planned.variant}:", flush=True)
            words = self.runner.command(planned)
            # Without accelerate's launcher, because a dry run needs only one process.
            words = [sys.executable, *words[words.index(str(self.plan.script)) :], "--dry_run"]
            if subprocess.run(words, check=False).returncode != 0:
                raise TrainingError(
                    f"--dry_run of {planned.variant} failed: see its error message above."
                )

    def subjects(self) -> Sequence[Subject]:
        """Return the planned and recorded runs, sorted by seed and then by variant."""
        subjects = {subject.label: subject for subject in super().subjects()}
        subjects |= self.record.subjects
        order = {label: number for number, label in enumerate(self.plan.labels)}
        # Recorded variants that are no longer in the experiment come last.
        return sorted(
            subjects.values(),
            key=lambda subject: (subject.seed or 0, order.get(subject.group, len(order))),
        )

    def prepare(self, subjects: Sequence[Subject]) -> None:
        """Check before the training that the checkpoints can be sampled and scored."""
        missing = self.missing_runs()
        if missing:
            folders = [self.runner.runs_dir / run.name for run in missing]
            self.scoring.check(folders, self.plan.base_model)

    def produce(self, subjects: Sequence[Subject]) -> Sequence[Subject]:
        """Train the missing runs, and sample and score their checkpoints.

        Runs that fail and runs that are already in the record are not scored.
        """
        subjects = super().produce(subjects)
        finished = [subject for subject in subjects if subject.finished]
        if finished:
            self.scoring.score(finished)
        self._describe_settings(subjects)
        return subjects

    def require_metric(self, subjects: Sequence[Subject]) -> None:
        # Samples need no held-out loss.
        if self.experiment.metric != HELDOUT_LOSS:
            super().require_metric(subjects)

    def _describe_settings(self, subjects: Sequence[Subject]) -> None:
        """Add the recorded runs' settings and the scorer's settings to the result's settings."""
        self.settings["variants"] = {
            **self.record.setting("variants"),
            **self.settings["variants"],
        }
        self.settings["seeds"] = sorted({subject.seed or 0 for subject in subjects})
        # If nothing was scored now, the recorded result has the scorer's settings.
        scored = next(iter(self.scoring.results.values()), self.record.result)
        if scored is not None:
            for name in SCORER_SETTINGS:
                self.settings[name] = scored.settings.get(name)

    def rows(self, subject: Subject) -> Iterator[Row]:
        if subject.label in self.record.rows:
            yield from self.record.rows[subject.label]
            return
        heldout_losses: dict[int, float] = {}
        for row in super().rows(subject):
            if row.metric == HELDOUT_LOSS and row.step is not None and row.value is not None:
                heldout_losses[row.step] = row.value
            yield row
        yield from self.scoring.rows(subject, heldout_losses)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        result = super().complete(subjects, rows)
        current = provenance_of_this_process(self.command, open_device(None))
        is_extended = bool(self.scoring.results)
        return replace(
            result,
            metrics={**samples.METRICS, **result.metrics},
            provenance=self.record.provenance(current, is_extended),
        )

    def pairs(self, subjects: Sequence[Subject]) -> dict[str, bool | None]:
        pairs = super().pairs(subjects)
        # Pairing of the recorded runs, from the earlier command
        for label, is_paired in self.record.setting("paired").items():
            if is_paired is False or pairs.get(label) is None:
                pairs[label] = is_paired
        return pairs

    def draw_figures(self, result: Result, folder: Path) -> list[str]:
        names = []
        if samples.guidance_labels(result):
            samples.draw_fronts(result, folder / samples.FRONTS)
            rows = samples.curve_panels(result)
            plot.panels(result, folder / samples.CURVES, rows, control=result.control)
            names += [samples.FRONTS, samples.CURVES]
        if losses.has_final_values(result):
            names += super().draw_figures(result, folder)
        return names

    def introduction(self, result: Result) -> str:
        return samples.introduction(result)

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        return {}  # the tables are in `further`, after the scores

    def further(self, result: Result) -> list[str]:
        parts = samples.sections(result)
        if losses.has_final_values(result):
            facts = self.facts(result)
            columns: Any = super().columns(result)[""]
            text = report.comparison(result, columns, facts, self.control_mark(result))
            parts.append(report.section("Training", losses.introduction(result), text))
        return [*parts, report.closing(result)]
