"""The demo: LoRA and Bi-LoRA learn the colours of 23 icons, and a picture shows what they learned.

    bilora demo --output_dir demo
    bilora demo --rho auto --output_dir demo-auto       # with options of the training script
    bilora demo --config mini_flow --output_dir demo-flow     # another recipe and its data

Both runs see the same data and noise; the digests in their ``metrics.jsonl`` prove it. Their
samples are compared with held-out icons in the same colours, which are exactly what a model that
learned the colours should make.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from .config.command_line import Sentences
from .core.errors import TrainingError, UserError, run_cli
from .core.figures import new_figure
from .core.values import ADAPTER_GUIDANCE, BASE_GUIDANCE
from .export.conversion import export_checkpoint
from .image import script as train
from .image.opening import open_images
from .image.pipeline import load_pipeline
from .image.sampling import generate
from .methods import get
from .mini.colors import color_difference
from .run import checkpoint, runlog
from .run.console import in_repository
from .run.interruption import ends_in

METHODS = ("lora", "bilora")
TITLES = {name: get(name).title for name in METHODS}
COLORS = {"lora": "#111111", "bilora": "#d95f02"}
GRAY = "#666666"
MEASURED = (
    *("--checkpointing_steps", "75", "--checkpoints_total_limit", "4"),
    *("--validation_loss_steps", "75", "--validation_part", "1/4"),  # 32 icons: a few seconds each
    # Validation images at the end alone, for the viewer: the demo's own samples show the course.
    *("--validation_epochs", "1000"),
)
METHOD_FLAGS = {"lora": ("--eval_on_start",), "bilora": ()}
"""Flags of a method beside its name; the base model is measured once."""
ICON_COUNT = 6
"""Number of held-out icons in the picture; the subjects of the paper's Table 4 come first."""
COMPARED_COUNT = 16
"""Number of held-out icons behind them whose samples are compared with the truth at each step."""
SAMPLER_STEPS = 12
"""Enough to compare colours: with 25 steps no difference in the table changes by more than 0.2."""
BASE = "base model"
Curve = list[tuple[int, float]]
"""Steps and values."""


@dataclass(frozen=True)
class Variant:
    """A way of sampling: one row of the picture and one curve.

    Attributes:
        method: of the adapter; None for the base model.
        guidance: scale of classifier-free guidance.
        guidance_from: the model of the unconditional prediction; see `generate`.
    """

    method: str | None
    guidance: float
    guidance_from: str
    note: str

    @property
    def name(self) -> str:
        return BASE if self.method is None else TITLES[self.method]

    @property
    def color(self) -> str:
        return GRAY if self.method is None else COLORS[self.method]


# Ordinary guidance takes much of a new style out again: training moves the unconditional prediction
# too, so the difference that guidance multiplies points away from the style.
ORDINARY = (4.0, ADAPTER_GUIDANCE, "ordinary guidance 4")
FROM_BASE = (2.0, BASE_GUIDANCE, "guidance 2 from base")
UNTRAINED = Variant(None, *ORDINARY)
TRAINED = (
    Variant("lora", *ORDINARY),
    Variant("lora", *FROM_BASE),
    Variant("bilora", *FROM_BASE),
)


@dataclass
class Samples:
    """What the base model and both runs make of held-out captions.

    Attributes:
        labels: subjects of the icons that are shown.
        truth: the held-out icons that are shown.
        images: samples of their captions after the last step, by variant.
        base_difference: of the base model's samples from the truth, as in `difference`.
        differences: of each trained variant's samples, over steps.
    """

    labels: list[str]
    truth: list[Image]
    images: dict[Variant, list[Image]] = field(default_factory=dict)
    base_difference: float = 0.0
    differences: dict[Variant, Curve] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = Sentences(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=0)
    default_recipe = Path("mini_duotone")
    parser.add_argument("--config", type=Path, default=default_recipe, help="recipe of both runs")

    def work() -> None:
        args, flags = parser.parse_known_args(argv)
        with ends_in("interrupted: the same command starts the demo anew"):
            demo(args.output_dir, args.seed, args.config, flags)

    return run_cli(work)


