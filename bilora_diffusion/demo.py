"""The demo: LoRA and Bi-LoRA on the miniature's 23 icons, and one picture of their losses and of
what they make.

    bilora demo --output_dir demo
    python -m bilora_diffusion.demo --config mini_flow --output_dir demo-flow

Both runs see the same data and noise; the digests in their ``metrics.jsonl`` prove it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from .config.command_line import Sentences
from .core.errors import TrainingError, UserError, run_cli
from .core.figures import new_figure
from .image import script as train
from .image.opening import open_images
from .image.pipeline import load_pipeline
from .image.sampling import generate
from .methods import get
from .run import runlog
from .run.console import in_repository
from .run.interruption import ends_in

METHODS = ("lora", "bilora")
METHOD_FLAGS = {
    "lora": ("--eval_on_start",),  # the base model's, once
    "bilora": ("--auxiliaries", "sample", "--rho", "auto"),
}
"""Flags of a method beside its name."""
COLORS = {"LoRA": "#111111", "Bi-LoRA": "#d95f02"}
TITLES = {name: get(name).title for name in METHODS}
SUBJECTS = 6
"""So many of the held-out icons; the subjects of the paper's Table 4 stand first among them."""
Curve = list[tuple[int, float]]
MEASURED = (
    *("--validation_epochs", "17"),  # images at half of the recipe's steps and at their end
    *("--validation_loss_steps", "40", "--validation_part", "1/4"),  # 32 icons: a few seconds each
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = Sentences(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=Path("mini"), help="recipe of both runs")

    def work() -> None:
        args, flags = parser.parse_known_args(argv)
        with ends_in("interrupted: the same command starts the demo anew"):
            demo(args.output_dir, args.seed, args.config, flags)

    return run_cli(work)


def demo(folder: Path, seed: int, recipe: Path, flags: Sequence[str] = ()) -> None:
    """Train both runs, with more flags of the script, compare, draw and say where everything is."""
    curves = {}
    for method in METHODS:
        print(f"\n== {TITLES[method]}")
        words = [
            "--config",
            str(recipe),
            "--method",
            method,
            *METHOD_FLAGS[method],
            "--seed",
            str(seed),
        ]
        words += ["--output_dir", str(folder / method), "--overwrite_output_dir"]
        train.train([*words, *MEASURED, *flags])
        curves[TITLES[method]] = read_curve(folder / method)
    steps = require_paired([folder / method for method in METHODS])
    picture = folder / "grid.png"
    draw(*make_icons(folder), curves, picture)
    print(f"\nBoth runs saw the same data and noise in all {steps} steps (equal digests).")
    print(as_table(curves))
    print("\nRun folders:")
    for method in METHODS:
        print(f"  {TITLES[method]:8} {folder / method}")
    print(f"Their held-out loss, and six icons that no run has seen: {picture}")
    if in_repository():
        both = " ".join(str(folder / method) for method in METHODS)
        print(f"\nScore both: python -m eval.clip_scores {both}")
        print(f"Look at them: python -m app.viewer {folder}")


def require_paired(folders: Sequence[Path]) -> int:
    """Check that runs saw the same inputs at every step; returns the number of steps."""
    digests = [
        [row["digest"] for row in runlog.read_metrics(folder) if "digest" in row]
        for folder in folders
    ]
    for step, pair in enumerate(zip_longest(*digests), start=1):
        if len(set(pair)) != 1:
            raise TrainingError(
                f"the runs {', '.join(map(str, folders))} saw different inputs at step {step}:"
                " train them with the same seed, data, batch size and number of steps."
            )
    return len(digests[0])


def make_icons(folder: Path) -> tuple[dict[str, list[Image]], list[str]]:
    """Rows of icons from base, LoRA, Bi-LoRA and ground truth, of equal noise, and the columns'
    labels: the first held-out subjects of what the runs in a folder were trained on.
    """
    config = runlog.read_run(folder / METHODS[0])["config"]
    heldout, prompted = (
        open_images(config["validation_dataset"], caption_column=column)
        for column in ("label", config["caption_column"])
    )
    labels, prompts = (
        [str(entry.caption) for entry in pictures.entries[:SUBJECTS]]
        for pictures in (heldout, prompted)
    )
    pipeline = load_pipeline(config["pretrained_model_name_or_path"], dtype=torch.float32)
    how: Any = {"seeds": range(SUBJECTS), "size": 64, "steps": 25, "guidance_scale": 4.0}
    rows = {"base model": generate(pipeline, prompts, **how)}
    for method in METHODS:
        pipeline.load_lora_weights(str(folder / method))
        rows[TITLES[method]] = generate(pipeline, prompts, **how)
        pipeline.unload_lora_weights()
    rows["ground truth"] = [heldout.image(i) for i in range(SUBJECTS)]
    return rows, labels


def draw(
    rows: dict[str, list[Image]], labels: Sequence[str], curves: dict[str, Curve], picture: Path
) -> None:
    """One PNG: the curves of the held-out loss left, rows of icons right."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    size = (1.3 * len(labels) + 5.2, 1.35 * len(rows) + 0.3)
    with new_figure(picture, dpi=110, figsize=size) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[4.2, 1.3 * len(labels) + 1])
        _draw_curves(left.add_subplot(), curves)
        left.subplots_adjust(left=0.13, right=0.8, bottom=0.11, top=0.9)
        axes = right.subplots(len(rows), len(labels), squeeze=False)
        right.subplots_adjust(
            left=0.05, right=0.995, bottom=0.01, top=0.94, wspace=0.06, hspace=0.06
        )
        for axis, label in zip(axes[0], labels, strict=True):
            axis.set_title(label, fontsize=11)
        for row_of_axes, (name, images) in zip(axes, rows.items(), strict=True):
            row_of_axes[0].set_ylabel(name, color=COLORS.get(name, "#555555"))
            for axis, image in zip(row_of_axes, images, strict=True):
                axis.imshow(image, interpolation="lanczos")
                axis.set(xticks=[], yticks=[])


def _draw_curves(axis: Any, curves: dict[str, Curve]) -> None:
    highest_end = max(curve[-1][1] for curve in curves.values())
    for name, curve in curves.items():
        trained = [(step, 1000 * loss) for step, loss in curve if step > 0]
        steps, losses = zip(*trained, strict=True)
        lowest = min(losses)
        axis.plot(steps, losses, color=COLORS[name], lw=2)
        axis.plot(steps[losses.index(lowest)], lowest, "o", color=COLORS[name], ms=7)
        # Curves may end close together, so the text of the higher one stands above its end.
        side = "bottom" if curve[-1][1] == highest_end else "top"
        axis.annotate(
            f"{name}\nlowest\n{lowest:.1f}",
            (steps[-1], losses[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va=side,
            color=COLORS[name],
        )
    axis.set_xlabel("steps")
    axis.set_title("loss on unseen icons x 1000", fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.14)


def read_curve(folder: Path) -> Curve:
    """(step, held-out loss) of a run, in its order."""
    rows = [row for row in runlog.read_metrics(folder) if "heldout_loss" in row]
    if not rows:
        raise UserError(f"{folder} has no held-out loss: set --validation_dataset.")
    return [(row["step"], row["heldout_loss"]) for row in rows]


def as_table(curves: dict[str, Curve]) -> str:
    """A table of held-out losses: base, then each method at its lowest and at its end."""
    lines = ["", f"{'held-out loss':12}{'lowest':>11}{'at step':>9}{'at the end':>12}"]
    lines.append(f"{'base model':12}{curves[TITLES[METHODS[0]]][0][1]:12.4f}")
    for name, curve in curves.items():
        step, lowest = min(curve, key=lambda point: point[1])
        lines.append(f"{name:12}{lowest:12.4f}{step:9}{curve[-1][1]:12.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
