"""From an image of any size to the square pixels that a diffusion model is trained on.

Crops and flips are drawn per visit from a generator that the caller seeds. What SDXL is told about
them is its size and crop conditioning, Section 2.2 of https://arxiv.org/abs/2307.01952.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional


class Crop(NamedTuple):
    """A square and a flip, decided before any pixel is read.

    ``top`` and ``left`` are in the image after resizing and, if ``flipped``, after mirroring: the
    position that SDXL's conditioning names.
    """

    top: int
    left: int
    flipped: bool


def resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(height, width) of an image whose shorter side is brought to ``resolution``."""
    height, width = size
    if height <= width:
        return resolution, int(resolution * width / height)
    return int(resolution * height / width), resolution


def draw(
    size: tuple[int, int],
    resolution: int,
    *,
    center_crop: bool,
    random_flip: bool,
    generator: torch.Generator,
) -> Crop:
    """Draw the crop and the flip of one visit.

    The same three numbers are drawn whatever the options, so that an option changes only what it
    is about and not the draws that follow.

    Args:
        size: (height, width) of the image, before resizing.
        resolution: side of the square that is cut out, in pixels.
        center_crop: cut the middle instead of a random square.
        random_flip: mirror half of the visits left to right.
        generator: where the numbers come from.
    """
    *places, side = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    room = [length - resolution for length in resized(size, resolution)]
    if center_crop:
        top, left = (round(free / 2) for free in room)
    else:
        # places < 1, and the product of a double below 1 and a small integer rounds below it.
        top, left = (
            min(int(place * (free + 1)), free) for place, free in zip(places, room, strict=True)
        )
    return Crop(top, left, random_flip and side < 0.5)


def cut(image: Image.Image, crop: Crop, resolution: int, interpolation: str) -> Tensor:
    """Resize, mirror and crop an RGB image: (3, R, R), float32 in [-1, 1].

    Args:
        image: RGB.
        crop: from ``draw`` for the size of this image.
        resolution: side R of the square, in pixels.
        interpolation: a choice of ``--image_interpolation_mode``.
    """
    return _cut(image, crop, resolution, interpolation) * 2 - 1


def cut_mask(mask: Image.Image, crop: Crop, resolution: int) -> Tensor:
    """The same of a gray image: (1, R, R), float32 in [0, 1]."""
    return _cut(mask, crop, resolution, "bilinear")


def _cut(image: Image.Image, crop: Crop, resolution: int, interpolation: str) -> Tensor:
    size = list(resized((image.height, image.width), resolution))
    mode = InterpolationMode(interpolation.replace("_", "-"))
    pixels = cast(Any, image)  # torchvision's types know tensors only, its functions more
    pixels = functional.resize(pixels, size, interpolation=mode)
    if crop.flipped:
        pixels = functional.horizontal_flip(pixels)
    pixels = functional.crop(pixels, crop.top, crop.left, resolution, resolution)
    return functional.to_dtype(functional.pil_to_tensor(pixels), torch.float32, scale=True)
