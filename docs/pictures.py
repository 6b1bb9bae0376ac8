"""Make the pictures of README and docs, and tell which are older than what they show.

    python -m docs.pictures                            # those that are older; `make pictures`
    python -m docs.pictures --only viewer/compare.png  # can be given several times
    python -m docs.pictures --all                      # half an hour on two cores

`docs/pictures.json` has for each picture a hash of what it shows: of a figure its texts, places,
curves and images without the numbers, of a screenshot the tab's components, HTML and style (see
`docs.screenshots`). A test compares them with the code. Runs lie in `build/pictures`, are used
again, and are trained anew for the figures that are made of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw

from bilora_diffusion import demo
from bilora_diffusion.core.figures import new_figure
from bilora_diffusion.image import crops, latents
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate

from . import screenshots
from .screenshots import SCREENSHOTS

FOLDER = Path(__file__).parent
RECORD = FOLDER / "pictures.json"
# Runs whose samples are shown
RUNS = FOLDER.parent / "build" / "pictures"
# Of the training images in the figure of buckets, pixels
SIDE = 512
# (height, width) of five photographs.
SHAPES = ((400, 1000), (600, 900), (700, 700), (900, 600), (1100, 400))
# Of an icon's latents
LATENT_SIDE = 8
CLASS = "a flat icon of a lion"
CLASS_SAMPLES = 6
# Picture -> folder of its runs, and flags of the demo.
DEMOS = {
    "grid.png": ("demo", ()),
    "flow.png": ("demo-flow", ("--pretrained_model_name_or_path", "mini-flow")),
    "animals.png": ("demo-animals", ("--dataset", "mini-animals")),
}


# figures of the demo


def make_demo(name: str, path: Path) -> None:
    """Train and sample as the demo does, and take its picture."""
    folder, flags = DEMOS[name]
    run("bilora_diffusion.demo", *flags, "--output_dir", str(RUNS / folder))
    with Image.open(RUNS / folder / "grid.png") as picture:
        screenshots.save(picture, path)


def draw_demo(path: Path) -> None:
    """The demo's picture with gray images and straight curves."""
    gray = [Image.new("RGB", (64, 64), "gray")] * demo.ICON_COUNT
    # Any steps and values: the structure of the picture has no numbers.
    curve = {75: 2.0, 150: 1.0}
    samples = [demo.Series("base model, guidance", {}, "k", gray, {0: 3.0})]
    for variant in demo.VARIANTS:
        samples.append(demo.Series(f"{variant.label}, guidance", {}, "k", gray, curve))
    losses = {variant.label: {0: 3.0, **curve} for variant in demo.VARIANTS}
    demo.draw(gray, samples, losses, path)


# figures of data.md


def draw_buckets(path: Path) -> None:
    """Five photographs, and the crop of each for its bucket."""
    icons = open_images("mini-heldout", caption_column="label")
    buckets = crops.sizes_around(SIDE)
    with new_figure(path, dpi=100, figsize=(11, 4.6), layout="tight") as figure:
        axes = figure.subplots(2, len(SHAPES))
        for number, shape in enumerate(SHAPES):
            photograph = draw_photograph(shape, icons.image(number))
            bucket = crops.nearest_bucket(shape, buckets)
            crop = crops.sample_crop(
                shape,
                bucket,
                center_crop=True,
                random_flip=False,
                generator=torch.Generator().manual_seed(0),
            )
            pixels = crops.cut(crops.resize(photograph, bucket, "lanczos"), crop, bucket)
            show(axes[0, number], photograph, f"{shape[0]} x {shape[1]}")
            show(axes[1, number], pixels.permute(1, 2, 0), f"bucket {bucket[0]} x {bucket[1]}")


