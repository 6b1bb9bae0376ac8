"""One run's dynamics as curves: what was recorded, and cosines to the final weights; and key
figures of these: when weights settle, how far the adapters are apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

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

from ..subjects import Subject
from ..table import Row

ALL = "all"
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
        figures |= {f"chance {name}": value for name, value in self.chance.items()}
        if RATIO in self.values:
            columns = zip(*self.layer_ratios.values(), strict=True)
            known = [[value for value in column if value is not None] for column in columns]
            medians = [median(values) for values in known if values]
            figures["layer_ratio"] = median(medians) if medians else None
            above = [value > NEGLIGIBLE for value in medians]
            figures["layers_above"] = sum(above) / len(above) if above else None
        return figures


def layer_names(run: Subject) -> list[str]:
    """The layers of a recorded run."""
    return snapshots.read(_files(run)[-1]).names


def _files(run: Subject) -> list[Any]:
    files = [] if run.folder is None else list(snapshots.steps(run.folder).values())
    if len(files) < 2:
        what = "one snapshot only" if files else "no dynamics"
        raise UserError(f"{run.folder} has {what}: train to the end with --log_dynamics.")
    return files


def spread(names: Sequence[str], count: int = SMALL_MULTIPLES) -> list[str]:
    """About ``count`` of the layers, evenly spaced, the first and the last among them."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def read(run: Subject, layers: Sequence[str] = ()) -> dict[str, RunCurves]:
    """The curves of a run over ``ALL`` layers and over single ones."""
    files = _files(run)
    final = snapshots.read(files[-1])
    if missing := [layer for layer in layers if layer not in final.names]:
        raise UserError(f"{run.folder} lacks {missing[0]} of its group: leave it out.")
    places = {ALL: list(range(len(final.names)))}
    places |= {layer: [final.names.index(layer)] for layer in layers}
    curves: dict[str, dict[str, dict[int, float | None]]] = {name: {} for name in places}
    ratios: dict[str, dict[int, list[float | None]]] = {name: {} for name in places}
    for file in files:
        snapshot = final if file == files[-1] else snapshots.read(file)
        if snapshot.names != final.names:
            raise UserError(f"{file} has other layers than {files[-1].name}: train again.")
        for layer, where in places.items():
            values = totals({name: values[where] for name, values in snapshot.layers.items()})
            values |= _cosines(snapshot, final, where)
            for name, value in values.items():
                curves[layer].setdefault(name, {})[snapshot.step] = value
            if FIRST_ORDER in snapshot.layers:
                quotients = (snapshot.layers[FIRST_ORDER] / snapshot.layers[TERMS[-1]])[where]
                finite = [v if math.isfinite(v) else None for v in quotients.tolist()]
                ratios[layer][snapshot.step] = finite
    for line in run.log():
        for name in LOGGED:
            if name in line:
                for values in curves.values():
                    values.setdefault(name, {})[line["step"]] = line[name]
    return {
        layer: RunCurves(curves[layer], ratios[layer], _chance(final, where))
        for layer, where in places.items()
    }


def _cosines(now: Snapshot, final: Snapshot, where: Sequence[int]) -> dict[str, float | None]:
    """Cosines of each adapter with its final weights, and of the auxiliary with the primary's."""
    pairs = {NAMES[a]: (now.factors[a], final.factors[a]) for a in now.factors}
    if AUXILIARY in now.factors:
        pairs[CROSS] = (now.factors[AUXILIARY], final.factors[PRIMARY])
    return {
        f"{name}/{quantity}": value
        for name, (one, other) in pairs.items()
        for quantity, value in cosines([one[i] for i in where], [other[i] for i in where]).items()
    }


def cosines(one: Sequence[Factors], other: Sequence[Factors]) -> dict[str, float | None]:
    """Cosine of two adapters by each of ``QUANTITIES``, all layers as one vector.

    None where one of them is zero; for A, B and factors also where the ranks differ.
    """
    values: dict[str, float | None] = dict.fromkeys(QUANTITIES)
    if all(f.A.shape == g.A.shape for f, g in zip(one, other, strict=True)):
        dots = {}
        for side in "AB":
            flat = [
                torch.cat([getattr(f, side).double().flatten() for f in s]) for s in (one, other)
            ]
            pairs = (flat, flat[:1] * 2, flat[1:] * 2)
            dots[side] = [float(left @ right) for left, right in pairs]
            values[side] = _cosine(*dots[side])
        values["factors"] = _cosine(*(a + b for a, b in zip(dots["A"], dots["B"], strict=True)))
    values["product"] = _cosine(
        *(float(inner_products(*pair).sum()) for pair in ((one, other), (one, one), (other, other)))
    )
    return values


