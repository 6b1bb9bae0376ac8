"""Curves of one run's dynamics: recorded norms, cosines with the final weights, and summary values
such as the step at which weights settle.
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

from ..results.table import Row
from ..subjects import Subject

ALL_LAYERS = "all"
# Vectors for cosines: A, B, both, or B A; all chosen layers form one vector
QUANTITIES = ("A", "B", "factors", "product")
# Name of an adapter -> prefix of its curves' names
NAMES = {PRIMARY: "primary", AUXILIARY: "auxiliary"}
# Prefix for cosines between the auxiliary and the primary's final weights
CROSS = "auxiliary_to_primary"
# Curves from ``metrics.jsonl``; the others come from the snapshots
LOGGED = ("auxiliary_norm", "auxiliary_norm_before")
# Curves that are shown for single layers (Figure A4)
OF_LAYERS = (*NORMS, RATIO)
# Ratio of Eq. 5's terms above which the third term counts as negligible
NEGLIGIBLE = 1e4
# Maximum number of layers of a group that have separate curves
SMALL_MULTIPLES = 4
# Minimum cosine of settled weights with the final weights
SETTLED_COSINE = 0.9


@dataclass(frozen=True)
class RunCurves:
    """Curves of one run for some layers."""

    # Name -> step -> value, which is None if it is not defined. Examples of cosines' names are
    # "primary/A", "auxiliary/product" and "auxiliary_to_primary/product".
    values: dict[str, dict[int, float | None]]
    # Step -> ratio of Figure 2b for each layer, which is None if it is not defined; only recorded
    # for LoRA-SAM, {} otherwise
    layer_ratios: dict[int, list[float | None]]
    # Expected "column_overlap" and "row_overlap" of random subspaces: max(r1, r2) / d, mean over
    # the layers; {} without an auxiliary
    chance: dict[str, float]

    def layer_summary(self) -> dict[str, float | None]:
        """Return summary values that are computed for each layer separately.

        - "layer_ratio": the median over layers of each layer's median ratio over steps.
        - "layers_above": the share of layers whose median ratio is above ``NEGLIGIBLE``.
        - "chance column_overlap", "chance row_overlap": the overlap of random subspaces with the
          same dimensions.
        """
        summary: dict[str, float | None] = {}
        for name, value in self.chance.items():
            summary[f"chance {name}"] = value
        if RATIO not in self.values:
            return summary
        medians = []
        for ratios in zip(*self.layer_ratios.values(), strict=True):
            # The ratios of one layer at all steps
            defined = [ratio for ratio in ratios if ratio is not None]
            if defined:
                medians.append(median(defined))
        summary["layer_ratio"] = summary["layers_above"] = None
        if medians:
            summary["layer_ratio"] = median(medians)
            count = sum(value > NEGLIGIBLE for value in medians)
            summary["layers_above"] = count / len(medians)
        return summary


def layer_names(run: Subject) -> list[str]:
    """Return the names of the layers of a recorded run."""
    return snapshots.read(_snapshot_files(run)[-1]).names


def _snapshot_files(run: Subject) -> list[Path]:
    """Return the files of a run's snapshots, sorted by step.

    Raises:
        UserError: the run has fewer than two snapshots.
    """
    files: list[Path] = []
    if run.folder is not None:
        files = list(snapshots.steps(run.folder).values())
    if len(files) < 2:
        problem = "one snapshot only" if files else "no dynamics"
        raise UserError(f"{run.folder} has {problem}: train to the end with --log_dynamics.")
    return files


def spread(names: Sequence[str], count: int = SMALL_MULTIPLES) -> list[str]:
    """Return ``count`` evenly spaced layers, including the first and last, or all if fewer."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def read(run: Subject, layers: Sequence[str] = ()) -> dict[str, RunCurves]:
    """Read the curves of a run.

    Args:
        run: run with recorded dynamics.
        layers: names of layers that get separate curves.

    Returns:
        ``ALL_LAYERS`` or the name of a layer -> curves.
    """
    files = _snapshot_files(run)
    final = snapshots.read(files[-1])
    indices_of = {ALL_LAYERS: list(range(len(final.names)))}  # positions in a snapshot
    for layer in layers:
        if layer not in final.names:
            raise UserError(f"{run.folder} lacks {layer}, unlike its group: leave this run out.")
        indices_of[layer] = [final.names.index(layer)]
    curves: dict[str, RunCurves] = {}
    for name, indices in indices_of.items():
        curves[name] = RunCurves({}, {}, _chance_overlaps(final, indices))
    for file in files:
        # Only one snapshot and the last one are in memory at a time.
        snapshot = final if file == files[-1] else snapshots.read(file)
        if snapshot.names != final.names:
            raise UserError(f"{file} has different layers than {files[-1].name}: train again.")
        step = snapshot.step
        for name, indices in indices_of.items():
            # For norms and cosines, these layers form one vector.
            layer_values = {key: values[indices] for key, values in snapshot.layers.items()}
            totals_by_name = totals(layer_values) | _cosines(snapshot, final, indices)
            for key, value in totals_by_name.items():
                curves[name].values.setdefault(key, {})[step] = value
            if FIRST_ORDER in layer_values:
                # Figure 2b: ||B e_A + e_B A|| / ||e_B e_A|| for each layer
                ratios = (layer_values[FIRST_ORDER] / layer_values[TERMS[-1]]).tolist()
                finite_ratios = [ratio if math.isfinite(ratio) else None for ratio in ratios]
                curves[name].layer_ratios[step] = finite_ratios
    for line in run.log():
        for key in LOGGED:
            if key in line:
                for run_curves in curves.values():
                    run_curves.values.setdefault(key, {})[line["step"]] = line[key]
    return curves


