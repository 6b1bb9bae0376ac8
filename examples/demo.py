"""The demo: LoRA and Bi-LoRA on the miniature's 23 icons, and one picture of what they make.

    python -m examples.demo --output_dir demo

Both runs see the same data and noise; the digests in their ``metrics.jsonl`` prove it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL.Image import Image

from bilora_diffusion.errors import TrainingError, UserError, run_cli
from bilora_diffusion.image import script as train
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import MINI, load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.methods import get
from bilora_diffusion.run import runlog
from bilora_diffusion.run.interruption import ends_in

METHODS = ("lora", "bilora")
TITLES = {
    "base": "base model",
    **{name: get(name).title for name in METHODS},
    "truth": "ground truth",
}
SUBJECTS = 6
"""The subjects of the paper's Table 4 stand first among the held-out icons."""
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "mini.yaml"
HALF_WAY = ("--validation_epochs", "17")
"""Images at half of the recipe's steps and at their end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=RECIPE, help="recipe of both runs")
    args, flags = parser.parse_known_args(argv)

    def work() -> None:
        with ends_in("interrupted: the same command starts the demo anew"):
            demo(args.output_dir, args.seed, args.config, flags)

    return run_cli(work)


def demo(folder: Path, seed: int, recipe: Path, flags: Sequence[str] = ()) -> None:
    """Train both arms, compare what they saw, draw the grid and say where everything is.

    Args:
        flags: more flags for both runs, as ``train_dreambooth_bilora.py`` takes them.
    """
    for method in METHODS:
        print(f"\n== {TITLES[method]}")
        train.main(
            [
                *("--config", str(recipe), "--method", method, "--seed", str(seed)),
                *("--output_dir", str(folder / method), "--overwrite_output_dir"),
                *(("--eval_on_start",) if method == METHODS[0] else ()),  # the base's, once
                *(*HALF_WAY, *flags),
            ]
        )
    steps = require_paired([folder / method for method in METHODS])
    picture = folder / "grid.png"
    draw_grid(folder, picture)
    print(f"\nBoth runs saw the same data and noise in all {steps} steps (equal digests).")
    print(losses(folder))
    print("\nRun folders:")
    for method in METHODS:
        print(f"  {TITLES[method]:8} {folder / method}")
    print(f"Images of six icons that no run has seen: {picture}")
    print(f"\nScore both: python -m eval.clip_scores {' '.join(str(folder / m) for m in METHODS)}")
    print(f"Look at them: python -m app.viewer {folder}")


def require_paired(folders: Sequence[Path]) -> int:
    """Check that runs saw the same inputs at every step; returns the number of steps.

    Raises:
        TrainingError: a step's digests differ.
    """
    digests = [
        [row["digest"] for row in runlog.read_metrics(folder) if "digest" in row]
        for folder in folders
    ]
    for step, seen in enumerate(zip_longest(*digests), start=1):
        if len(set(seen)) != 1:
            raise TrainingError(
                f"the runs {', '.join(map(str, folders))} saw different inputs at step {step}:"
                " train them with the same seed, data, batch size and number of steps."
            )
    return len(digests[0])


def draw_grid(folder: Path, picture: Path, seed: int = 0) -> None:
    """Rows: base, LoRA, Bi-LoRA, ground truth; columns: the subjects of Table 4, same noise."""
    heldout = open_images("mini-heldout", caption_column="label")
    labels = [str(heldout.caption(i)) for i in range(SUBJECTS)]
    prompts = [f"a TOK icon of a {label}, in the style of TOK" for label in labels]
    pipeline = load_pipeline(MINI, dtype=torch.float32)
    rows = {"base": images(pipeline, prompts, seed)}
    for method in METHODS:
        pipeline.load_lora_weights(str(folder / method))
        rows[method] = images(pipeline, prompts, seed)
        pipeline.unload_lora_weights()
    rows["truth"] = [heldout.image(i) for i in range(SUBJECTS)]
    save_grid(rows, labels, picture)


def images(pipeline: Any, prompts: Sequence[str], seed: int) -> list[Image]:
    """One 64-pixel icon per prompt, each with noise of its own that is the same for every model."""
    seeds = [seed + column for column in range(len(prompts))]
    return generate(pipeline, prompts, seeds, size=64, steps=25, guidance_scale=4.0)


def save_grid(rows: dict[str, list[Image]], labels: Sequence[str], picture: Path) -> None:
    """Write labelled rows of images as one PNG."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(rows), len(labels), figsize=(1.45 * len(labels) + 1, 1.5 * len(rows)), squeeze=False
    )
    for row, (name, pictures) in enumerate(rows.items()):
        axes[row][0].set_ylabel(TITLES.get(name, name), fontsize=11)
        for column, image in enumerate(pictures):
            axis = axes[row][column]
            axis.imshow(image, interpolation="lanczos")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(labels[column], fontsize=11)
    figure.tight_layout(pad=0.4)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def losses(folder: Path) -> str:
    """A table of held-out losses: base, then each method at its last step.

    Raises:
        UserError: a run has no held-out loss.
    """
    lines = ["", f"{'':12}{'held-out loss':>14}{'train loss':>12}   (fixed noise and timesteps)"]
    for method in METHODS:
        rows = [r for r in runlog.read_metrics(folder / method) if "heldout_loss" in r]
        if not rows:
            raise UserError(f"{folder / method} has no held-out loss: set --validation_dataset.")
        named = ([("base", rows[0])] if method == METHODS[0] else []) + [(method, rows[-1])]
        lines += [
            f"{TITLES[name]:12}{row['heldout_loss']:14.4f}{row['train_grid_loss']:12.4f}"
            for name, row in named
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
