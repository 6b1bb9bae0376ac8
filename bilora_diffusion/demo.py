"""The demo: LoRA and Bi-LoRA learn the colors of 23 icons, and a figure shows what they learned.

    bilora demo --output_dir demo
    bilora demo --rho auto --output_dir demo-auto       # with options of the training script
    bilora demo --config mini_flow --output_dir demo-flow     # another recipe and its data

Both runs see the same data and noise; the hashes in their ``metrics.jsonl`` prove it. Their
samples are compared with held-out icons in the same colors, which is what a model that learned the
colors makes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image

from .config.command_line import UserErrorParser
from .core.durable import dump_json, write_text
from .core.errors import TrainingError, UserError, run_cli
from .core.figures import new_figure
from .core.values import ADAPTER_GUIDANCE, BASE_GUIDANCE, HELDOUT_LOSS
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
# Held-out losses of 32 icons, which take a few seconds at each step. Validation images are made at
# the end alone, for the viewer: the demo's samples show the steps before.
MEASURING_FLAGS = (
    "--checkpointing_steps=75",
    "--checkpoints_total_limit=4",
    "--validation_loss_steps=75",
    "--validation_part=1/4",
    "--validation_epochs=1000",
)
# Number of held-out icons in the figure; the subjects of the paper's Table 4 come first.
ICON_COUNT = 6
# Number of held-out icons after them whose samples are compared with the truth at each step.
COMPARED_COUNT = 16
# Enough to compare colors: with 25 steps no difference in the table changes by more than 0.2.
SAMPLER_STEPS = 12
BASE = "base model"
# Values by step.
Curve = dict[int, float]


@dataclass(frozen=True)
class Variant:
    """A way of sampling: one row of the figure and one curve."""

    name: str  # of the method, or of the base model
    note: str  # on the guidance
    color: str
    guidance: float  # scale of classifier-free guidance
    guidance_from: str  # the model of the unconditional prediction; see `generate`


# Ordinary guidance takes much of a new style out again: training moves the unconditional prediction
# too, so the difference that guidance multiplies points away from the style.
UNTRAINED = Variant(BASE, "ordinary guidance 4", GRAY, 4.0, ADAPTER_GUIDANCE)
# Variants of each method's run.
TRAINED = {
    "lora": (
        Variant(TITLES["lora"], "ordinary guidance 4", COLORS["lora"], 4.0, ADAPTER_GUIDANCE),
        Variant(TITLES["lora"], "guidance 2 from base", COLORS["lora"], 2.0, BASE_GUIDANCE),
    ),
    "bilora": (
        Variant(TITLES["bilora"], "guidance 2 from base", COLORS["bilora"], 2.0, BASE_GUIDANCE),
    ),
}


@dataclass
class Samples:
    """Samples of held-out captions from the base model and from both runs."""

    labels: list[str]  # subjects of the icons in the figure
    truth: list[Image]  # these held-out icons
    # Samples of their captions after the last step.
    images: dict[Variant, list[Image]] = field(default_factory=dict)
    # Differences from the truth, by step for the trained variants.
    base_difference: float = 0.0
    differences: dict[Variant, Curve] = field(default_factory=dict)


class EndLabel(NamedTuple):
    """The label at the end of a curve."""

    step: int
    value: float
    text: str
    color: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = UserErrorParser(description=__doc__)
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
    """Train both runs, with further flags of the script, and compare their samples in a figure."""
    losses: dict[str, Curve] = {}
    for method in METHODS:
        print(f"\n== {TITLES[method]}")
        words = ["--config", str(recipe), "--method", method, "--seed", str(seed)]
        words += ["--output_dir", str(folder / method), "--overwrite_output_dir"]
        if method == METHODS[0]:
            words.append("--eval_on_start")  # the base model is measured once
        words += MEASURING_FLAGS
        train.train([*words, *flags])
        losses[method] = read_losses(folder / method)
    # Before anything is compared: the same noise in every step.
    steps = require_paired([folder / method for method in METHODS])
    print("\n== Samples of held-out captions", flush=True)
    samples = sample_runs(folder, steps)
    picture = folder / "grid.png"
    draw(samples, losses, steps, picture)
    sentence = f"Both runs saw the same data and noise in all {steps} steps (equal digests)."
    curves = as_table(samples, losses)
    write_result(picture, sentence, curves)
    print(f"\n{sentence}")
    print(curves)
    print("\nRun folders:")
    for method in METHODS:
        print(f"  {TITLES[method]:8} {folder / method}")
    print(f"The picture of samples and curves: {picture}")
    if in_repository():
        folders = [str(folder / method) for method in METHODS]
        heldout = runlog.read_run(folder / METHODS[0])["config"]["validation_dataset"]
        print(f"\nScore both: {scoring_command(folders, heldout)}")
        print(f"Look at them: python -m app.viewer {folder}")


def scoring_command(folders: Sequence[str], heldout: str) -> str:
    """The command that scores runs of the miniature by their held-out icons.

    Guidance comes from the base model: ordinary guidance takes much of the style out again.
    """
    return (
        f"python -m eval.clip_scores {shlex.join(folders)} --prompts {shlex.quote(heldout)}"
        " --guidance_from base --guidance_scale 2"
    )


def write_result(picture: Path, sentence: str, curves: str) -> None:
    """Write ``result.json`` and ``report.md`` beside the picture, by which the viewer shows it.

    They are those of ``eval.table``, which an installed package does not have, without rows.
    """
    # Lines with an indent are shown as they are.
    indented = "\n".join(f"    {line}" for line in curves.splitlines())
    write_text(picture.parent / "report.md", f"# Demo\n\n{sentence}\n\n{indented}\n")
    record = {"schema_version": 1, "kind": "demo", "figures": [picture.name]}
    write_text(picture.parent / "result.json", dump_json(record))


def require_paired(folders: Sequence[Path]) -> int:
    """Check that runs saw the same inputs at every step; returns the number of steps."""
    hashes_of_run: list[list[str]] = []  # of the inputs of each step
    for folder in folders:
        rows = runlog.read_metrics(folder)
        hashes_of_run.append([row["digest"] for row in rows if "digest" in row])
    for step, hashes in enumerate(zip_longest(*hashes_of_run), start=1):
        if len(set(hashes)) != 1:
            raise TrainingError(
                f"the runs {', '.join(map(str, folders))} saw different inputs at step {step}:"
                " train them with the same seed, data, batch size and number of steps."
            )
    return len(hashes_of_run[0])


def read_losses(folder: Path) -> Curve:
    """Held-out losses of a run."""
    losses: Curve = {}
    for row in runlog.read_metrics(folder):
        if HELDOUT_LOSS in row:
            losses[row["step"]] = row[HELDOUT_LOSS]
    if not losses:
        raise UserError(f"{folder} has no held-out loss: set --validation_dataset.")
    return losses


def sample_runs(folder: Path, steps: int) -> Samples:
    """Sample held-out captions from the base model and from each checkpoint of both runs.

    All models start from the same noise; ``steps`` is the length of the runs.
    """
    config = runlog.read_run(folder / METHODS[0])["config"]
    captioned = open_images(config["validation_dataset"], caption_column=config["caption_column"])
    labeled = open_images(config["validation_dataset"], caption_column="label")
    count = min(ICON_COUNT + COMPARED_COUNT, len(captioned))
    captions = [str(entry.caption) for entry in captioned.entries[:count]]
    truth = [captioned.image(number) for number in range(count)]
    labels = [str(entry.caption) for entry in labeled.entries[:ICON_COUNT]]
    samples = Samples(labels, truth[:ICON_COUNT])
    pipeline = load_pipeline(config["pretrained_model_name_or_path"], dtype=torch.float32)

    def sample(variant: Variant, start: int, end: int) -> list[Image]:
        """Sample the captions from number ``start`` up to ``end``."""
        return generate(
            pipeline,
            captions[start:end],
            seeds=range(start, end),
            size=64,
            steps=SAMPLER_STEPS,
            guidance_scale=variant.guidance,
            guidance_from=variant.guidance_from,
        )

    def sample_difference(variant: Variant) -> float:
        return difference(sample(variant, ICON_COUNT, count), truth[ICON_COUNT:])

    print(f"  {BASE}", flush=True)
    samples.images[UNTRAINED] = sample(UNTRAINED, 0, ICON_COUNT)
    samples.base_difference = sample_difference(UNTRAINED)
    for method, variants in TRAINED.items():
        for step, weights in adapters_of(folder / method, steps):
            print(f"  {TITLES[method]}, step {step}", flush=True)
            pipeline.load_lora_weights(str(weights))
            for variant in variants:
                curve = samples.differences.setdefault(variant, {})
                curve[step] = sample_difference(variant)
                if step == steps:
                    samples.images[variant] = sample(variant, 0, ICON_COUNT)
            pipeline.unload_lora_weights()
    return samples


def adapters_of(folder: Path, steps: int) -> Iterator[tuple[int, Path]]:
    """Yield steps and LoRAs: those of a run's checkpoints, which are temporary, and of its end."""
    for step in checkpoint.steps(folder):
        if step < steps:
            # The folder is deleted when the caller asks for the next step.
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
    """Rows of icons; the truth comes last, below what was learned."""
    titles = [(BASE, "before training", GRAY)]
    rows = [samples.images[UNTRAINED]]
    for variant, images in samples.images.items():
        if variant != UNTRAINED:
            titles.append((variant.name, variant.note, variant.color))
            rows.append(images)
    titles.append(("truth", "not in the training set", GRAY))
    rows.append(samples.truth)
    axes = figure.subplots(len(rows), len(samples.labels), squeeze=False)
    figure.subplots_adjust(left=0.225, right=0.99, bottom=0.01, top=0.9, wspace=0.05, hspace=0.05)
    figure.suptitle(f"Samples of held-out captions after {steps} training steps", x=0.6075, y=0.985)
    for axis, label in zip(axes[0], samples.labels, strict=True):
        axis.set_title(label, fontsize=11)
    # The title of a row stands left of its first icon.
    for row_of_axes, (name, note, color), images in zip(axes, titles, rows, strict=True):
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
        for axis, image in zip(row_of_axes, images, strict=True):
            axis.imshow(image, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])