def _cosines(
    snapshot: Snapshot, final: Snapshot, indices: Sequence[int]
) -> dict[str, float | None]:
    """Return the cosines of each adapter with its final weights, and between the adapters.

    Between the adapters, the auxiliary is compared with the primary's final weights.
    """
    pairs = {}
    for adapter, factors in snapshot.factors.items():
        pairs[NAMES[adapter]] = (factors, final.factors[adapter])
    if AUXILIARY in snapshot.factors:
        pairs[CROSS] = (snapshot.factors[AUXILIARY], final.factors[PRIMARY])
    values = {}
    for name, (left, right) in pairs.items():
        pair_cosines = cosines([left[i] for i in indices], [right[i] for i in indices])
        for quantity, value in pair_cosines.items():
            values[f"{name}/{quantity}"] = value
    return values


def cosines(left: Sequence[Factors], right: Sequence[Factors]) -> dict[str, float | None]:
    """Return the cosine between two adapters for each of ``QUANTITIES``; layers form one vector.

    A cosine is None if one of the vectors is zero; for A, B and factors, also if the ranks differ.
    """
    values: dict[str, float | None] = dict.fromkeys(QUANTITIES)
    if all(f.A.shape == g.A.shape for f, g in zip(left, right, strict=True)):
        dots_A = _dots([f.A for f in left], [g.A for g in right])
        dots_B = _dots([f.B for f in left], [g.B for g in right])
        values["A"] = _cosine(dots_A)
        values["B"] = _cosine(dots_B)
        # (A, B) as one vector: the inner products add up.
        values["factors"] = _cosine(dots_A + dots_B)
    # <B A, B' A'> without computing the products B A and B' A'
    pairs = ((left, right), (left, left), (right, right))
    products = [float(inner_products(first, second).sum()) for first, second in pairs]
    values["product"] = _cosine(torch.tensor(products, dtype=torch.float64))
    return values