def demo(folder: Path, seed: int, recipe: Path, flags: Sequence[str] = ()) -> None:
    """Train both runs, with more flags of the script, compare, draw and say where everything is."""
    losses = {}
    for method in METHODS:
        print(f"\n== {TITLES[method]}")
        words = ["--config", str(recipe), "--method", method, *METHOD_FLAGS[method]]
        words += ["--seed", str(seed), "--output_dir", str(folder / method)]
        words += ["--overwrite_output_dir"]
        train.train([*words, *MEASURED, *flags])
        losses[method] = read_losses(folder / method)
    steps = require_paired([folder / method for method in METHODS])
    print("\n== Samples of held-out captions", flush=True)
    samples = sample_runs(folder, steps)
    picture = folder / "grid.png"
    draw(samples, losses, steps, picture)
    print(f"\nBoth runs saw the same data and noise in all {steps} steps (equal digests).")
    print(as_table(samples, losses))
    print("\nRun folders:")
    for method in METHODS:
        print(f"  {TITLES[method]:8} {folder / method}")
    print(f"The picture of samples and curves: {picture}")
    if in_repository():
        both = " ".join(str(folder / method) for method in METHODS)
        heldout = runlog.read_run(folder / METHODS[0])["config"]["validation_dataset"]
        print(
            f"\nScore both: python -m eval.clip_scores {both} --prompts {heldout}"
            " --guidance_from base --guidance_scale 2"
        )
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


def read_losses(folder: Path) -> Curve:
    """Held-out losses of a run, in its order."""
    rows = [row for row in runlog.read_metrics(folder) if "heldout_loss" in row]
    if not rows:
        raise UserError(f"{folder} has no held-out loss: set --validation_dataset.")
    return [(row["step"], row["heldout_loss"]) for row in rows]


def sample_runs(folder: Path, steps: int) -> Samples:
    """Sample held-out captions from the base model and from each checkpoint of the runs of so many
    steps in a folder, with the same initial noise.
    """
    config = runlog.read_run(folder / METHODS[0])["config"]
    captioned, labeled = (
        open_images(config["validation_dataset"], caption_column=column)
        for column in (config["caption_column"], "label")
    )
    count = min(ICON_COUNT + COMPARED_COUNT, len(captioned))
    captions = [str(entry.caption) for entry in captioned.entries[:count]]
    truth = [captioned.image(number) for number in range(count)]
    labels = [str(entry.caption) for entry in labeled.entries[:ICON_COUNT]]
    samples = Samples(labels, truth[:ICON_COUNT])
    pipeline = load_pipeline(config["pretrained_model_name_or_path"], dtype=torch.float32)

    def sample(variant: Variant, first: int, end: int) -> list[Image]:
        return generate(
            pipeline,
            captions[first:end],
            seeds=range(first, end),
            size=64,
            steps=SAMPLER_STEPS,
            guidance_scale=variant.guidance,
            guidance_from=variant.guidance_from,
        )

    print(f"  {BASE}", flush=True)
    samples.images[UNTRAINED] = sample(UNTRAINED, 0, ICON_COUNT)
    samples.base_difference = difference(sample(UNTRAINED, ICON_COUNT, count), truth[ICON_COUNT:])
    for method in METHODS:
        variants = [variant for variant in TRAINED if variant.method == method]
        for step, weights in adapters_of(folder / method, steps):
            print(f"  {TITLES[method]}, step {step}", flush=True)
            pipeline.load_lora_weights(str(weights))
            for variant in variants:
                value = difference(sample(variant, ICON_COUNT, count), truth[ICON_COUNT:])
                samples.differences.setdefault(variant, []).append((step, value))
                if step == steps:
                    samples.images[variant] = sample(variant, 0, ICON_COUNT)
            pipeline.unload_lora_weights()
    return samples


def adapters_of(folder: Path, steps: int) -> Iterator[tuple[int, Path]]:
    """Steps and LoRA files: those of a run's checkpoints, which are temporary, and of its end."""
    for step in checkpoint.steps(folder):
        if step < steps:
            with TemporaryDirectory() as exported:
                (weights,) = export_checkpoint(folder, step, "diffusers", exported)
                yield step, weights
    yield steps, folder


def difference(images: Sequence[Image], truth: Sequence[Image]) -> float:
    """Mean `color_difference` between images and the truth, in % of the full range."""
    distances = []
    for image, true_image in zip(images, truth, strict=True):
        distances.append(color_difference(image, true_image))
    return 100 * float(np.mean(distances))


