"""A contact sheet of the training images, cropped as in training, with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.durable import replacing
from .stream import INSTANCE, TrainingSample, TrainingStream

MAX_IMAGES = 24  # maximum number of images on the sheet
COLUMNS = 6
MAX_EPOCHS = 20  # epochs that are searched for the first use of each image
# Sizes in pixels.
SIDE = 192
MARGIN = 10
FONT_SIZE = 13
LINE_HEIGHT = 16
TEXT_LINES = 4  # the file name and three lines of the caption
TEXT_COLUMNS = 28  # maximum number of characters per line


def write_contact_sheet(stream: TrainingStream, path: Path, step_size: int) -> None:
    """Write a PNG of the first training images, up to 24, in the order of the image set.

    Each image is shown with the crop, flip and caption of its first use in training. Its name and
    caption are below it, truncated if they are long.

    Args:
        stream: the training stream, which chooses crops, flips and captions.
        path: path of the PNG file.
        step_size: number of images per training step, over all processes.
    """
    samples = first_samples(stream, step_size)
    rows = -(-len(samples) // COLUMNS)
    columns = min(COLUMNS, len(samples))
    cell_width = SIDE + MARGIN
    cell_height = SIDE + TEXT_LINES * LINE_HEIGHT + 2 * MARGIN
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for number, sample in enumerate(samples):
        left = MARGIN + number % COLUMNS * cell_width
        top = MARGIN + number // COLUMNS * cell_height
        pixels, _ = sample.read()
        picture = thumbnail(pixels)
        # Center a picture that is not square.
        offset = ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2)
        sheet.paste(picture, (left + offset[0], top + offset[1]))
        lines = [textwrap.shorten(sample.name, TEXT_COLUMNS, placeholder="...")]
        lines += textwrap.wrap(
            sample.caption, TEXT_COLUMNS, max_lines=TEXT_LINES - 1, placeholder=" ..."
        )
        for line_number, line in enumerate(lines):
            place = (left, top + SIDE + 4 + line_number * LINE_HEIGHT)
            draw.text(place, line, fill="gray" if line_number == 0 else "black", font=font)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def first_samples(stream: TrainingStream, step_size: int) -> Sequence[TrainingSample]:
    """Return the first training sample of each of the first `MAX_IMAGES` images, in their order.

    Images that are not used within `MAX_EPOCHS` epochs are left out.
    """
    count = min(MAX_IMAGES, len(stream.images))
    samples: dict[int, TrainingSample] = {}
    # If all images of a step must have one size, a step is filled up from later epochs, so one
    # epoch may not be enough.
    for position in range(MAX_EPOCHS * stream.num_samples):
        step, slot = divmod(position, step_size)
        sample = stream.sample(step, slot, step_size, INSTANCE)
        if sample.index < count:
            samples.setdefault(sample.index, sample)
        if len(samples) == count:
            break
    return [samples[index] for index in sorted(samples)]


def thumbnail(pixels: Tensor) -> Image.Image:
    """Convert pixels, (3, H, W) in [-1, 1], to a picture whose longer side is `SIDE` pixels."""
    values = (pixels.permute(1, 2, 0).numpy() + 1) * 127.5
    picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    scale = SIDE / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)
