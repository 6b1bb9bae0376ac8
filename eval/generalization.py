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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bilora_diffusion.errors import UserError

from . import plot, report
from .command import Parser
from .evaluation import Evaluation, require_common_steps
from .report import UNCLEAR, Claim
from .subjects import Subject, by_group, paired
from .table import Metric, Result, Row, Summary

TRAINING, HELDOUT, GAP = "train_grid_loss", "heldout_loss", "gap"
LOWEST_AT = f"step of best {HELDOUT}"
NEARLY_IDENTICAL = 0.02
"""Share of the control's training loss within which another counts as nearly identical."""


def metrics(level: float | None = None) -> dict[str, Metric]:
    """How the metrics are shown: losses times 1000.

    Args:
        level: the training loss at which runs are compared.
    """

    def loss(title: str) -> Metric:
        return Metric(title, higher_is_better=False, scale=1000, form=".2f")

    at = "" if level is None else f" ({1000 * level:.2f})"
    return {
        TRAINING: loss("loss on what is trained on"),
        HELDOUT: loss("loss on held-out data"),
        GAP: loss("gap: held-out minus training loss"),
        f"final {TRAINING}": loss("train"),
        f"final {HELDOUT}": loss("held-out"),
        f"final {GAP}": loss("gap"),
        f"best {HELDOUT}": loss("lowest held-out"),
        f"equal_training {HELDOUT}": loss(f"held-out at equal training loss{at}"),
        LOWEST_AT: Metric("step of the lowest", higher_is_better=None),
    }


class Generalization(Evaluation):
    """Both losses of each run at each step that has both, their gap, and the key figures of it.

    ``settings`` has which groups are ``paired`` with the control, and ``equal_training``: the
    training loss at which runs are compared, and the group that sets it.
    """

    name = "generalization"

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        super().arguments(parser)
        help_text = "label of the group to compare with; default: LoRA, or the first"
        parser.add_argument("--control", help=help_text)

    def prepare(self, subjects: Sequence[Subject]) -> None:
        from . import compare

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
        from . import compare

        unpaired = [group for group, same in self.settings["paired"].items() if same is False]
        level, equal = compare.equal_training(rows, HELDOUT, TRAINING, unpaired)
        lowest = {(row.subject, row.value): row.step for row in rows if row.metric == HELDOUT}
        best = compare.best(rows, HELDOUT)
        rows += [row for name in (TRAINING, HELDOUT, GAP) for row in compare.final(rows, name)]
        rows += [*best, *equal]
        rows += [replace(r, metric=LOWEST_AT, value=lowest[r.subject, r.value]) for r in best]
        self.settings["equal_training"] = None if level is None else asdict(level)
        self._note(subjects, unpaired)
        lines = compare.summaries(rows, self.control, unpaired=unpaired)
        shown = metrics(None if level is None else level.training_loss)
        return self.result(subjects, rows, lines, self.control, metrics=shown)

    def _note(self, subjects: Sequence[Subject], unpaired: Sequence[str]) -> None:
        text = all(subject.is_text for subject in subjects)
        how, on = ("in the same way", "rows") if text else ("on one grid of noise levels", "images")
        self.notes.append(
            f"Both losses are measured {how}: `{HELDOUT}` on held-out {on}, `{TRAINING}` on those"
            " that were trained on."
        )
        if level := self.settings["equal_training"]:
            self.notes.append(
                "Equal training loss is the lowest that all paired runs reach; it is set by"
                f" {level['set_by']}. There the gap differs as the held-out loss does."
            )
        for label, runs in by_group(subjects).items():
            if label in unpaired:
                self.notes.append(f"{label} saw other data or noise than the control: not paired.")
            if running := [run.label for run in runs if not run.finished]:
                self.notes.append(f"{label}: not finished ({', '.join(running)}).")

    def figures(self, result: Result, folder: Path) -> list[str]:
        """Figure A3: both losses and their gap, and under them the differences to the control."""
        looks = plot.looks(result.groups, result.control)
        panels = [(name, result.metrics[name].title) for name in (TRAINING, HELDOUT, GAP)]
        several = len(result.groups) > 1
        with plot.canvas(folder / "generalization.png", 2 if several else 1, 3) as (_, axes):
            for axis, (name, title) in zip(axes[0], panels, strict=True):
                for group in result.groups:
                    label = f"{group}, {len(result.members(group))} seeds"
                    style = {"marker": ".", "ms": 4}
                    plot.line(
                        axis, result.curve(group, name), looks[group]["color"], label, **style
                    )
                plot.finish(axis, title, name, legend=name == TRAINING)
            for axis, (name, _) in zip(axes[1] if several else (), panels, strict=False):
                axis.axhline(0, color="black", lw=0.8)
                for group in result.groups:
                    _differences(axis, result.over_training(group, name), looks[group]["color"])
                plot.finish(axis, f"minus {result.control}: mean and 95 % interval", name)
        return ["generalization.png"]

    def report(self, result: Result) -> str:
        compared = [f"final {name}" for name in (TRAINING, HELDOUT, GAP)]
        compared += [f"best {HELDOUT}", f"equal_training {HELDOUT}"]
        return report.page(
            "# Generalization",
            "Losses x 1000, mean over seeds, and the difference to"
            f" {report.escaped(result.control)} paired by seed, with {report.INTERVALS} and the"
            " number of seeds in which it is lower.",
            report.comparison(result, [(name, "") for name in compared], [(LOWEST_AT, "")]),
            report.claims(judge(result)),
            report.closing(result),
        )