def _dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return <v, w>, <v, v> and <w, w>, (3,), in float64; all tensors of a side form one vector."""
    v = torch.cat([tensor.double().flatten() for tensor in left])
    w = torch.cat([tensor.double().flatten() for tensor in right])
    return torch.stack([v @ w, v @ v, w @ w])


def _cosine(dots: Tensor) -> float | None:
    """Return <v, w> / (||v|| ||w||) from the result of `_dots`; None if a vector is zero."""
    inner, left, right = dots.tolist()
    length = math.sqrt(max(left, 0.0) * max(right, 0.0))  # rounding may give negative values
    if not length > 0:  # zero, or NaN
        return None
    return inner / length


def _chance_overlaps(final: Snapshot, indices: Sequence[int]) -> dict[str, float]:
    """Return the expected overlaps of random subspaces, max(r1, r2) / d, as means over layers."""
    if AUXILIARY not in final.factors:
        return {}
    columns, rows = [], []
    # For random subspaces with dimensions r1 and r2 in d dimensions, the squared cosines of the
    # principal angles have an expected sum of r1 r2 / d. Divided by the number of angles, which is
    # min(r1, r2), this is max(r1, r2) / d.
    for i in indices:
        primary, auxiliary = final.factors[PRIMARY][i], final.factors[AUXILIARY][i]
        rank = max(primary.A.shape[0], auxiliary.A.shape[0])
        columns.append(min(1.0, rank / primary.B.shape[0]))  # B is (d, r1)
        rows.append(min(1.0, rank / primary.A.shape[1]))  # A is (r1, d)
    return {COLUMNS: sum(columns) / len(columns), ROWS: sum(rows) / len(rows)}


def summarize_curves(rows: Sequence[Row], steps: Mapping[str, int]) -> list[Row]:
    """Return summary values of each run's curves, at the steps that all runs of its group have.

    - For cosines with the adapter's own final weights: "settled NAME", the step from which the
      cosine stays at ``SETTLED_COSINE`` or above; "start NAME", the first value; "lag product" and
      "lag factors", the number of steps by which the auxiliary settles later than the primary;
      "share product" and "share factors", the step at which the auxiliary settles, as a share of
      all steps.
    - For the ratio of Eq. 5's terms: "lowest", "median" and "highest".
    - For the auxiliary's cosines with the primary's final weights, for factors and product:
      "largest", the largest absolute value.
    - For overlaps, the cosine of the products, and the gain: "final" and "mean".

    Args:
        rows: values of the curves.
        steps: group -> last recorded step.
    """
    # (group, metric) -> run -> step -> row
    curves: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        if row.step is not None and not row.item:
            runs = curves.setdefault((row.group, row.metric), {})
            runs.setdefault(row.subject, {})[row.step] = row
    summary_rows = []
    for (_, metric), runs in curves.items():
        common_steps = sorted(set.intersection(*map(set, runs.values())))
        for row_of_step in runs.values():
            points = [row_of_step[step] for step in common_steps]
            example = next(iter(row_of_step.values()))
            for name, value in _summarize_curve(metric, points).items():
                summary_rows.append(
                    replace(example, metric=f"{name} {metric}", step=None, value=value)
                )
    return summary_rows + _lags(summary_rows, steps)


def _summarize_curve(metric: str, points: Sequence[Row]) -> dict[str, float | None]:
    """Return the summary values of one curve; {} if its metric has none."""
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
        # "final" is the last defined value.
        return {"final": values[-1], "mean": sum(values) / len(values)}
    if "/" in metric and not metric.startswith(CROSS):
        steps = [row.step or 0 for row in points]
        cosines = [row.value for row in points]
        settled = settles(steps, cosines, SETTLED_COSINE)
        return {"settled": settled, "start": next(iter(values), None)}
    return {}


def _lags(rows: Sequence[Row], steps: Mapping[str, int]) -> list[Row]:
    """Return the values "lag" and "share" of each auxiliary; see `summarize_curves`."""
    settled = {(row.subject, row.metric): row.value for row in rows}
    summary_rows = []
    for row in rows:
        if row.metric not in ("settled auxiliary/product", "settled auxiliary/factors"):
            continue
        quantity = row.metric.rpartition("/")[2]
        primary = settled[row.subject, f"settled primary/{quantity}"]
        lag = share = None
        if row.value is not None:
            share = row.value / steps[row.group]
            if primary is not None:
                lag = row.value - primary
        summary_rows.append(replace(row, metric=f"lag {quantity}", value=lag))
        summary_rows.append(replace(row, metric=f"share {quantity}", value=share))
    return summary_rows


def settles(steps: Sequence[int], values: Sequence[float | None], threshold: float) -> float | None:
    """Return the step from which a curve stays at ``threshold`` or above.

    Args:
        steps: steps of the points, in ascending order.
        values: values at these steps; None for a value that is not defined.
        threshold: the threshold.

    Returns:
        The step, interpolated linearly between the last point below the threshold and the next
        point; the first step with a value if no point is below the threshold; None if the last
        point is below it, or if there is no value.
    """
    points = []
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            points.append((step, value))
    indices_below = [i for i, (_, value) in enumerate(points) if value < threshold]
    if not points:
        return None
    if not indices_below:
        return float(points[0][0])
    crossing = indices_below[-1]
    if crossing == len(points) - 1:
        return None
    left, low = points[crossing]
    right, high = points[crossing + 1]
    return left + (right - left) * (threshold - low) / (high - low)
