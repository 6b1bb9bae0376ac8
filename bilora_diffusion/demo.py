"""The demo: LoRA, Bi-LoRA and a guided target learn the colors of 23 icons; a figure compares them.

    bilora demo --output_dir demo
    bilora demo --config mini_flow --rho 0.5 --output_dir demo-flow     # options of bilora train

All runs see the same data and noise, as the hashes in their ``metrics.jsonl`` prove. A finished
run is not repeated. Samples are compared with held-out icons in the same colors, which a model that
has learned the colors reproduces.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from .config.command_line import UserErrorParser
from .core.durable import dump_json, write_text
from .core.errors import UserError, ends_in, run_cli
from .core.plotting import new_figure
from .core.values import ADAPTER_GUIDANCE, BASE_GUIDANCE, HELDOUT_LOSS
from .export.conversion import export_checkpoint
from .image.opening import open_images
from .image.pipeline import load_pipeline
from .image.sampling import generate
from .image.script import DreamBoothScript
from .mini.colors import color_difference
from .run import checkpoint, runlog
from .run.console import describe_comparison, quiet, scoring_command
from .train.command import show_messages, train_configs
from .train.variants import Variant, require_paired

# Name of the run folder -> the variant that is trained.
VARIANTS = {
    # This run also generates the base model's images, once for all runs.
    "lora": Variant("LoRA", {"method": "lora", "eval_on_start": True}),
    "bilora": Variant("Bi-LoRA", {"method": "bilora"}),
    "guided": Variant(
        "guided target",
        # The weights contain the guidance, so their images are generated without it.
        {
            "method": "lora",
            "guided_target": 1.5,
            "validation_guidance_scale": 1.0,
            "validation_guidance_from": ADAPTER_GUIDANCE,
        },
    ),
}
# Measuring the loss of 32 icons takes a few seconds. Validation images, for the viewer, are
# generated only at the end, and for LoRA at step 0.
FLAGS = ("--config=mini_duotone", "--max_eval_samples=32", "--validation_epochs=1000")
# Number of held-out icons in the figure, which by default have the subjects of the paper's Table
# 4; and number of icons after them, whose samples are compared with the truth at each checkpoint.
ICON_COUNT, COMPARED_COUNT = 6, 16
# Enough to compare colors: with 25 steps, no color difference in % changes by more than 0.2.
SAMPLER_STEPS = 12
# Ordinary guidance removes much of a new style: training also changes the unconditional prediction,
# so the difference that guidance multiplies points away from the style.
ORDINARY = {"guidance_scale": 4.0}
FROM_BASE = {"guidance_scale": 2.0, "guidance_from": BASE_GUIDANCE}
Curve = dict[int, float]  # value by step


@dataclass
class Series:
    """Samples of a model with one kind of guidance: a row of icons and a curve in the figure."""

    label: str  # the model and its guidance
    guidance: dict[str, Any]  # options of `generate`
    style: str  # the curve's color and line style, as a matplotlib format
    images: list[Image] = field(default_factory=list)  # samples at the last step
    differences: Curve = field(default_factory=dict)  # from the truth, in % of the full range


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = UserErrorParser(description=__doc__, epilog="Flags of bilora train are accepted.")
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))

    def work() -> None:
        args, flags = parser.parse_known_args(argv)
        if "--overwrite_output_dir" not in flags:
            flags += ["--resume_from_checkpoint", "auto"]
        demo(args.output_dir, [*FLAGS, *flags])

    return run_cli(work)


def demo(folder: Path, words: Sequence[str]) -> None:
    """Train the runs with the options in ``words``, and compare their samples in a figure."""
    show_messages()
    quiet()
    script, runs, configs = DreamBoothScript(), {}, []
    for name, variant in VARIANTS.items():
        runs[variant.label] = folder / name
        configs.append(script.resolve([*words, *variant.flags, f"--output_dir={folder / name}"]))
    if configs[0].validation_dataset is None:
        raise UserError("the demo compares held-out images: give them as --validation_dataset.")
    # Runs that are trained together share one task, so they have the same target.
    for configs_of_target in (configs[:2], configs[2:]):
        with ends_in("interrupted: the same command resumes"):
            train_configs(script, configs_of_target)
    steps = require_paired(list(runs.values()))
    losses: dict[str, Curve] = {}
    for label in ("LoRA", "Bi-LoRA"):  # the loss of a guided target does not rate its samples
        rows = [row for row in runlog.read_metrics(runs[label]) if HELDOUT_LOSS in row]
        losses[label] = {row["step"]: 1000 * row[HELDOUT_LOSS] for row in rows}
    print("\nSamples of held-out captions", flush=True)
    truth, samples = sample(runs, steps)
    draw(truth, samples, losses, folder / "grid.png")

    lines = [f"All runs saw the same data and noise in all {steps} steps (equal digests).", ""]
    for label, curve in losses.items():
        lines.append(f"loss on unseen icons x 1000, {label}: {curve[steps]:.1f}")
    for series in samples:
        *_, last = series.differences.values()
        lines.append(f"color difference of samples in %, {series.label}: {last:.1f}")
    write_result(folder / "grid.png", lines)
    print("\n".join(["", *lines, "", f"Figure of samples and curves: {folder / 'grid.png'}"]))
    pair = list(runs.values())[:2]  # the guided target needs different guidance
    command = scoring_command(list(map(str, pair)), str(configs[0].validation_dataset))
    print(describe_comparison(pair, command))


def write_result(picture: Path, lines: Sequence[str]) -> None:
    """Write ``result.json`` and ``report.md``; the viewer does not wrap indented lines."""
    write_text(picture.parent / "report.md", "# Demo\n\n    " + "\n    ".join(lines) + "\n")
    record = {"schema_version": 1, "kind": "demo", "figures": [picture.name]}
    write_text(picture.parent / "result.json", dump_json(record))


def sample(runs: dict[str, Path], steps: int) -> tuple[list[Image], list[Series]]:
    """Return held-out icons, and the series of samples of their captions, from equal noise.

    Each series has color differences at the steps of all checkpoints, and the last step's images.
    """
    config = runlog.read_run(next(iter(runs.values())))["config"]
    heldout = open_images(config["validation_dataset"], caption_column=config["caption_column"])
    count = min(ICON_COUNT + COMPARED_COUNT, len(heldout))
    captions = [str(entry.caption) for entry in heldout.entries[:count]]
    truth = [heldout.image(number) for number in range(count)]
    pipeline = load_pipeline(config["pretrained_model_name_or_path"], dtype=torch.float32)

    def add_step(series: Series, step: int) -> None:
        options = {"size": 64, "steps": SAMPLER_STEPS, **series.guidance}
        series.images = generate(pipeline, captions, range(count), **options)
        differences = list(map(color_difference, series.images, truth))
        series.differences[step] = 100 * float(np.mean(differences[ICON_COUNT:]))

    samples = [
        Series("base model, ordinary guidance 4", ORDINARY, "0.5"),
        Series("LoRA, ordinary guidance 4", ORDINARY, "k--"),
        Series("LoRA, guidance 2 from base", FROM_BASE, "k"),
        Series("Bi-LoRA, guidance 2 from base", FROM_BASE, "C1"),
        Series("guided target, no guidance", {"guidance_scale": 1.0}, "C2"),
    ]
    add_step(samples[0], 0)
    for label, run in runs.items():
        for step in sorted({*checkpoint.steps(run), steps}):
            with TemporaryDirectory() as folder:
                weights = run
                if step < steps:
                    (weights,) = export_checkpoint(run, step, "diffusers", folder)
                pipeline.load_lora_weights(str(weights))
            for series in samples:
                if series.label.startswith(f"{label},"):
                    add_step(series, step)
            pipeline.unload_lora_weights()
    return truth, samples


def draw(truth: list[Image], samples: list[Series], losses: dict[str, Curve], path: Path) -> None:
    """Draw a PNG file: left, rows of icons with the truth last; right, losses and differences."""
    rows = {series.label.replace(", ", "\n"): series.images for series in samples}
    rows["truth\nnot in the training set"] = truth
    with new_figure(path, dpi=110, figsize=(13, 7.1), layout="constrained") as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[8, 5])
        grid = left.subplots(len(rows), ICON_COUNT, squeeze=False)
        for axes, (title, images) in zip(grid, rows.items(), strict=True):
            axes[0].set_ylabel(title, rotation=0, ha="right", va="center")
            for axis, image in zip(axes, images, strict=False):
                axis.imshow(image, interpolation="lanczos")
                axis.set(xticks=[], yticks=[], frame_on=False)
        upper, lower = right.subplots(2, 1)
        for series in samples:
            # The base model is step 0 of each run.
            plot(lower, samples[0].differences | series.differences, series.style, series.label)
        for (label, curve), style in zip(losses.items(), ("k", "C1"), strict=True):
            # Step 0 is left out, since its loss would flatten the rest of the curve.
            plot(upper, {step: curve[step] for step in curve if step > 0}, style, label)
        upper.set_title("loss on unseen icons x 1000", loc="left")
        lower.set_title("color difference between samples and truth, %", loc="left")
        # Space for the legend above the base model.
        lower.set(xlabel="training steps", ylim=(0, 1.7 * max(samples[0].differences.values())))


def plot(axis: Any, curve: Curve, style: str, label: str) -> None:
    """Plot a curve with its last value in the legend."""
    steps, values = list(curve), list(curve.values())
    axis.plot(steps, values, style, marker=".", label=f"{label}: {values[-1]:.1f}")
    axis.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main())
