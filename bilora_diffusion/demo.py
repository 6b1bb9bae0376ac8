"""The demo: LoRA and Bi-LoRA learn the colors of 23 icons, and a figure shows what they learned.

    bilora demo --output_dir demo
    bilora demo --rho 0.5 --output_dir demo-wide        # with options of the training script
    bilora demo --config mini_flow --output_dir demo-flow     # another recipe and its data

Both runs see the same data and noise; the hashes in their ``metrics.jsonl`` prove it. Their
samples are compared with held-out icons in the same colors, which is what a model that learned the
colors makes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL.Image import Image

from .config.command_line import UserErrorParser
from .core.durable import dump_json, write_text
from .core.errors import TrainingError, UserError, run_cli
from .core.values import HELDOUT_LOSS
from .demo_figure import (
    BASE,
    ICON_COUNT,
    METHODS,
    TITLES,
    TRAINED,
    UNTRAINED,
    Curve,
    Samples,
    Variant,
    draw,
    trained_part,
)
from .export.conversion import export_checkpoint
from .image import script as train
from .image.opening import open_images
from .image.pipeline import load_pipeline
from .image.sampling import generate
from .mini.colors import color_difference
from .run import checkpoint, runlog
from .run.console import in_repository
from .run.interruption import ends_in

# Held-out losses of 32 icons, which take a few seconds at each step. Validation images are made at
# the end alone, for the viewer: the demo's samples show the steps before.
MEASURING_FLAGS = (
    "--checkpointing_steps=75",
    "--checkpoints_total_limit=4",
    "--validation_loss_steps=75",
    "--max_eval_samples=32",
    "--validation_epochs=1000",
)
# Number of held-out icons after them whose samples are compared with the truth at each step.
COMPARED_COUNT = 16
# Enough to compare colors: with 25 steps no difference in the table changes by more than 0.2.
SAMPLER_STEPS = 12


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


def as_table(samples: Samples, losses: dict[str, Curve]) -> str:
    """Held-out losses, and differences of the samples from the truth, by step."""
    loss_rows: dict[str, Curve] = {}
    for method, curve in losses.items():
        loss_rows[TITLES[method]] = trained_part(curve)
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