def draw(samples: Samples, losses: dict[str, Curve], steps: int, picture: Path) -> None:
    """One PNG: rows of icons left, curves of the held-out loss and of the samples right."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    with new_figure(picture, dpi=110, figsize=(13, 6.1)) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[8.4, 4.6])
        _draw_icons(left, samples, steps)
        upper, lower = right.subplots(2, 1)
        right.subplots_adjust(left=0.12, right=0.66, bottom=0.085, top=0.92, hspace=0.5)
        _draw_losses(upper, losses)
        _draw_differences(lower, samples)
        for axis in (upper, lower):
            axis.set_xlabel("training steps")
            axis.set_xlim(left=0)
            axis.spines[["top", "right"]].set_visible(False)


def _draw_icons(figure: Any, samples: Samples, steps: int) -> None:
    """Rows of icons, with the truth at the end, where the eye compares it with what was learned."""
    rows = [(variant.name, variant.note, variant.color) for variant in samples.images]
    rows[0] = (BASE, "before training", GRAY)
    rows.append(("truth", "not in the training set", GRAY))
    images = [*samples.images.values(), samples.truth]
    axes = figure.subplots(len(rows), len(samples.labels), squeeze=False)
    figure.subplots_adjust(left=0.225, right=0.99, bottom=0.01, top=0.9, wspace=0.05, hspace=0.05)
    figure.suptitle(
        f"Samples of captions that were not trained on, after {steps} steps", x=0.6075, y=0.985
    )
    for axis, label in zip(axes[0], samples.labels, strict=True):
        axis.set_title(label, fontsize=11)
    for row_of_axes, (name, note, color), row in zip(axes, rows, images, strict=True):
        for height, text, size in ((0.6, name, 13), (0.38, note, 9.5)):
            row_of_axes[0].text(
                -0.08,
                height,
                text,
                transform=row_of_axes[0].transAxes,
                ha="right",
                va="center",
                fontsize=size,
                color=color,
            )
        for axis, image in zip(row_of_axes, row, strict=True):
            axis.imshow(image, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])


def _draw_losses(axis: Any, losses: dict[str, Curve]) -> None:
    """Both methods' held-out losses after step 0, whose loss would flatten the rest."""
    ends = []
    for method, curve in losses.items():
        trained = [(step, 1000 * loss) for step, loss in curve if step > 0]
        # Wider below narrower, since the curves may lie on one another.
        axis.plot(*zip(*trained, strict=True), color=COLORS[method], lw=4 - 2 * len(ends))
        lowest = min(trained, key=lambda point: point[1])
        axis.plot(*lowest, "o", color=COLORS[method], ms=9 - 3 * len(ends))
        ends.append((trained[-1], f"{TITLES[method]}: {trained[-1][1]:.1f}", COLORS[method]))
    axis.set_title("loss on unseen icons x 1000 (dot: lowest)", fontsize=11, loc="left")
    _label_ends(axis, ends)


def _draw_differences(axis: Any, samples: Samples) -> None:
    """How far each variant's samples are from the truth; all curves start at the base model."""
    start = (0, samples.base_difference)
    ends = []
    for number, (variant, curve) in enumerate(samples.differences.items()):
        style = "--" if variant.guidance_from == ADAPTER_GUIDANCE else "-"
        points = [start, *curve]
        axis.plot(*zip(*points, strict=True), style, color=variant.color, lw=max(4 - number, 2))
        text = f"{variant.name}: {curve[-1][1]:.1f}\n{variant.note}"
        ends.append((curve[-1], text, variant.color))
    axis.plot(*start, "o", color=GRAY, ms=7)
    title = f"colour difference between samples\nand truth, % (dot: {BASE})"
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_ylim(bottom=0)
    _label_ends(axis, ends)


def _label_ends(axis: Any, ends: Sequence[tuple[tuple[int, float], str, str]]) -> None:
    """Label curves right of their ends, from the highest down, so far apart that no labels overlap.

    Args:
        ends: the last point of each curve, its label and its colour.
    """
    low, high = axis.get_ylim()
    lines = max(text.count("\n") + 1 for _, text, _ in ends)
    spacing = 0.1 * lines * (high - low)  # height of a label in units of the axis
    previous = float("inf")
    for (step, value), text, color in sorted(ends, key=lambda end: -end[0][1]):
        height = min(value, previous - spacing)
        axis.annotate(
            text,
            (step, height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9.5,
            annotation_clip=False,
        )
        previous = height
    axis.set_ylim(low, high)


def as_table(samples: Samples, losses: dict[str, Curve]) -> str:
    """Held-out losses and the samples' differences from the truth, over steps."""
    loss_rows = {
        TITLES[method]: [(step, 1000 * loss) for step, loss in curve if step > 0]
        for method, curve in losses.items()
    }
    difference_rows = {
        f"{variant.name}, {variant.note}": curve for variant, curve in samples.differences.items()
    }
    base_loss = 1000 * losses[METHODS[0]][0][1]
    blocks = (
        ("loss on unseen icons x 1000", base_loss, loss_rows),
        ("colour difference of samples, %", samples.base_difference, difference_rows),
    )
    lines = []
    for title, base_value, rows in blocks:
        steps = [step for step, _ in next(iter(rows.values()))]
        lines += ["", f"{title:36}" + "".join(f"{f'step {step}':>10}" for step in steps)]
        lines.append(f"{BASE}: {base_value:.1f}")
        for name, curve in rows.items():
            lines.append(f"{name:36}" + "".join(f"{value:10.1f}" for _, value in curve))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
