"""One run's dynamics as curves: what was recorded, and cosines to the final weights; and key
figures of these: when weights settle, how far the adapters are apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bilora_diffusion.adapters import AUXILIARY, PRIMARY, Factors
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import snapshots
from bilora_diffusion.run.snapshots import Snapshot
from bilora_diffusion.train.dynamics import (
    COLUMNS,
    COSINE,
    FIRST_ORDER,
    GAIN,
    NORMS,
    RATIO,
    ROWS,
    TERMS,
    inner_products,
    totals,
)

from .subjects import Subject
from .table import Row

ALL_LAYERS = "all"
QUANTITIES = ("A", "B", "factors", "product")
"""Vectors that a cosine is taken of: A, B, both, or B A, all chosen layers as one."""
NAMES = {PRIMARY: "primary", AUXILIARY: "auxiliary"}
CROSS = "auxiliary_to_primary"
LOGGED = ("auxiliary_norm", "auxiliary_norm_before")
OF_LAYERS = (*NORMS, RATIO)
"""Curves of single layers that are shown (Fig. A4)."""
NEGLIGIBLE = 1e4
"""Ratio of Eq. 5's terms above which the third counts as negligible."""
SMALL_MULTIPLES = 4
LEVEL = 0.9
"""The cosine to the final weights at which they count as settled."""


@dataclass(frozen=True)
class RunCurves:
    """Curves of one run over some layers.

    Args:
        values: name -> step -> value, None where it is not defined. Cosines are called
            "primary/A", "auxiliary/product", "auxiliary_to_primary/product" and so on.
        layer_ratios: step -> ratio of Figure 2b of each layer, None where it is not defined; of
            LoRA-SAM.
        chance: "column_overlap" and "row_overlap" of random subspaces, the mean of max(r1, r2) / d
            over the layers; {} without an auxiliary.
    """

    values: dict[str, dict[int, float | None]]
    layer_ratios: dict[int, list[float | None]]
    chance: dict[str, float]

    @property
    def steps(self) -> list[int]:
        """All steps that have a value."""
        return sorted({step for curve in self.values.values() for step in curve})

    @property
    def recorded(self) -> set[int]:
        """The steps that have a snapshot."""
        return set(self.values["primary/product"])

    def figures(self) -> dict[str, float | None]:
        """Figures that need its layers one by one.

        "layer_ratio" is a layer's median ratio over the steps that have one, then the median over
        layers; "layers_above" the share of the layers whose median is above ``NEGLIGIBLE``; "chance
        column_overlap" (and of rows) the overlap of random subspaces of these sizes.
        """
        figures: dict[str, float | None] = {}
        for name, value in self.chance.items():
            figures[f"chance {name}"] = value
        if RATIO not in self.values:
            return figures
        medians = []
        for ratios in zip(*self.layer_ratios.values(), strict=True):  # of one layer, over the steps
            defined = [ratio for ratio in ratios if ratio is not None]
            if defined:
                medians.append(median(defined))
        figures["layer_ratio"] = figures["layers_above"] = None
        if medians:
            figures["layer_ratio"] = median(medians)
            count = sum(value > NEGLIGIBLE for value in medians)
            figures["layers_above"] = count / len(medians)
        return figures


def layer_names(run: Subject) -> list[str]:
    """The layers of a recorded run."""
    return snapshots.read(_files(run)[-1]).names


def _files(run: Subject) -> list[Path]:
    files = [] if run.folder is None else list(snapshots.steps(run.folder).values())
    if len(files) < 2:
        problem = "one snapshot only" if files else "no dynamics"
        raise UserError(f"{run.folder} has {problem}: train to the end with --log_dynamics.")
    return files


