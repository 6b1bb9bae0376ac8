"""Validation images for the trackers, as diffusers' scripts send them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def log_images(trainer: Any, folder: Path) -> None:
    """Show this step's validation images in TensorBoard and in Weights & Biases.

    Args:
        trainer: whose step, prompts and trackers they are.
        folder: holds ``validation/step-N``.
    """
    files = sorted((folder / "validation" / f"step-{trainer.step}").glob("*.png"))
    if not files:
        return
    prompts = trainer.cfg.sampled_prompts
    images = [Image.open(file).convert("RGB") for file in files]
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            batch = np.stack([np.asarray(image) for image in images])
            tracker.log_images({"validation": batch}, step=trainer.step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            shown = [wandb.Image(i, caption=p) for i, p in zip(images, prompts, strict=True)]
            tracker.log({"validation": shown}, step=trainer.step)
