"""Held-out loss of LoRA and Bi-LoRA on the miniature: paired over seeds, over training.

    python benchmarks/heldout_loss.py --output_dir results/heldout_loss
    python benchmarks/heldout_loss.py --arms lora bilora:rho=1 --seeds 2 --steps 100

Arms of one seed see the same data, order and noise; their digests are compared. A finished run is
not repeated. Writes ``heldout_loss.json``, ``.md`` and ``.png``; the runs lie in ``--runs_dir``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from bilora_diffusion import runlog, train
from bilora_diffusion.demo import RECIPE, require_paired
from bilora_diffusion.errors import UserError, run_cli

KEYS = ("heldout_loss", "train_grid_loss")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid of arms and seeds; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arms", nargs="+", default=["lora", "bilora", "bilora:rho=1"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--demo_steps", type=int, default=200, help="the demo's step count")
    parser.add_argument("--output_dir", type=Path, default=Path("results/heldout_loss"))
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/heldout_loss"))
    args = parser.parse_args(argv)
    return run_cli(lambda: measure(args))


def measure(args: argparse.Namespace) -> None:
    """Train what is missing, then write the comparison."""
    if args.seeds < 2:
        raise UserError(f"--seeds {args.seeds} gives no interval: use at least 2.")
    curves: dict[str, list[list[dict[str, float]]]] = {arm: [] for arm in args.arms}
    for seed in range(args.seeds):
        folders = [run(args, arm, seed) for arm in args.arms]
        require_paired(folders)
        for arm, folder in zip(args.arms, folders, strict=True):
            rows = [r for r in runlog.read_metrics(folder) if KEYS[0] in r]
            curves[arm].append([{"step": r["step"], **{k: r[k] for k in KEYS}} for r in rows])
    result = compare(curves, args.demo_steps)
    result["provenance"] = provenance(args, folders[0])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "heldout_loss.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    (args.output_dir / "heldout_loss.md").write_text(text)
    plot(result, args.output_dir / "heldout_loss.png")
    print(text)


def run(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Train one arm with one seed unless it is there already; the run folder."""
    method, _, options = arm.partition(":")
    folder = args.runs_dir / f"{arm.replace(':', '-').replace('=', '')}-seed{seed}-{args.steps}"
    if (folder / runlog.RUN).exists() and runlog.read_run(folder)["status"] == "finished":
        return folder
    flags = [
        part for o in options.split(",") if o for part in (f"--{o.split('=')[0]}", o.split("=")[1])
    ]
    train.main(
        [
            *("--config", str(RECIPE), "--method", method, "--seed", str(seed), *flags),
            *("--max_train_steps", str(args.steps), "--validation_loss_steps", str(args.every)),
            *("--num_validation_images", "0", "--output_dir", str(folder)),
            "--overwrite_output_dir",
        ]
    )
    return folder


def compare(curves: dict[str, list[list[dict[str, float]]]], demo_steps: int) -> dict[str, Any]:
    """Means and 95 % intervals per step, and differences to the first arm paired by seed."""
    arms = list(curves)
    steps = [int(point["step"]) for point in curves[arms[0]][0]]
    losses = {
        arm: {k: np.array([[p[k] for p in run] for run in runs]) for k in KEYS}
        for arm, runs in curves.items()
    }
    control = losses[arms[0]][KEYS[0]]
    table = []
    for column, step in enumerate(steps):
        row: dict[str, Any] = {"step": step}
        for arm in arms:
            mine = losses[arm][KEYS[0]][:, column]
            row[arm] = {
                "heldout_loss": float(mine.mean()),
                "train_grid_loss": float(losses[arm][KEYS[1]][:, column].mean()),
                "minus_base": interval(mine - losses[arm][KEYS[0]][:, 0]),
                "minus_control": interval(mine - control[:, column]),
            }
        table.append(row)
    best = {arm: interval(losses[arm][KEYS[0]].min(axis=1) - control.min(axis=1)) for arm in arms}
    return {
        "schema_version": 1,
        "control": arms[0],
        "arms": arms,
        "seeds": len(control),
        "demo_steps": demo_steps,
        "steps": table,
        "best_over_training_minus_control": best,
        "equal_train_loss_minus_control": equal_train_loss(losses, arms),
    }