def losses(subject: Subject) -> list[tuple[int, float, float]]:
    """(step, training loss, held-out loss) wherever a run measured both.

    Raises:
        UserError: that is fewer than two times.
    """
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


def judge(result: Result) -> list[Claim]:
    """The claims on each Bi-LoRA group, against plain LoRA as the control."""
    methods = {entry.group: entry.method for entry in result.subjects}
    if methods[result.control] != "lora":
        return []
    judged = []
    for group in result.groups:
        for name, claim in (
            (TRAINING, "training losses are nearly identical"),
            (HELDOUT, "Bi-LoRA attains a lower held-out loss"),
            (GAP, "Bi-LoRA's gap of held-out minus training loss is smaller"),
        ):
            if methods[group] == "bilora":
                both = (result.summary(one, f"final {name}") for one in (group, result.control))
                verdict, evidence = _judged(name, *both)
                label = f"{group} minus {result.control}"
                judged.append(Claim(label, "Fig. A3", claim, verdict, evidence))
    return judged


def _judged(name: str, own: Summary | None, base: Summary | None) -> tuple[str, str]:
    """The verdict, and the difference with its size beside the control's value."""
    if own is None or base is None or own.difference is None or base.mean is None:
        return UNCLEAR, "the runs are not paired, so there is no difference"
    plain, ends = Metric(name, form=".5f"), own.difference_interval
    share = f", {own.difference / base.mean:+.2%} of the control's" if base.mean else ""
    evidence = (
        f"the final difference is {report.number(own.difference, plain, '+')}"
        f" {report.interval(ends, plain, '+')}{share}, lower in {own.lower} of {own.pairs} seeds"
    )
    if name != TRAINING:
        return report.below(ends, 0), evidence
    width = NEARLY_IDENTICAL * base.mean
    verdicts = [report.below(ends, width), report.above(ends, -width)]
    return report.both(verdicts), f"{evidence} (within {NEARLY_IDENTICAL:.0%} counts as identical)"


def _differences(axis: Any, lines: Sequence[Summary], color: Any) -> None:
    lines = [line for line in lines if line.difference is not None]
    steps, means = [line.step for line in lines], [line.difference for line in lines]
    axis.plot(steps, means, color=color, marker=".")
    for line in lines:
        if line.difference_interval is not None:
            axis.plot([line.step] * 2, line.difference_interval, color=color, lw=1)


main = Generalization.main

if __name__ == "__main__":
    sys.exit(main())