def _draw_losses(axis: Any, losses: dict[str, Curve]) -> None:
    """The held-out losses of both methods without step 0, whose loss would flatten the rest."""
    labels: list[EndLabel] = []
    for number, (method, curve) in enumerate(losses.items()):
        trained = _trained_losses(curve)
        # The wider line is below the narrower one, since the curves may lie on one another.
        axis.plot(trained.keys(), trained.values(), color=COLORS[method], lw=4 - 2 * number)
        best_step = min(trained, key=trained.__getitem__)
        axis.plot(best_step, trained[best_step], "o", color=COLORS[method], ms=9 - 3 * number)
        last_step = max(trained)
        text = f"{TITLES[method]}: {trained[last_step]:.1f}"
        labels.append(EndLabel(last_step, trained[last_step], text, COLORS[method]))
    axis.set_title("loss on unseen icons x 1000 (dot: lowest)", fontsize=11, loc="left")
    axis.margins(y=0.15)  # the labels stay below the title
    _label_ends(axis, labels)


def _trained_losses(curve: Curve) -> Curve:
    """Losses times 1000, without that of the base model."""
    return {step: 1000 * loss for step, loss in curve.items() if step > 0}


def _draw_differences(axis: Any, samples: Samples) -> None:
    """Differences of each variant's samples from the truth; all curves start at the base model."""
    labels: list[EndLabel] = []
    for number, (variant, curve) in enumerate(samples.differences.items()):
        style = "--" if variant.guidance_from == ADAPTER_GUIDANCE else "-"
        # The base model is step 0 of each variant.
        points = {0: samples.base_difference, **curve}
        width = max(4 - number, 2)
        axis.plot(points.keys(), points.values(), style, color=variant.color, lw=width)
        last_step = max(curve)
        text = f"{variant.name}: {curve[last_step]:.1f}\n{variant.note}"
        labels.append(EndLabel(last_step, curve[last_step], text, variant.color))
    axis.plot(0, samples.base_difference, "o", color=GRAY, ms=7, clip_on=False, zorder=3)
    title = f"color difference between samples\nand truth, % (dot: {BASE})"
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_ylim(bottom=0)
    _label_ends(axis, labels)


