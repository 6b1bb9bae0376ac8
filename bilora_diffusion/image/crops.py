"""From an image of any size to the square pixels that a diffusion model is trained on.

Crops and flips are drawn per visit from a generator that the caller seeds. What SDXL is told about
them (its size and crop conditioning, Section 2.2 of https://arxiv.org/abs/2307.01952) is part of
the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ..errors import UserError, did_you_mean

INTERPOLATIONS = tuple(mode.value.replace("-", "_") for mode in InterpolationMode)


@dataclass(frozen=True)
class Plan:
    """A crop and a flip, decided before any pixel is read; with a sample's id a key for caches.

    ``crop_top_left`` is (y, x) in the image after resizing and, if ``flipped``, after mirroring:
    the position that SDXL's conditioning names.
    """

    crop_top_left: tuple[int, int]
    flipped: bool


@dataclass(frozen=True)
class View:
    """What the model sees of an image at one visit.

    ``pixels`` are (3, R, R), float32 in [-1, 1]; ``original_size`` is (height, width) before
    resizing; ``crop_top_left`` and ``flipped`` are those of the plan.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    flipped: bool


def resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(height, width) of an image whose shorter side is brought to ``resolution``."""
    height, width = size
    if height <= width:
        return resolution, int(resolution * width / height)
    return int(resolution * height / width), resolution


def plan(
    size: tuple[int, int],
    resolution: int,
    *,
    center_crop: bool,
    random_flip: bool,
    generator: torch.Generator,
) -> Plan:
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
    draws = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    height, width = resized(size, resolution)
    room = (height - resolution, width - resolution)
    if center_crop:
        top, left = (round(free / 2) for free in room)
    else:
        # draws < 1, and the product of a double below 1 and a small integer rounds below it.
        top, left = (
            min(int(draw * (free + 1)), free) for draw, free in zip(draws, room, strict=False)
        )
    return Plan((top, left), random_flip and draws[2] < 0.5)


def apply(image: Image.Image, chosen: Plan, resolution: int, interpolation: str) -> View:
    """Resize, mirror and crop an RGB image as ``chosen`` says.

    Args:
        image: RGB.
        chosen: from ``plan`` for the size of this image.
        resolution: side of the square, in pixels.
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        UserError: an unknown interpolation.
    """
    original = (image.height, image.width)
    size = list(resized(original, resolution))
    pixels = cast(Any, image)  # torchvision's types know tensors only, its functions more
    pixels = functional.resize(pixels, size, interpolation=_mode(interpolation))
    if chosen.flipped:
        pixels = functional.horizontal_flip(pixels)
    top, left = chosen.crop_top_left
    pixels = functional.crop(pixels, top, left, resolution, resolution)
    tensor = functional.to_dtype(functional.pil_to_tensor(pixels), torch.float32, scale=True)
    return View(tensor * 2 - 1, original, chosen.crop_top_left, chosen.flipped)


def view(
    image: Image.Image,
    resolution: int,
    *,
    center_crop: bool,
    random_flip: bool,
    interpolation: str,
    generator: torch.Generator,
) -> View:
    """One visit to an RGB image: ``plan`` and ``apply`` in one call."""
    size = (image.height, image.width)
    chosen = plan(
        size,
        resolution,
        center_crop=center_crop,
        random_flip=random_flip,
        generator=generator,
    )
    return apply(image, chosen, resolution, interpolation)


def _mode(interpolation: str) -> InterpolationMode:
    if interpolation not in INTERPOLATIONS:
        hint, known = did_you_mean(interpolation, INTERPOLATIONS), ", ".join(INTERPOLATIONS)
        raise UserError(f'unknown interpolation "{interpolation}"{hint}: use one of {known}.')
    return InterpolationMode(interpolation.replace("_", "-"))
