"""What the recorded runs show: ``dynamics.json``, typed and versioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bilora_diffusion.adapters import AUXILIARY
from bilora_diffusion.methods import get
from bilora_diffusion.train.dynamics import GAIN, NORMS, RATIO

from ..provenance import Provenance, of_runs
from . import courses
from .bands import Curve, Estimate, common_steps, curve, settles
from .claims import Claim
from .courses import CROSS, Course
from .dynamics_claims import NEGLIGIBLE, judge
from .groups import Group, RunFolder

LEVEL = 0.9
"""The cosine to the final weights at which they count as settled."""
SMALL_MULTIPLES = 4
_COMPARED = ("auxiliary_learning_rate", "rho", "rank", "auxiliary_rank", "learning_rate")


@dataclass(frozen=True)
class GroupDynamics:
    """One group of runs.

    Args:
        label, method, seeds: see ``groups.Group``.
        steps: optimizer steps of its runs.
        options: learning rates, ranks and radius.
        curves: name -> curve over training: "norm_BeA" and so on (Eq. 5), "ratio", "ascent_gain",
            "column_overlap", "row_overlap", "product_cosine", "auxiliary_norm" (after projection),
            "auxiliary_norm_before", and the cosines of ``courses.Course``.
        chance: overlap of random subspaces of these sizes, "columns" and "rows".
        settles: cosine's name -> step from which on it is ``LEVEL`` or more.
        start: cosine's name -> its first value.
        statistics: "ratio_lowest", "ratio_median", "ratio_highest" over the steps that have one;
            "layer_ratio" (a layer's median over steps, then the median over layers) and
            "layers_above" (share of the layers whose median is above ``NEGLIGIBLE``);
            "largest_auxiliary_to_primary/product" (and "/factors"), by absolute value; "final_..."
            and "mean_..." of overlaps, cosine and gain.
    """

    label: str
    method: str
    seeds: list[int]
    steps: int
    options: dict[str, Any]
    curves: dict[str, Curve]
    chance: dict[str, float]
    settles: dict[str, Estimate]
    start: dict[str, Estimate]
    statistics: dict[str, Estimate]


@dataclass(frozen=True)
class LayerCurves:
    """The terms of Eq. 5 in one layer of one LoRA-SAM group (Fig. A4)."""

    group: str
    layer: str
    curves: dict[str, Curve]


@dataclass(frozen=True)
class DynamicsResult:
    """The whole result; ``dynamics.json`` is this as JSON, with its kind and version.

    Args:
        runs: labels of the groups.
        layer: "all" or the one layer that the groups' curves are of.
        level: cosine at which weights count as settled.
        figures: PNG files beside the JSON.
    """

    runs: list[str]
    layer: str
    level: float
    groups: list[GroupDynamics]
    layers: list[LayerCurves]
    claims: list[Claim]
    notes: list[str]
    figures: list[str]
    provenance: Provenance


def measure(groups: Sequence[Group], layer: str, command: str) -> DynamicsResult:
    """Read the groups' run folders and sum them up.

    Args:
        layer: "all" or a layer's name.
        command: for the provenance.

    Raises:
        UserError: a run was not recorded or a snapshot is damaged, a layer is unknown, or the runs
            of a group have no step in common.
    """
    found: list[GroupDynamics] = []
    layers: list[LayerCurves] = []
    for group in groups:
        names = courses.layer_names(group.first.folder)
        courses.choose(names, layer)
        small = courses.spread(names, SMALL_MULTIPLES) if group.method == "lora-sam" else []
        read = {seed: courses.read(run.folder, [layer, *small]) for seed, run in group.runs.items()}
        found.append(_summary(group, {seed: own[layer] for seed, own in read.items()}))
        for name in small:
            own = _curves(group.label, {seed: course[name] for seed, course in read.items()})
            kept = {key: value for key, value in own.items() if key in (*NORMS, RATIO)}
            layers.append(LayerCurves(group.label, name, kept))
    return DynamicsResult(
        runs=[group.label for group in groups],
        layer=layer,
        level=LEVEL,
        groups=found,
        layers=layers,
        claims=judge(found, LEVEL),
        notes=_notes(groups),
        figures=[],
        provenance=of_runs(command, [r.record for g in groups for r in g.runs.values()]),
    )


def _summary(group: Group, own: Mapping[int, Course]) -> GroupDynamics:
    curves = _curves(group.label, own)
    cosines = [name for name in curves if "/" in name and not name.startswith(CROSS)]
    steps = {name: curves[name].steps for name in cosines}
    first = group.first
    return GroupDynamics(
        label=group.label,
        method=group.method,
        seeds=list(group.runs),
        steps=max(course.steps[-1] for course in own.values()),
        options={name: first.option(name) for name in _options(first)},
        curves=curves,
        chance=next(iter(own.values())).chance,
        settles={
            name: Estimate.of(
                {s: settles(steps[name], _at(c, name, steps[name]), LEVEL) for s, c in own.items()}
            )
            for name in cosines
        },
        start={
            name: Estimate.of(
                {s: next(iter(_defined(c, name, steps[name])), None) for s, c in own.items()}
            )
            for name in cosines
        },
        statistics=_statistics(own, curves),
    )


def _options(run: RunFolder) -> list[str]:
    reads = get(run.method).reads
    own = [name for name in _COMPARED if name in reads or name in ("rank", "learning_rate")]
    return [*own, "rho_norm", "rho_schedule"] if AUXILIARY in get(run.method).adapters else own


def _curves(label: str, own: Mapping[int, Course]) -> dict[str, Curve]:
    """The curves that every seed has."""
    names = [n for n in next(iter(own.values())).values if all(n in c.values for c in own.values())]
    common_steps(label, [_recorded(course) for course in own.values()])
    return {
        name: curve(
            common_steps(label, [list(course.values[name]) for course in own.values()]),
            [course.values[name] for course in own.values()],
        )
        for name in names
    }


def _recorded(course: Course) -> list[int]:
    """The steps that have a snapshot."""
    return list(course.values["primary/product"])


def _statistics(own: Mapping[int, Course], curves: Mapping[str, Curve]) -> dict[str, Estimate]:
    found: dict[str, dict[int, float | None]] = {}

    def note(name: str, seed: int, value: float | None) -> None:
        found.setdefault(name, {})[seed] = value

    for seed, course in own.items():
        if RATIO in curves:
            ratios = _defined(course, RATIO, curves[RATIO].steps)
            note("ratio_lowest", seed, min(ratios, default=None))
            note("ratio_median", seed, median(ratios) if ratios else None)
            note("ratio_highest", seed, max(ratios, default=None))
            medians = _layer_medians(course)
            note("layer_ratio", seed, median(medians) if medians else None)
            above = [value > NEGLIGIBLE for value in medians]
            note("layers_above", seed, sum(above) / len(above) if above else None)
        if f"{CROSS}/product" in curves:
            for quantity in ("factors", "product"):
                name = f"{CROSS}/{quantity}"
                values = [abs(v) for v in _defined(course, name, curves[name].steps)]
                note(f"largest_{name}", seed, max(values, default=None))
        for name in (GAIN, "column_overlap", "row_overlap", "product_cosine"):
            if name in curves:
                values = _defined(course, name, curves[name].steps)
                note(f"final_{name}", seed, values[-1] if values else None)
                note(f"mean_{name}", seed, sum(values) / len(values) if values else None)
    return {name: Estimate.of(values) for name, values in found.items()}


def _layer_medians(course: Course) -> list[float]:
    """Each layer's median ratio over the steps that have one."""
    columns = zip(*course.layer_ratios.values(), strict=True)
    found = [[value for value in column if value is not None] for column in columns]
    return [median(values) for values in found if values]


def _at(course: Course, name: str, steps: Sequence[int]) -> list[float | None]:
    return [course.values[name].get(step) for step in steps]


def _defined(course: Course, name: str, steps: Sequence[int]) -> list[float]:
    return [value for value in _at(course, name, steps) if value is not None]


def _notes(groups: Sequence[Group]) -> list[str]:
    notes = []
    for group in groups:
        running = [run.folder.name for run in group.runs.values() if not run.finished]
        if running:
            notes.append(
                f"{group.label}: not finished ({', '.join(running)}), so the last snapshot stands"
                " for the final weights."
            )
        if len(group.runs) == 1:
            notes.append(f"{group.label}: one seed, so there are no bands and no intervals.")
    if any(group.method == "lora-sam" for group in groups):
        notes.append(
            "Terms of Eq. 5 are taken at the perturbation, so before the step's update; a ratio is"
            " left out where e_B e_A is zero (the first step, when B is zero)."
        )
    return notes
