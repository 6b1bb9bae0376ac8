"""Training loss, held-out loss and their gap over training (Figure A3).

    python -m eval.generalization runs/heldout_loss/*
    python -m eval.generalization runs/lora-seed0 runs/bilora-seed0 --control LoRA \\
        --output_dir results/generalization
    python -m eval.generalization --group "LoRA=runs/a,runs/b" --group "rho 1=runs/c,runs/d"

Runs that make images have to be trained with --validation_dataset and --validation_loss_steps
(recipes/mini.yaml does both), runs on text with --validation_loss_steps and --eval_train_samples.
Runs of one method and setting that differ in the seed are repeats; differences to the control are
paired by seed.
Writes rows.csv, summary.csv, result.json, report.md and generalization.png.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import option

from . import compare, report
from .evaluation import Evaluation, require_common_steps
from .plot import Curve, Panel
from .report import Column
from .subjects import Subject, by_group, paired
from .table import Metric, Result, Row

TRAINING, HELDOUT, GAP = "train_grid_loss", "heldout_loss", "gap"
LOWEST_AT = f"step of best {HELDOUT}"


def metrics(level: float | None = None) -> dict[str, Metric]:
    """Titles and forms of the metrics: losses times 1000."""

    def loss(title: str) -> Metric:
        return Metric(title, higher_is_better=False, scale=1000, form=".2f")

    level_text = "" if level is None else f" ({1000 * level:.2f})"
    return {
        TRAINING: loss("loss on what is trained on"),
        HELDOUT: loss("loss on held-out data"),
        GAP: loss("gap: held-out minus training loss"),
        f"final {TRAINING}": loss("train"),
        f"final {HELDOUT}": loss("held-out"),
        f"final {GAP}": loss("gap"),
        f"best {HELDOUT}": loss("lowest held-out"),
        f"equal_training {HELDOUT}": loss(f"held-out at equal training loss{level_text}"),
        LOWEST_AT: Metric("step of the lowest", higher_is_better=None),
    }


@dataclass(frozen=True)
class GeneralizationOptions:
    """Flags of the command."""

    section = "comparison"
    control: str | None = option(None, "Group to compare with (default: LoRA, or the first).")


class Generalization(Evaluation):
    """Both losses of each run at each step that has both, their gap, and the key figures of it.

    ``settings`` has which groups are ``paired`` with the control, and ``equal_training``: the
    training loss at which runs are compared, and the group that sets it.
    """

    name, options = "generalization", (GeneralizationOptions,)

    def prepare(self, subjects: Sequence[Subject]) -> None:
        self.control = compare.control(subjects, self.args.control)
        for label, runs in by_group(subjects).items():
            require_common_steps(label, [{step for step, *_ in losses(run)} for run in runs])
        self.settings["paired"] = paired(subjects, self.control)

    def rows(self, subject: Subject) -> Iterator[Row]:
        for step, training, heldout in losses(subject):
            yield subject.row(TRAINING, training, step=step)
            yield subject.row(HELDOUT, heldout, step=step)
            yield subject.row(GAP, heldout - training, step=step)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        # None where nothing tells whether a group is paired.
        unpaired = [group for group, pair in self.settings["paired"].items() if pair is False]
        # Runs on other data reach other losses, and do not set the level.
        level, equal = compare.equal_training(rows, HELDOUT, TRAINING, unpaired)
        lowest = {(row.subject, row.value): row.step for row in rows if row.metric == HELDOUT}
        best = compare.best(rows, HELDOUT)
        final = [compare.final(rows, name) for name in (TRAINING, HELDOUT, GAP)]
        for derived in (*final, best, equal):
            rows += derived
        for row in best:
            step = lowest[row.subject, row.value]
            rows.append(replace(row, metric=LOWEST_AT, value=step))
        self.settings["equal_training"] = None if level is None else asdict(level)
        self._note(subjects, unpaired)
        summaries = compare.summaries(rows, self.control, unpaired=unpaired)
        titles = metrics(None if level is None else level.training_loss)
        return self.result(subjects, rows, summaries, self.control, metrics=titles)

    def _note(self, subjects: Sequence[Subject], unpaired: Sequence[str]) -> None:
        text = all(subject.is_text for subject in subjects)
        how, on = ("in the same way", "rows") if text else ("on one grid of noise levels", "images")
        self.notes.append(
            f"Both losses are measured {how}: `{HELDOUT}` on held-out {on}, `{TRAINING}` on those"
            " that were trained on."
        )
        level = self.settings["equal_training"]
        if level:
            self.notes.append(
                "Equal training loss is the lowest that all paired runs reach; it is set by"
                f" {level['set_by']}. There the gap differs as the held-out loss does."
            )
        for label, runs in by_group(subjects).items():
            if label in unpaired:
                self.notes.append(f"{label} saw other data or noise than the control: not paired.")
            running = [run.label for run in runs if not run.finished]
            if running:
                self.notes.append(f"{label}: not finished ({', '.join(running)}).")

    def panels(self, result: Result) -> Mapping[str, Sequence[Sequence[Panel]]]:
        """Figure A3: both losses and their gap, and under them the differences to the control."""
        groups, minus = result.groups, f"minus {result.control}: mean and 95 % interval"
        rows = [[], []]
        for name in (TRAINING, HELDOUT, GAP):
            curves, differences = [], []
            for group in groups:
                label = f"{group}, {len(result.members(group))} seeds"
                curves.append(Curve(group, name, label=label))
                differences.append(Curve(group, name, difference=True))
            title = result.metrics[name].title
            rows[0].append(Panel(title, name, curves, legend=name == TRAINING))
            rows[1].append(Panel(minus, name, differences, levels=[0]))
        return {"generalization.png": rows if len(groups) > 1 else rows[:1]}

    def introduction(self, result: Result) -> str:
        return (
            "Losses x 1000, mean over seeds, and the difference to"
            f" {report.escaped(result.control)} paired by seed, with {report.INTERVALS} and the"
            " number of seeds in which it is lower."
        )

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        names = [f"final {name}" for name in (TRAINING, HELDOUT, GAP)]
        names += [f"best {HELDOUT}", f"equal_training {HELDOUT}"]
        columns = [Column(name, difference=True, interval=False) for name in names]
        return {"": [*columns, Column(LOWEST_AT)]}


def losses(subject: Subject) -> list[tuple[int, float, float]]:
    """(step, training loss, held-out loss) wherever a run measured both."""
    points = [
        (line["step"], line[TRAINING], line[HELDOUT])
        for line in subject.log()
        if line.get(TRAINING) is not None and line.get(HELDOUT) is not None
    ]
    if len(points) < 2:
        raise UserError(
            f"{subject.folder} has {len(points)} measurements of {HELDOUT} and {TRAINING}, too few"
            " for a curve: train with --validation_dataset and --validation_loss_steps."
        )
    return points


main = Generalization.main

if __name__ == "__main__":
    sys.exit(main())