def spread(names: Sequence[str], count: int = SMALL_MULTIPLES) -> list[str]:
    """About ``count`` of the layers, evenly spaced, the first and the last among them."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def read(run: Subject, layers: Sequence[str] = ()) -> dict[str, RunCurves]:
    """The curves of a run over ``ALL_LAYERS`` layers and over single ones."""
    files = _files(run)
    final = snapshots.read(files[-1])
    for layer in layers:
        if layer not in final.names:
            raise UserError(f"{run.folder} lacks {layer} of its group: leave it out.")
    # name of a curve's layers -> their numbers in a snapshot
    indices_of = {ALL_LAYERS: list(range(len(final.names)))}
    for layer in layers:
        indices_of[layer] = [final.names.index(layer)]
    curves = {
        name: RunCurves({}, {}, _chance(final, indices)) for name, indices in indices_of.items()
    }
    for file in files:
        # One snapshot and the last one are in memory at a time.
        snapshot = final if file == files[-1] else snapshots.read(file)
        if snapshot.names != final.names:
            raise UserError(f"{file} has other layers than {files[-1].name}: train again.")
        for name, indices in indices_of.items():
            # Norms and cosines are of these layers as one vector.
            figures = {key: values[indices] for key, values in snapshot.layers.items()}
            for key, value in (totals(figures) | _cosines(snapshot, final, indices)).items():
                curves[name].values.setdefault(key, {})[snapshot.step] = value
            if FIRST_ORDER in figures:
                ratios = (figures[FIRST_ORDER] / figures[TERMS[-1]]).tolist()
                curves[name].layer_ratios[snapshot.step] = [
                    ratio if math.isfinite(ratio) else None for ratio in ratios
                ]
    for line in run.log():
        for key in LOGGED:
            if key in line:
                for run_curves in curves.values():
                    run_curves.values.setdefault(key, {})[line["step"]] = line[key]
    return curves


def _cosines(
    snapshot: Snapshot, final: Snapshot, indices: Sequence[int]
) -> dict[str, float | None]:
    """Cosines of each adapter with its final weights, and of the auxiliary with the primary's."""
    pairs = {
        NAMES[adapter]: (factors, final.factors[adapter])
        for adapter, factors in snapshot.factors.items()
    }
    if AUXILIARY in snapshot.factors:
        pairs[CROSS] = (snapshot.factors[AUXILIARY], final.factors[PRIMARY])
    values = {}
    for name, (left, right) in pairs.items():
        of_layers = cosines([left[i] for i in indices], [right[i] for i in indices])
        for quantity, value in of_layers.items():
            values[f"{name}/{quantity}"] = value
    return values


def cosines(left: Sequence[Factors], right: Sequence[Factors]) -> dict[str, float | None]:
    """Cosine of two adapters by each of ``QUANTITIES``, all layers as one vector.

    None where one of them is zero; for A, B and factors also where the ranks differ.
    """
    values: dict[str, float | None] = dict.fromkeys(QUANTITIES)
    if all(f.A.shape == g.A.shape for f, g in zip(left, right, strict=True)):
        dots_A = _dots([f.A for f in left], [g.A for g in right])
        dots_B = _dots([f.B for f in left], [g.B for g in right])
        values["A"], values["B"] = _cosine(*dots_A), _cosine(*dots_B)
        # (A, B) as one vector: the inner products add up.
        values["factors"] = _cosine(*(a + b for a, b in zip(dots_A, dots_B, strict=True)))
    values["product"] = _cosine(
        float(inner_products(left, right).sum()),
        float(inner_products(left, left).sum()),
        float(inner_products(right, right).sum()),
    )
    return values


def _dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[float, float, float]:
    """<v, w>, <v, v> and <w, w> of all tensors as one vector, in float64."""
    v = torch.cat([tensor.double().flatten() for tensor in left])
    w = torch.cat([tensor.double().flatten() for tensor in right])
    return float(v @ w), float(v @ v), float(w @ w)


def _cosine(inner: float, left: float, right: float) -> float | None:
    length = math.sqrt(max(left, 0.0) * max(right, 0.0))  # rounding may leave less than zero
    return inner / length if length > 0 else None


