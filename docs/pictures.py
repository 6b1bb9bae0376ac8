"""Make the pictures of data.md from the code that they show: buckets, a mask, a class that is kept.

python -m docs.pictures        # three PNG files beside the page; a minute or two on two CPU cores
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from bilora_diffusion.image import buckets, crops, masks
from bilora_diffusion.image import script as train
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
SIDE = 512
SHAPES = ((400, 1000), (600, 900), (700, 700), (900, 600), (1100, 400))
"""(height, width) of five photos."""
LATENT = 8
CLASS, DRAWN = "a flat icon of a lion", 6


def photo(size: buckets.Size, icon: Image.Image) -> Image.Image:
    """A canvas of (height, width) with a frame and an icon in its middle."""
    height, width = size
    canvas = Image.new("RGB", (width, height), "#e8eef4")
    ImageDraw.Draw(canvas).rectangle((8, 8, width - 9, height - 9), outline="#7a8a99", width=6)
    side = min(size) - 80
    large = icon.resize((side, side), Image.Resampling.LANCZOS)
    canvas.paste(large, ((width - side) // 2, (height - side) // 2))
    return canvas


def draw_buckets(path: Path) -> None:
    """Five photos, and what is cut of each for the bucket that it belongs to."""
    icons, sizes = open_images("mini-heldout", caption_column="label"), buckets.around(SIDE)
    figure, axes = plt.subplots(2, len(SHAPES), figsize=(11, 4.6))
    for number, (shape, (above, below)) in enumerate(zip(SHAPES, axes.T, strict=True)):
        image, size = photo(shape, icons.image(number)), buckets.nearest(shape, sizes)
        random = torch.Generator().manual_seed(0)
        crop = crops.draw(shape, size, center_crop=True, random_flip=False, generator=random)
        cut = crops.cut(crops.fitted(image, size, "lanczos"), crop, size)
        _show(above, image, f"{shape[0]} x {shape[1]}")
        _show(below, cut.permute(1, 2, 0).numpy(), f"bucket {size[0]} x {size[1]}")
    _save(figure, path)


def draw_mask(path: Path) -> None:
    """An icon, its mask, and the weights on the latents' grid, all and with a tenth elsewhere."""
    icon = open_images("mini-heldout", caption_column="label").image(4)
    shown = np.asarray(icon.convert("L")) < 250
    mask = torch.from_numpy(shown)[None].float()
    latents = torch.empty(1, 1, LATENT, LATENT)
    whole, tenth = (masks.weight_map([mask], latents, share)[0, 0] for share in (0, 0.1))
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
    _show(axes[0], icon, "picture")
    _show(axes[1], shown, "NAME.mask.png", cmap="gray")
    _show(axes[2], whole, "weight of each latent", cmap="gray", vmin=0, vmax=1)
    _show(axes[3], tenth, "--unmasked_weight 0.1", cmap="gray", vmin=0, vmax=1)
    _save(figure, path)


def draw_class(path: Path) -> None:
    """The class before training, after it, and after it with the class kept."""
    rows = {"base model": drawn(None)}
    with TemporaryDirectory() as folder:
        for title, weight in (("LoRA", 0), ("LoRA, class kept", 3)):
            run = Path(folder) / str(weight)
            train.main(
                [
                    *("--dataset", "mini", "--validation_dataset", "none", "--method", "lora"),
                    *("--learning_rate", "3e-3", "--max_train_steps", "200", "--report_to", "none"),
                    *("--train_batch_size", "4", "--num_validation_images", "0"),
                    *(("--class_prompt", CLASS) if weight else ()),
                    *("--prior_prediction_weight", str(weight), "--output_dir", str(run)),
                ]
            )
            rows[title] = drawn(run)
    figure, axes = plt.subplots(len(rows), DRAWN, figsize=(7.4, 3.9))
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            _show(axis, image, "")
        line[0].set_ylabel(title)
    _save(figure, path)


def drawn(run: Path | None) -> list[Image.Image]:
    """What the miniature draws of ``CLASS``, with a run's LoRA if there is one."""
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    if run is not None:
        pipeline.load_lora_weights(str(run))
    return generate(pipeline, [CLASS] * DRAWN, range(DRAWN), size=64, steps=25, guidance_scale=4.0)


def _show(axis: Any, image: Any, title: str, **how: Any) -> None:
    axis.imshow(image, **how)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures that are named, or all."""
    made = {"buckets": draw_buckets, "mask": draw_mask, "class": draw_class}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(made), help=", ".join(made))
    for name in parser.parse_args(argv).names:
        made[name](FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