def equal_train_loss(losses: dict[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """Held-out loss where each run's training loss has fallen to the same value, against control.

    The value is the highest final training loss of any run, so that every run has reached it; the
    held-out loss there is interpolated linearly between measurements.
    """
    level = max(float(losses[arm][KEYS[1]][:, -1].max()) for arm in arms)

    def at_level(arm: str) -> np.ndarray:
        pairs = zip(losses[arm][KEYS[1]], losses[arm][KEYS[0]], strict=True)
        return np.array([np.interp(-level, -fit, held) for fit, held in pairs])

    control = at_level(arms[0])
    return {"train_grid_loss": level, **{arm: interval(at_level(arm) - control) for arm in arms}}


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and 95 % Student interval of paired differences, (seeds,)."""
    mean, half = float(values.mean()), 0.0
    if values.std() > 0:
        half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def provenance(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What made the figures."""
    record = runlog.read_run(folder)
    keep = ("versions", "commit", "device")
    command = f"--arms {' '.join(args.arms)} --seeds {args.seeds} --steps {args.steps}"
    return {
        "command": f"python benchmarks/heldout_loss.py {command}",
        **{k: record[k] for k in keep},
    }


def report(result: dict[str, Any]) -> str:
    """The comparison as Markdown; losses times 1000 for reading."""
    arms, control = result["arms"], result["control"]
    lines = [
        f"Held-out loss x 1000, mean of {result['seeds']} seeds; in brackets the 95 % interval of"
        f" the difference to {control}, paired by seed.",
        "",
        "| step | " + " | ".join(arms) + " |",
        "|---|" + "---|" * len(arms),
    ]
    for row in result["steps"]:
        cells = [f"{1000 * row[a]['heldout_loss']:.2f}" + bracket(row[a], a, control) for a in arms]
        mark = " (demo)" if row["step"] == result["demo_steps"] else ""
        lines.append(f"| {row['step']}{mark} | " + " | ".join(cells) + " |")
    best, equal = (
        result["best_over_training_minus_control"],
        result["equal_train_loss_minus_control"],
    )
    for title, values in (
        ("lowest over training", best),
        (f"at equal training loss ({1000 * equal['train_grid_loss']:.1f})", equal),
    ):
        cells = ["0" if a == control else scaled(values[a]) for a in arms]
        lines.append(f"| {title}, difference | " + " | ".join(cells) + " |")
    machine = result.get("provenance", {}).get("device", {})
    lines += ["", f"Machine: {json.dumps(machine)}" if machine else "", ""]
    return "\n".join(lines)


def bracket(cell: dict[str, Any], arm: str, control: str) -> str:
    """The interval of a cell, nothing for the control."""
    return "" if arm == control else f" [{scaled(cell['minus_control'])}]"


def scaled(value: dict[str, float]) -> str:
    """A difference and its interval, times 1000."""
    return (
        f"{1000 * value['mean']:+.2f} ({1000 * value['low']:+.2f} to {1000 * value['high']:+.2f})"
    )


def plot(result: dict[str, Any], picture: Path) -> None:
    """Held-out loss over steps and over training loss."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    rows = result["steps"]
    for arm in result["arms"]:
        held = [row[arm]["heldout_loss"] for row in rows]
        left.plot([row["step"] for row in rows], held, marker="o", ms=3, label=arm)
        fitted = [row[arm]["train_grid_loss"] for row in rows]
        right.plot(fitted, held, marker="o", ms=3, label=arm)
    left.axhline(rows[0][result["control"]]["heldout_loss"], color="gray", ls=":", label="base")
    left.set(xlabel="optimizer step", ylabel="held-out loss")
    right.set(xlabel="loss on the training icons (same grid)")
    right.invert_xaxis()
    left.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
