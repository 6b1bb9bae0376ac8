"""Resize, crop and flip an image to the pixels that a model is trained on.

Images that are not square can be trained in aspect-ratio buckets. The caller seeds the generator of
crops and flips. SDXL is conditioned on sizes and crops (Section 2.2 of
https://arxiv.org/abs/2307.01952).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from ..core.errors import UserError
from .sets import ImageSet

Size = tuple[int, int]  # (height, width) in pixels
# An image, (3, H, W) in 0 to 255, and its mask, (1, H, W), or None.
Resized = tuple[Tensor, Tensor | None]
AUTO = "auto"
# Sides of given buckets, and the steps between automatic ones, are multiples of this number of
# pixels: a latent is 8 pixels wide, and a token of most transformers 2 latents.
MULTIPLE = 16
MAX_ASPECT_RATIO = 2.0  # maximum of longer side / shorter side of an automatic bucket


def bucket_sizes(side: int, buckets: str | None) -> list[Size]:
    """Return the sizes to which a run's images are cropped.

    Args:
        side: ``--resolution``, in pixels.
        buckets: ``--aspect_ratio_buckets``; None if all crops are squares.
    """
    if buckets is None:
        return [(side, side)]
    if buckets == AUTO:
        return sizes_around(side)
    return read_sizes(buckets)


def read_sizes(text: str) -> list[Size]:
    """Parse sizes in the form of diffusers' scripts: "height,width;height,width"."""
    sizes = []
    for part in text.split(";"):
        sides = part.split(",")
        if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
            raise UserError(
                f'--aspect_ratio_buckets "{text}" is not a list of sizes: give auto, or heights and'
                " widths, such as 1024,1024;1216,832."
            )
        height, width = map(int, sides)
        if not height or not width or height % MULTIPLE or width % MULTIPLE:
            nearest = [max(1, round(side / MULTIPLE)) * MULTIPLE for side in (height, width)]
            raise UserError(
                f'"{part}" of --aspect_ratio_buckets has a side that is not a multiple of'
                f" {MULTIPLE}: give {nearest[0]},{nearest[1]}."
            )
        sizes.append((height, width))
    return list(dict.fromkeys(sizes))


def sizes_around(side: int) -> list[Size]:
    """Return a square and sizes from 1:2 to 2:1 that have at most as many pixels as the square.

    The longer sides are the square's side plus multiples of a step, and the shorter sides are
    multiples of the step. The step is a sixteenth of the square's side, rounded down to a multiple
    of `MULTIPLE`, as in Stable Diffusion XL (Appendix I of https://arxiv.org/abs/2307.01952).
    """
    step = max(MULTIPLE, side // 16 // MULTIPLE * MULTIPLE)
    buckets = {(side, side)}
    # At the same number of pixels and aspect ratio r, the longer side is sqrt(r) times the
    # square's side.
    longest = int(side * math.sqrt(MAX_ASPECT_RATIO))
    for long in range(side, longest + step, step):
        short = side * side // long // step * step
        if short and long <= MAX_ASPECT_RATIO * short:
            buckets |= {(long, short), (short, long)}
    return sorted(buckets)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose aspect ratio is closest to the image's; of several, the largest."""

    def rank(bucket: Size) -> tuple[float, int, Size]:
        # Compare the logarithms of the aspect ratios, so that tall and wide images are treated the
        # same way.
        difference = math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1])
        return round(abs(difference), 6), -bucket[0] * bucket[1], bucket

    return min(buckets, key=rank)


class Crop(NamedTuple):
    """Position and flip of a crop, chosen before any pixel is read.

    ``top`` and ``left`` are pixels of the image after it is resized and, if ``flipped``, mirrored,
    as in SDXL's conditioning.
    """

    top: int
    left: int
    flipped: bool


def covering_size(size: Size, target: Size) -> Size:
    """Return the (height, width) of an image that is resized to just cover a target size."""
    height, width = size
    target_height, target_width = target
    # height / width <= target_height / target_width, without division
    if height * target_width <= width * target_height:
        return target_height, max(target_width, int(target_height * width / height))
    return max(target_height, int(target_width * height / width)), target_width


def sample_crop(
    size: Size,
    target: Size,
    *,
    center_crop: bool,
    random_flip: bool,
    generator: torch.Generator,
) -> Crop:
    """Choose the crop and the flip of one training sample.

    Args:
        size: size of the image before resizing.
        target: size of the crop.
        center_crop: crop the center instead of a random position.
        random_flip: mirror half of the samples left to right.
        generator: source of three random numbers.
    """
    # Always draw three numbers, so that options do not change the random numbers after these.
    row, column, flip = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    resized_height, resized_width = covering_size(size, target)
    max_top = resized_height - target[0]
    max_left = resized_width - target[1]
    if center_crop:
        top, left = round(max_top / 2), round(max_left / 2)
    else:
        # The random numbers are below 1, but the product can be rounded up.
        top = min(int(row * (max_top + 1)), max_top)
        left = min(int(column * (max_left + 1)), max_left)
    return Crop(top, left, random_flip and flip < 0.5)


def resize(image: Image.Image, target: Size, interpolation: str) -> Tensor:
    """Resize an image to just cover a target size; return (c, h, w) in 0 to 255.

    Args:
        interpolation: a value of ``--image_interpolation_mode``.
    """
    size = list(covering_size((image.height, image.width), target))
    mode = InterpolationMode(interpolation.replace("_", "-"))
    # torchvision's type hints allow only tensors, but its functions also take PIL images.
    resized = functional.resize(cast(Any, image), size, interpolation=mode)
    return functional.pil_to_tensor(resized)


def cut(image: Tensor, crop: Crop, target: Size) -> Tensor:
    """Mirror and crop an image; return (c, H, W), float32 in [0, 1].

    Args:
        image: result of `resize` for this target.
        crop: result of `sample_crop` for the image's size before resizing.
    """
    pixels = image
    if crop.flipped:
        pixels = functional.horizontal_flip(pixels)
    pixels = functional.crop(pixels, crop.top, crop.left, *target)
    return functional.to_dtype(pixels, torch.float32, scale=True)


class ResizedImages:
    """A cache of resized images and masks, with 8 bits per value.

    Decoding and resizing a photo of 12 megapixels takes half a second; cropping is almost free.

    Args:
        max_bytes: size limit of the cache; images that do not fit are resized at each call.
    """

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._cached: dict[tuple[int, int, Size], Resized] = {}

    def get(self, images: ImageSet, index: int, size: Size, interpolation: str) -> Resized:
        """Return an image of a set and its mask, resized to cover a size.

        The set must live as long as this cache, which identifies the set by its `id`.
        """
        key = id(images), index, size
        if key in self._cached:
            return self._cached[key]
        image, mask = images.image(index), images.mask(index)
        resized_image = resize(image, size, interpolation)
        num_bytes = resized_image.nbytes
        resized_mask = None
        if mask is not None:
            # Always bilinear, since sharper filters would ring at the edges of a mask.
            resized_mask = resize(mask, size, "bilinear")
            num_bytes += resized_mask.nbytes
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._cached[key] = resized_image, resized_mask
        return resized_image, resized_mask