def _chance(final: Snapshot, indices: Sequence[int]) -> dict[str, float]:
    """Overlap of two random subspaces of the layers' sizes."""
    if AUXILIARY not in final.factors:
        return {}
    columns, rows = [], []
    for i in indices:
        primary, auxiliary = final.factors[PRIMARY][i], final.factors[AUXILIARY][i]
        rank = max(primary.A.shape[0], auxiliary.A.shape[0])
        columns.append(min(1.0, rank / primary.B.shape[0]))
        rows.append(min(1.0, rank / primary.A.shape[1]))
    return {COLUMNS: sum(columns) / len(columns), ROWS: sum(rows) / len(rows)}


def key_figures(rows: Sequence[Row], steps: Mapping[str, int]) -> list[Row]:
    """Figures of each run's curves at the steps that all runs of its group have.

    Of cosines to the own final weights "settled NAME", the step from which on it is ``LEVEL`` or
    more, and "start NAME", its first value; how much later the auxiliary settles, "lag product"
    and "lag factors", and after which "share" of all steps. Of the ratio "lowest", "median" and
    "highest". Of the cosine to the other's final weights the "largest" by absolute value; of
    overlaps, cosine and gain "final" and "mean".
    """
    # (group, metric) -> run -> step -> row
    curves: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        if row.step is not None and not row.item:
            runs = curves.setdefault((row.group, row.metric), {})
            runs.setdefault(row.subject, {})[row.step] = row
    figures = []
    for (_, metric), runs in curves.items():
        common_steps = sorted(set.intersection(*map(set, runs.values())))
        for row_of_step in runs.values():
            points = [row_of_step[step] for step in common_steps]
            example = next(iter(row_of_step.values()))
            for name, value in _figures(metric, points).items():
                figures.append(replace(example, metric=f"{name} {metric}", step=None, value=value))
    return figures + _lags(figures, steps)


def _figures(metric: str, points: Sequence[Row]) -> dict[str, float | None]:
    """The figures of one curve; {} where its metric has none."""
    values = [row.value for row in points if row.value is not None]
    if metric == RATIO:
        return {
            "lowest": min(values, default=None),
            "median": median(values) if values else None,
            "highest": max(values, default=None),
        }
    if metric in (f"{CROSS}/factors", f"{CROSS}/product"):
        return {"largest": max(map(abs, values), default=None)}
    if metric in (GAIN, COLUMNS, ROWS, COSINE):
        if not values:
            return {"final": None, "mean": None}
        # Of a curve that ends undefined, the last value that it has.
        return {"final": values[-1], "mean": sum(values) / len(values)}
    if "/" in metric and not metric.startswith(CROSS):
        settled = settles([row.step or 0 for row in points], [row.value for row in points], LEVEL)
        return {"settled": settled, "start": next(iter(values), None)}
    return {}


def _lags(rows: Sequence[Row], steps: Mapping[str, int]) -> list[Row]:
    """How many steps after the primary's an auxiliary settles, and after which share of all."""
    settled = {(row.subject, row.metric): row.value for row in rows}
    figures = []
    for row in rows:
        if row.metric not in ("settled auxiliary/product", "settled auxiliary/factors"):
            continue
        quantity = row.metric.rpartition("/")[2]
        primary, auxiliary = settled[row.subject, f"settled primary/{quantity}"], row.value
        lag = share = None
        if auxiliary is not None:
            share = auxiliary / steps[row.group]
            lag = None if primary is None else auxiliary - primary
        figures.append(replace(row, metric=f"lag {quantity}", value=lag))
        figures.append(replace(row, metric=f"share {quantity}", value=share))
    return figures


def settles(steps: Sequence[int], values: Sequence[float | None], level: float) -> float | None:
    """The step from which on a curve stays at ``level`` or above.

    Interpolated linearly between the last point below and the next; the first step that has a
    value where none is below; None where the last point is below.
    """
    points = []
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            points.append((step, value))
    indices_below = [i for i, (_, value) in enumerate(points) if value < level]
    if not indices_below:
        return float(points[0][0]) if points else None
    crossing = indices_below[-1]
    if crossing == len(points) - 1:
        return None
    left, low = points[crossing]
    right, high = points[crossing + 1]
    # On the straight line between the two points.
    return left + (right - left) * (level - low) / (high - low)