def draw_photograph(size: tuple[int, int], icon: Image.Image) -> Image.Image:
    """A canvas of (height, width) with a frame and an icon in its middle."""
    height, width = size
    canvas = Image.new("RGB", (width, height), "#e8eef4")
    ImageDraw.Draw(canvas).rectangle((8, 8, width - 9, height - 9), outline="#7a8a99", width=6)
    side = min(size) - 80
    canvas.paste(icon.resize((side, side)), ((width - side) // 2, (height - side) // 2))
    return canvas


def draw_mask(path: Path) -> None:
    """An icon, its mask, and the weights of the latents without and with a weight outside."""
    icon = open_images("mini-heldout", caption_column="label").image(4)
    is_icon = np.asarray(icon.convert("L")) < 250  # the background is white
    mask = torch.from_numpy(is_icon)[None].float()  # (1, height, width)
    grid = torch.empty(1, 1, LATENT_SIDE, LATENT_SIDE)  # only its shape is read
    gray: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
    with new_figure(path, dpi=100, figsize=(9, 2.6), layout="tight") as figure:
        axes = figure.subplots(1, 4)
        show(axes[0], icon, "image")
        show(axes[1], is_icon, "NAME.mask.png", **gray)
        for axis, outside, title in (
            (axes[2], 0.0, "weight of each latent"),
            (axes[3], 0.1, "--unmasked_weight 0.1"),
        ):
            show(axis, latents.weight_map([mask], grid, outside)[0, 0], title, **gray)


def make_class(path: Path) -> None:
    """Train with and without the class preserved, and sample the class before and after."""
    images = {"base model": sample_class(None)}
    for title, weight in (("LoRA", "0"), ("LoRA,\nclass preserved", "3")):
        folder = RUNS / f"class-{weight}"
        flags = "--dataset mini --validation_dataset none --method lora --learning_rate 3e-3"
        flags += " --max_train_steps 200 --report_to none --train_batch_size 4"
        flags += f" --num_validation_images 0 --overwrite_output_dir --output_dir {folder}"
        words = [*flags.split(), "--prior_prediction_weight", weight]
        if weight != "0":
            words += ["--class_prompt", CLASS]
        run("bilora_diffusion", "train", *words)
        images[title] = sample_class(folder)
    draw_class(path, images)
    with Image.open(path) as picture:
        screenshots.save(picture, path)


def sample_class(folder: Path | None) -> list[Image.Image]:
    """Samples of `CLASS` by the miniature, with the LoRA of a run if there is one."""
    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    if folder is not None:
        pipeline.load_lora_weights(str(folder))
    seeds = range(CLASS_SAMPLES)
    prompts = [CLASS] * CLASS_SAMPLES
    return generate(pipeline, prompts, seeds, size=64, steps=25, guidance_scale=4.0)


def draw_class(path: Path, images: dict[str, list[Image.Image]] | None = None) -> None:
    """Rows of samples; gray ones without images."""
    gray = [Image.new("RGB", (64, 64), "gray")] * CLASS_SAMPLES
    rows = images or dict.fromkeys(("base model", "LoRA", "LoRA,\nclass preserved"), gray)
    with new_figure(path, dpi=100, figsize=(7.4, 3.9), layout="tight") as figure:
        axes = figure.subplots(len(rows), CLASS_SAMPLES)
        for number, (title, samples) in enumerate(rows.items()):
            for axis, image in zip(axes[number], samples, strict=True):
                show(axis, image, "")
            axes[number, 0].set_ylabel(title, fontsize=9)


def show(axis: Any, image: Any, title: str, **options: Any) -> None:
    """Draw an image without ticks under its title."""
    axis.imshow(image, **options)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


# what a figure shows

# Picture -> function that draws it; gray images stand for samples of the demo and the class
DRAWERS: dict[str, Callable[[Path], None]] = {
    **dict.fromkeys(DEMOS, draw_demo),
    "buckets.png": draw_buckets,
    "mask.png": draw_mask,
    "class.png": draw_class,
}
MAKERS: dict[str, Callable[[Path], None]] = {
    **{name: partial(make_demo, name) for name in DEMOS},
    "buckets.png": draw_buckets,
    "mask.png": draw_mask,
    "class.png": make_class,
}
NAMES = (*MAKERS, *SCREENSHOTS)


@cache
def structure_of_figure(draw: Callable[[Path], None]) -> object:
    """Size of a figure, and places, texts without numbers, curves and image sizes of its axes."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []

    def collect(figure: Figure, file: Path, **_: Any) -> None:
        figures.append(figure)
        Path(file).touch()

    with TemporaryDirectory() as folder, patch.object(Figure, "savefig", collect):
        draw(Path(folder) / "figure.png")
    (figure,) = figures
    axes = []
    for axis in figure.axes:
        place = [round(float(value), 2) for value in axis.get_position().bounds]
        labels = [axis.get_title(), axis.get_title("left"), axis.get_xlabel(), axis.get_ylabel()]
        labels += [text.get_text() for text in axis.texts]
        curves = [[str(line.get_color()), line.get_linestyle()] for line in axis.lines]
        sizes = [list(image.get_size()) for image in axis.images]
        axes.append([place, [re.sub(r"\d+", "0", label) for label in labels], curves, sizes])
    return [list(figure.get_size_inches()), axes]


def structure_hash(name: str) -> str:
    """A hash of what a picture shows, of the code as it is now."""
    if name in SCREENSHOTS:
        shot = SCREENSHOTS[name]
        size = [shot.width, shot.height, shot.is_dark]
        content: object = [size, screenshots.structure(shot.tab)]
    else:
        content = [DEMOS.get(name), structure_of_figure(DRAWERS[name])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def read_record() -> dict[str, str]:
    """Picture -> hash of what it showed when it was made."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def stale() -> list[str]:
    """Pictures that are older than what they show, or are not there."""
    record = read_record()
    names = []
    for name in NAMES:
        if not (FOLDER / name).exists() or record.get(name) != structure_hash(name):
            names.append(name)
    return names


# the command


def run(*words: str) -> None:
    """Run a module of this repository in a process."""
    subprocess.run([sys.executable, "-m", *words], cwd=FOLDER.parent, check=True)


def make_screenshots(names: Sequence[str]) -> None:
    """Take screenshots of the demo's runs and their results; make those if they are not there."""
    folder = RUNS / "demo"
    runs = [str(folder / "lora"), str(folder / "bilora")]
    if not (folder / "grid.png").exists():
        run("bilora_diffusion.demo", "--output_dir", str(folder))
    if not list(folder.glob("scores*/result.json")):
        prompts = ("--prompts", "mini-duotone-heldout", "--max_prompts", "6", "--seeds", "0")
        guidance = ("--guidance_from", "base", "--guidance_scale", "2")
        run("eval.clip_scores", *runs, "base", *prompts, *guidance)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    screenshots.take({FOLDER / name: SCREENSHOTS[name] for name in names}, folder, port)


def main(argv: Sequence[str] | None = None) -> None:
    """Make pictures and record what they show."""
    parser = argparse.ArgumentParser("docs.pictures", description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--only", action="append", choices=NAMES, metavar="NAME")
    choice.add_argument("--all", action="store_true", help="not only those that are older")
    args = parser.parse_args(argv)
    names = args.only or (NAMES if args.all else stale())
    for name in names:
        if name in MAKERS:
            print(f"== {name}", flush=True)
            MAKERS[name](FOLDER / name)
    if shots := [name for name in names if name in SCREENSHOTS]:
        print(f"== {', '.join(shots)}", flush=True)
        make_screenshots(shots)
    record = read_record() | {name: structure_hash(name) for name in names}
    record = {name: record[name] for name in NAMES if name in record}
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join(names) or "no picture is older than what it shows")


if __name__ == "__main__":
    main()