def _cosine(inner: float, left: float, right: float) -> float | None:
    length = math.sqrt(max(left, 0.0) * max(right, 0.0))
    return inner / length if length > 0 else None


def _chance(final: Snapshot, where: Sequence[int]) -> dict[str, float]:
    if AUXILIARY not in final.factors:
        return {}
    pairs = [(final.factors[PRIMARY][i], final.factors[AUXILIARY][i]) for i in where]
    sides: Mapping[str, list[float]] = {
        COLUMNS: [min(1.0, max(f.B.shape[1], g.B.shape[1]) / f.B.shape[0]) for f, g in pairs],
        ROWS: [min(1.0, max(f.A.shape[0], g.A.shape[0]) / f.A.shape[1]) for f, g in pairs],
    }
    return {side: sum(values) / len(values) for side, values in sides.items()}


def key_figures(rows: Sequence[Row], steps: Mapping[str, int]) -> list[Row]:
    """Figures of each run's curves at the steps that all runs of its group have.

    Of cosines to the own final weights "settled NAME", the step from which on it is ``LEVEL`` or
    more, and "start NAME", its first value; how much later the auxiliary settles, "lag product"
    and "lag factors", and after which "share" of all steps. Of the ratio "lowest", "median" and
    "highest". Of the cosine to the other's final weights the "largest" by absolute value; of
    overlaps, cosine and gain "final" and "mean".
    """
    curves: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        if row.step is not None and not row.item:
            runs = curves.setdefault((row.group, row.metric), {})
            runs.setdefault(row.subject, {})[row.step] = row
    figures = []
    for (_, name), runs in curves.items():
        common = sorted(set.intersection(*map(set, runs.values())))
        for values in runs.values():
            points = [values[step] for step in common]
            for what, value in _figures(name, points).items():
                any_row = next(iter(values.values()))
                figures.append(replace(any_row, metric=f"{what} {name}", step=None, value=value))
    return figures + _lags(figures, steps)


def _figures(name: str, points: Sequence[Row]) -> dict[str, float | None]:
    values = [row.value for row in points if row.value is not None]
    if name == RATIO:
        middle = median(values) if values else None
        return {"lowest": min(values, default=None), "median": middle} | {
            "highest": max(values, default=None)
        }
    if name in (f"{CROSS}/factors", f"{CROSS}/product"):
        return {"largest": max(map(abs, values), default=None)}
    if name in (GAIN, COLUMNS, ROWS, COSINE):
        last = values[-1] if values else None
        return {"final": last, "mean": sum(values) / len(values) if values else None}
    if "/" in name and not name.startswith(CROSS):
        settled = settles([row.step or 0 for row in points], [row.value for row in points], LEVEL)
        return {"settled": settled, "start": next(iter(values), None)}
    return {}


def _lags(rows: Sequence[Row], steps: Mapping[str, int]) -> list[Row]:
    settled = {(row.subject, row.metric): row.value for row in rows}
    figures = []
    for row in rows:
        if row.metric in ("settled auxiliary/product", "settled auxiliary/factors"):
            what = row.metric.rpartition("/")[2]
            first, last = settled[row.subject, f"settled primary/{what}"], row.value
            lag = None if first is None or last is None else last - first
            share = None if last is None else last / steps[row.group]
            figures.append(replace(row, metric=f"lag {what}", value=lag))
            figures.append(replace(row, metric=f"share {what}", value=share))
    return figures


def settles(steps: Sequence[int], values: Sequence[float | None], level: float) -> float | None:
    """The step from which on a curve stays at ``level`` or above.

    Interpolated linearly between the last point below and the next; the first step that has a
    value where none is below; None where the last point is below.
    """
    points = [(step, v) for step, v in zip(steps, values, strict=True) if v is not None]
    below = [i for i, (_, value) in enumerate(points) if value < level]
    if not below:
        return float(points[0][0]) if points else None
    if below[-1] == len(points) - 1:
        return None
    (left, low), (right, high) = points[below[-1]], points[below[-1] + 1]
    return left + (right - left) * (level - low) / (high - low)