def _label_ends(axis: Any, labels: Sequence[EndLabel]) -> None:
    """Label curves right of their ends; labels that would overlap are pushed apart."""
    low, high = axis.get_ylim()
    lines = max(label.text.count("\n") + 1 for label in labels)
    spacing = 0.1 * lines * (high - low)  # height of a label in units of the axis
    labels = sorted(labels, key=lambda label: label.value)
    heights = [label.value for label in labels]
    for lower in 20 * list(range(len(labels) - 1)):  # a few labels are apart after some rounds
        overlap = max(spacing - (heights[lower + 1] - heights[lower]), 0)
        heights[lower] -= overlap / 2
        heights[lower + 1] += overlap / 2
    excess = max(heights[-1] + spacing / 4 - high, 0)  # all labels stay below the axis' title
    for label, height in zip(labels, heights, strict=True):
        style = {"color": label.color, "fontsize": 9.5, "va": "center", "annotation_clip": False}
        end = (label.step, height - excess)
        axis.annotate(label.text, end, xytext=(9, 0), textcoords="offset points", **style)
    axis.set_ylim(low, high)


def as_table(samples: Samples, losses: dict[str, Curve]) -> str:
    """Held-out losses, and differences of the samples from the truth, by step."""
    loss_rows: dict[str, Curve] = {}
    for method, curve in losses.items():
        loss_rows[TITLES[method]] = _trained_losses(curve)
    difference_rows: dict[str, Curve] = {}
    for variant, curve in samples.differences.items():
        difference_rows[f"{variant.name}, {variant.note}"] = curve
    base_loss = 1000 * losses[METHODS[0]][0]
    return (
        _as_block("loss on unseen icons x 1000", base_loss, loss_rows)
        + "\n"
        + _as_block("color difference of samples, %", samples.base_difference, difference_rows)
    )


def _as_block(title: str, base_value: float, rows: dict[str, Curve]) -> str:
    """A heading with the steps, the base model's value, and a row for each curve."""
    heading = f"\n{title:36}"
    for step in next(iter(rows.values())):
        heading += f"{f'step {step}':>10}"
    lines = [heading, f"{BASE}: {base_value:.1f}"]
    for name, curve in rows.items():
        line = f"{name:36}"
        for value in curve.values():
            line += f"{value:10.1f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
