"""Training loss, held-out loss, their gap and held-out metrics over training (Figure A3).

    python -m eval.generalization runs/heldout_loss/*
    python -m eval.generalization runs/lora-seed0 runs/bilora-seed0 --control LoRA \\
        --output_dir results/generalization
    python -m eval.generalization --group "LoRA=runs/a,runs/b" --group "rho 1=runs/c,runs/d"

Image runs must be trained with held-out images and --validation_loss_steps (as in
recipes/mini.yaml), text runs with --validation_loss_steps and --eval_train_samples. Metrics of text
runs, such as accuracy, are drawn if --validation_epochs has recorded them over training. They are
measured on held-out rows only, so they have no gap.

Runs with the same method and settings but different seeds are repeats; differences from the control
are paired by seed.

Writes rows.csv, summary.csv, result.json, report.md and generalization.png.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import option
from bilora_diffusion.core.values import BY_LEVEL, HELDOUT_LOSS, HELDOUT_PREFIX, TRAINING_GRID_LOSS

from .evaluation import Evaluation, require_common_steps
from .results import compare, report
from .results.plot import Curve, Panel
from .results.report import Column
from .results.table import Metric, Result, Row
from .subjects import Subject, by_group, check_pairing
from .text_scores.benchmarks import TITLES

GAP = "gap"
LOWEST_AT = f"step of best {HELDOUT_LOSS}"
# Recorded for image runs only; the item is the noise level.
LEVEL_LOSS = f"final {HELDOUT_LOSS} by level"


def metrics(
    common_loss: float | None = None, heldout_metrics: Iterable[str] = ()
) -> dict[str, Metric]:
    """Return titles and formats of the metrics; losses are shown times 1000.

    Args:
        common_loss: training loss at which runs are compared, shown in the title of the column "at
            equal training loss"; None if runs are not compared at equal loss.
        heldout_metrics: names of further metrics, such as "heldout_accuracy", shown in percent.
    """
    loss_text = "" if common_loss is None else f" ({1000 * common_loss:.2f})"
    titles = {
        TRAINING_GRID_LOSS: "loss on training data",
        HELDOUT_LOSS: "loss on held-out data",
        GAP: "gap: held-out minus training loss",
        f"final {TRAINING_GRID_LOSS}": "train",
        f"final {HELDOUT_LOSS}": "held-out",
        f"final {GAP}": "gap",
        f"best {HELDOUT_LOSS}": "lowest held-out",
        f"equal_training {HELDOUT_LOSS}": f"held-out at equal training loss{loss_text}",
        LEVEL_LOSS: "held-out loss at one noise level",
    }
    metrics = {name: Metric(title, scale=1000, form=".2f") for name, title in titles.items()}
    metrics[LOWEST_AT] = Metric("step of the lowest held-out loss", higher_is_better=None)
    for name in heldout_metrics:
        word = name.removeprefix(HELDOUT_PREFIX)
        title = f"held-out {TITLES.get(word, word)}"
        for key in (name, f"final {name}"):
            metrics[key] = Metric(title, higher_is_better=True, scale=100, form=".2f")
    return metrics


@dataclass(frozen=True)
class GeneralizationOptions:
    """Flags of the command."""

    section = "comparison"
    control: str | None = option(None, "Group to compare with (default: LoRA, or the first).")


class Generalization(Evaluation):
    """Training and held-out loss of each run over training, their gap, metrics, and key figures.

    ``settings``:

    - ``paired``: group -> whether its runs saw the same inputs as the control's runs, or None;
    - ``equal_training``: the training loss at which runs are compared and the group that sets it,
      or None;
    - ``heldout_metrics``: names of the metrics on held-out rows.
    """

    name = "generalization"
    options = (GeneralizationOptions,)

    def prepare(self, subjects: Sequence[Subject]) -> None:
        self.control = compare.control(subjects, self.args.control)
        for label, runs in by_group(subjects).items():
            steps_of_runs = []
            for run in runs:
                steps_of_runs.append({step for step, _, _ in losses(run)})
            require_common_steps(label, steps_of_runs)
        self.settings["paired"] = check_pairing(subjects, self.control)

    def rows(self, subject: Subject) -> Iterator[Row]:
        points = losses(subject)
        for step, training, heldout in points:
            yield subject.row(TRAINING_GRID_LOSS, training, step=step)
            yield subject.row(HELDOUT_LOSS, heldout, step=step)
            yield subject.row(GAP, heldout - training, step=step)
        for step, name, value in heldout_metrics(subject):
            yield subject.row(name, value, step=step)
        last_step = points[-1][0]
        for line in subject.log():
            for name, loss in line.items():
                if line["step"] == last_step and name.startswith(BY_LEVEL):
                    yield subject.row(LEVEL_LOSS, loss, item=name.removeprefix(BY_LEVEL))

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        # None means that the group has no seed in common with the control: pairing is not known.
        unpaired = [group for group, pair in self.settings["paired"].items() if pair is False]
        # Runs on different data reach different losses, so they do not set the common loss.
        common_loss, equal_rows = compare.equal_training(
            rows, HELDOUT_LOSS, TRAINING_GRID_LOSS, unpaired
        )
        best_rows = compare.best(rows, HELDOUT_LOSS)
        step_of: dict[tuple[str, float | None], int | None] = {}
        for row in rows:
            if row.metric == HELDOUT_LOSS:  # of several steps with the same loss, keep the first
                step_of.setdefault((row.subject, row.value), row.step)
        measured_names = dict.fromkeys(row.metric for row in rows)
        further_metrics = [name for name in measured_names if _is_heldout_metric(name)]
        self.settings["heldout_metrics"] = further_metrics
        for name in (TRAINING_GRID_LOSS, HELDOUT_LOSS, GAP, *further_metrics):
            rows += compare.final(rows, name)
        rows += best_rows
        rows += equal_rows
        for row in best_rows:
            step = step_of[row.subject, row.value]
            rows.append(replace(row, metric=LOWEST_AT, value=step))
        self.settings["equal_training"] = None if common_loss is None else asdict(common_loss)
        self._note(subjects, unpaired)
        summaries = compare.summaries(rows, self.control, unpaired=unpaired)
        training_loss = None if common_loss is None else common_loss.training_loss
        titles = metrics(training_loss, further_metrics)
        return self.result(subjects, rows, summaries, self.control, metrics=titles)

    def _note(self, subjects: Sequence[Subject], unpaired: Sequence[str]) -> None:
        manner, data = "on the same grid of noise levels", "images"
        if all(subject.is_text for subject in subjects):
            manner, data = "in the same way", "rows"
        self.notes.append(
            f"Both losses are measured {manner}: `{HELDOUT_LOSS}` on held-out {data},"
            f" `{TRAINING_GRID_LOSS}` on training data."
        )
        common_loss = self.settings["equal_training"]
        if common_loss:
            self.notes.append(
                "Equal training loss is the lowest training loss that all compared runs reach; the"
                f" group {common_loss['set_by']} sets it. At equal training loss, a difference in"
                " held-out loss is also a difference in the gap."
            )
        for label, runs in by_group(subjects).items():
            if label in unpaired:
                self.notes.append(
                    f"{label} saw different data or noise than the control, so it is not paired."
                )
            running = [run.label for run in runs if not run.finished]
            if running:
                self.notes.append(f"{label}: not finished ({', '.join(running)}).")

    def panels(self, result: Result) -> Mapping[str, Sequence[Sequence[Panel]]]:
        """Return Figure A3: losses, gap and metrics, with differences from the control below.

        A metric that was measured only at the end of training is shown in the table only.
        """
        upper_row, lower_row = [], []
        lower_title = f"minus {result.control}: mean and 95 % interval"
        names = [TRAINING_GRID_LOSS, HELDOUT_LOSS, GAP]
        # Results of earlier versions lack the setting.
        for name in result.settings.get("heldout_metrics", ()):
            if any(len(result.curve(group, name)) > 1 for group in result.groups):
                names.append(name)
        for name in names:
            curves, differences = [], []
            for group in result.groups:
                label = f"{group}, {len(result.members(group))} seeds"
                curves.append(Curve(group, name, label=label))
                differences.append(Curve(group, name, difference=True))
            title = result.metrics[name].title
            upper_row.append(Panel(title, name, curves, legend=name == TRAINING_GRID_LOSS))
            lower_row.append(Panel(lower_title, name, differences, lines=[0]))
        if len(result.groups) == 1:
            return {"generalization.png": [upper_row]}
        return {"generalization.png": [upper_row, lower_row]}

    def introduction(self, result: Result) -> str:
        units = "Losses x 1000"
        if result.settings.get("heldout_metrics"):
            units += " and metrics in percent"
        return (
            f"{units}: means over seeds. A difference from"
            f" {report.escape_table_cell(result.control)} is paired by seed, with"
            f" {report.INTERVALS} and the number of seeds in which the group is better."
        )

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        names = [f"final {name}" for name in (TRAINING_GRID_LOSS, HELDOUT_LOSS, GAP)]
        names += [f"best {HELDOUT_LOSS}", f"equal_training {HELDOUT_LOSS}"]
        columns = [Column(name, difference=True, interval=False) for name in names]
        for name in result.settings.get("heldout_metrics", ()):
            columns.append(Column(f"final {name}", difference=True, interval=False))
        return {"": [*columns, Column(LOWEST_AT)]}

    def further(self, result: Result) -> list[str]:
        return [_by_level(result), *super().further(result)]


def _by_level(result: Result) -> str:
    """Return a section on the final held-out loss by noise level, with a column for each group.

    The result is "" if the loss was not measured by noise level.
    """
    levels = {row.item for row in result.select(LEVEL_LOSS)}
    rows = []
    for level in sorted(levels, key=int):
        cells = [level]
        for group in result.groups:
            line = result.summary(group, LEVEL_LOSS, level)
            cells.append(report.against_control(result, line, group))
        rows.append(cells)
    if not rows:
        return ""
    heads = ["noise level"]
    for group in result.groups:
        is_control = group == result.control
        heads.append(group if is_control else f"{group} minus {result.control}")
    return report.section("Final held-out loss by noise level", report.table(heads, rows))


def losses(subject: Subject) -> list[tuple[int, float, float]]:
    """Return (step, training loss, held-out loss) for the steps at which a run measured both."""
    points = []
    for line in subject.log():
        training, heldout = line.get(TRAINING_GRID_LOSS), line.get(HELDOUT_LOSS)
        if training is not None and heldout is not None:
            points.append((line["step"], training, heldout))
    if len(points) < 2:
        raise UserError(
            f"{subject.folder} has {len(points)} measurements of {HELDOUT_LOSS} and"
            f" {TRAINING_GRID_LOSS}, too few for a curve: train with --validation_loss_steps, and"
            " with --validation_dataset (images) or --eval_train_samples (text)."
        )
    return points


def _is_heldout_metric(name: str) -> bool:
    """Return whether this is a metric on held-out rows, such as "heldout_accuracy", not a loss."""
    return name.startswith(HELDOUT_PREFIX) and not name.startswith(HELDOUT_LOSS)


def heldout_metrics(subject: Subject) -> list[tuple[int, str, float]]:
    """Return (step, name, value) of each recorded metric on held-out rows; [] for image runs."""
    if not subject.is_text:
        return []
    values: dict[tuple[int, str], float] = {}
    for line in subject.log():
        for name, value in line.items():
            if _is_heldout_metric(name) and value is not None:
                values[line["step"], name] = value
    return [(step, name, value) for (step, name), value in values.items()]


main = Generalization.main

if __name__ == "__main__":
    sys.exit(main())
