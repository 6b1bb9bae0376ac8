"""From an image of any size to the pixels that a diffusion model is trained on.

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

from .buckets import Size


class Crop(NamedTuple):
    """A place and a flip, decided before any pixel is read.

    ``top`` and ``left`` are in the image after resizing and, if ``flipped``, after mirroring: the
    position that SDXL's conditioning names.
    """

    top: int
    left: int
    flipped: bool


def resized(size: Size, target: Size) -> Size:
    """(height, width) of an image that is made as small as covers a target; of a square target its
    shorter side becomes the square's.
    """
    height, width = size
    high, wide = target
    if height * wide <= width * high:
        return high, max(wide, int(high * width / height))
    return max(high, int(wide * height / width)), wide


def draw(
    size: Size,
    target: Size,
    *,
    center_crop: bool,
    random_flip: bool,
    generator: torch.Generator,
) -> Crop:
    """Draw the crop and the flip of one visit.

    The same three numbers are drawn whatever the options, so that an option changes only what it
    is about and not the draws that follow.

    Args:
        size: of the image, before resizing.
        target: of what is cut out.
        center_crop: cut the middle instead of a random place.
        random_flip: mirror half of the visits left to right.
        generator: where the numbers come from.
    """
    *places, side = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    room = [have - want for have, want in zip(resized(size, target), target, strict=True)]
    if center_crop:
        top, left = (round(free / 2) for free in room)
    else:
        # places < 1, and the product of a double below 1 and a small integer rounds below it.
        top, left = (
            min(int(place * (free + 1)), free) for place, free in zip(places, room, strict=True)
        )
    return Crop(top, left, random_flip and side < 0.5)


def fitted(image: Image.Image, target: Size, interpolation: str) -> Tensor:
    """An image made as small as covers a target: (c, h, w), in 0 to 255.

    Args:
        interpolation: a choice of ``--image_interpolation_mode``.
    """
    size = list(resized((image.height, image.width), target))
    mode = InterpolationMode(interpolation.replace("_", "-"))
    # torchvision's types know tensors only, its functions more
    small = functional.resize(cast(Any, image), size, interpolation=mode)
    return functional.pil_to_tensor(small)


def cut(image: Tensor, crop: Crop, target: Size) -> Tensor:
    """Mirror and crop an image: (c, H, W), float32 in [0, 1].

    Args:
        image: ``fitted`` to this target.
        crop: from ``draw`` for the size of this image before resizing.
    """
    pixels = functional.horizontal_flip(image) if crop.flipped else image
    pixels = functional.crop(pixels, crop.top, crop.left, *target)
    return functional.to_dtype(pixels, torch.float32, scale=True)
