"""Training and held-out loss of groups of runs: ``generalization.json``, typed and versioned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bilora_diffusion.errors import UserError

from ..groups import control
from ..provenance import Provenance, of_runs
from ..runs import TRAINING, Run, paired, read
from ..statistics import Paired, at_training_loss, paired_difference
from ..sweep_result import EqualTraining, Summary, equal_training
from .bands import Curve, Estimate, common_steps, curve
from .claims import Claim
from .generalization_claims import judge
from .groups import Group

HELDOUT = "heldout_loss"


@dataclass(frozen=True)
class Difference:
    """A group minus the control at one step."""

    step: int
    paired: Paired


@dataclass(frozen=True)
class GroupGeneralization:
    """One group of runs.

    Args:
        label, method, seeds: see ``groups.Group``.
        paired: whether its runs saw the control's inputs, seed by seed; None for the control and
            where no seed has both.
        training, heldout, gap: over training; the gap is held-out minus training loss.
        differences: "training", "heldout" and "gap" minus the control's over training, paired by
            seed; [] where there is none.
        final_training, final_heldout, final_gap: at the last measurement.
        lowest_heldout: over training.
        lowest_at: the step of that.
        equal_training: held-out loss where the training loss has fallen to the result's
            ``equal_training``; None where that is not reached.
    """

    label: str
    method: str
    seeds: list[int]
    paired: bool | None
    training: Curve
    heldout: Curve
    gap: Curve
    differences: dict[str, list[Difference]]
    final_training: Summary
    final_heldout: Summary
    final_gap: Summary
    lowest_heldout: Summary
    lowest_at: Estimate
    equal_training: Summary


@dataclass(frozen=True)
class GeneralizationResult:
    """The whole result; ``generalization.json`` is this as JSON, with its kind and version.

    Args:
        runs: labels of the groups.
        control: the label that differences are to.
        equal_training: the lowest training loss that all paired runs reach, and whose it is.
        figures: PNG files beside the JSON.
    """

    runs: list[str]
    control: str
    equal_training: EqualTraining | None
    groups: list[GroupGeneralization]
    claims: list[Claim]
    notes: list[str]
    figures: list[str]
    provenance: Provenance


def compare(groups: Sequence[Group], wanted: str | None, command: str) -> GeneralizationResult:
    """Read the groups' run folders and compare them with the control, paired by seed.

    Args:
        wanted: the control's label; None for the first group of plain LoRA, or the first of all.
        command: for the provenance.

    Raises:
        UserError: no such control, a run without held-out loss, or a group without common steps.
    """
    base = _control(groups, wanted)
    losses = {g.label: {s: _read(r.folder) for s, r in g.runs.items()} for g in groups}
    runs = {label: {s: one.run for s, one in own.items()} for label, own in losses.items()}
    pairs = {
        label: None if label == base.label else paired(own, runs[base.label])
        for label, own in runs.items()
    }
    comparable = {label: own for label, own in runs.items() if pairs[label] is not False}
    level = equal_training(comparable)
    results = [
        _Measured(group, losses, base.label, pairs[group.label], level).result() for group in groups
    ]
    return GeneralizationResult(
        runs=[group.label for group in groups],
        control=base.label,
        equal_training=level,
        groups=results,
        claims=judge(results, base.label) if base.method == "lora" else [],
        notes=_notes(groups, results, level),
        figures=[],
        provenance=of_runs(command, [r.record for g in groups for r in g.runs.values()]),
    )


def _control(groups: Sequence[Group], wanted: str | None) -> Group:
    if wanted is None:
        return next((group for group in groups if group.method == "lora"), groups[0])
    return groups[control([group.label for group in groups], wanted)]


@dataclass(frozen=True)
class Losses:
    """Where a run has both losses; ``run`` holds the digests of its inputs."""

    steps: list[int]
    training: list[float]
    heldout: list[float]
    run: Run

    @property
    def gap(self) -> list[float]:
        return [h - t for h, t in zip(self.heldout, self.training, strict=True)]


def _read(folder: Path) -> Losses:
    run = read(folder, HELDOUT)
    points = [(step, h, t) for step, h, t in run.curve if h is not None and t is not None]
    if len(points) < 2:
        raise UserError(
            f"{folder} has {len(points)} measurements of {HELDOUT} and {TRAINING}, too few for a"
            " curve: train with --validation_dataset and --validation_loss_steps."
        )
    steps, heldout, training = (list(column) for column in zip(*points, strict=True))
    return Losses(steps, training, heldout, run)


@dataclass(frozen=True)
class _Measured:
    """A group, its control, and what is needed to compare them."""

    group: Group
    runs: Mapping[str, Mapping[int, Losses]]
    control: str
    paired: bool | None
    level: EqualTraining | None

    def result(self) -> GroupGeneralization:
        label, own = self.group.label, self.runs[self.group.label]
        steps = common_steps(label, [losses.steps for losses in own.values()])

        def over_seeds(pick: Callable[[Losses], list[float]]) -> Curve:
            return curve(steps, [dict(zip(o.steps, pick(o), strict=True)) for o in own.values()])

        return GroupGeneralization(
            label=label,
            method=self.group.method,
            seeds=list(own),
            paired=self.paired,
            training=over_seeds(lambda losses: losses.training),
            heldout=over_seeds(lambda losses: losses.heldout),
            gap=over_seeds(lambda losses: losses.gap),
            differences={name: self.over_training(name) for name in ("training", "heldout", "gap")},
            final_training=self.summary(lambda losses: losses.training[-1]),
            final_heldout=self.summary(lambda losses: losses.heldout[-1]),
            final_gap=self.summary(lambda losses: losses.gap[-1]),
            lowest_heldout=self.summary(lambda losses: min(losses.heldout)),
            lowest_at=Estimate.of({seed: _lowest_at(losses) for seed, losses in own.items()}),
            equal_training=self.summary(self._equal),
        )

    def _equal(self, losses: Losses) -> float | None:
        if self.level is None or self.paired is False:
            return None
        return at_training_loss(losses.training, losses.heldout, self.level.training_loss)

    def over_training(self, name: str) -> list[Difference]:
        """The paired difference at each step that a pair of seeds has."""
        if not self.paired:
            return []
        own, other = (
            {
                seed: dict(zip(losses.steps, getattr(losses, name), strict=True))
                for seed, losses in self.runs[label].items()
            }
            for label in (self.group.label, self.control)
        )
        found = []
        for step in sorted(set[int]().union(*own.values())):
            at = [{s: c[step] for s, c in side.items() if step in c} for side in (own, other)]
            if (difference := paired_difference(*at)) is not None:
                found.append(Difference(step, difference))
        return found

    def summary(self, figure: Callable[[Losses], float | None]) -> Summary:
        own, other = (
            {s: v for s, losses in self.runs[label].items() if (v := figure(losses)) is not None}
            for label in (self.group.label, self.control)
        )
        difference = paired_difference(own, other) if self.paired else None
        return Summary(Estimate.of(own).mean, difference)


def _lowest_at(losses: Losses) -> float:
    return float(min(zip(losses.heldout, losses.steps, strict=True))[1])


def _notes(
    groups: Sequence[Group], results: Sequence[GroupGeneralization], level: EqualTraining | None
) -> list[str]:
    text = all(run.is_text for group in groups for run in group.runs.values())
    how, on = ("in the same way", "rows") if text else ("on one grid of noise levels", "images")
    notes = [
        f"Both losses are measured {how}: `{HELDOUT}` on held-out {on}, `{TRAINING}` on those that"
        " were trained on."
    ]
    if level is not None:
        notes.append(
            "Equal training loss is the lowest that all paired runs reach; it is set by"
            f" {level.set_by}. There the gap differs as the held-out loss does."
        )
    for group, own in zip(groups, results, strict=True):
        if own.paired is False:
            notes.append(f"{group.label} saw other data or noise than the control: not paired.")
        running = [run.folder.name for run in group.runs.values() if not run.finished]
        if running:
            notes.append(f"{group.label}: not finished ({', '.join(running)}).")
    return notes
