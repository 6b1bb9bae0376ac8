"""Aspect-ratio buckets: images of other shapes than the square are trained in their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..core.errors import UserError

Size = tuple[int, int]
"""(height, width) in pixels."""
AUTO = "auto"
MULTIPLE = 16
"""Pixels that divide every side: a latent has 8, and most transformers see two by two of them."""
MAX_ASPECT_RATIO = 2.0
"""Of the longer side of an automatic bucket to the shorter."""


def sizes(side: int, buckets: str | None) -> list[Size]:
    """The sizes that a run's images are cut to; the square of ``--resolution`` alone by default."""
    if buckets is None:
        return [(side, side)]
    return sizes_around(side) if buckets == AUTO else read_sizes(buckets)


def read_sizes(text: str) -> list[Size]:
    """Sizes as diffusers' scripts take them: "height,width;height,width"."""
    sizes = []
    for part in text.split(";"):
        sides = part.split(",")
        if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
            raise UserError(
                f'--aspect_ratio_buckets "{text}" is not a list of sizes: give auto, or heights and'
                " widths such as 1024,1024;1216,832."
            )
        height, width = map(int, sides)
        if not height or not width or height % MULTIPLE or width % MULTIPLE:
            raise UserError(
                f'"{part}" of --aspect_ratio_buckets has a side that is not a multiple of'
                f" {MULTIPLE}: give {nearest_multiple(height)},{nearest_multiple(width)}."
            )
        sizes.append((height, width))
    return list(dict.fromkeys(sizes))


def sizes_around(side: int) -> list[Size]:
    """The square of a side, and sizes up to 1:2 and 2:1 with no more pixels than it, in steps of
    a sixteenth of the side, in the manner of Stable Diffusion XL (Appendix I of
    https://arxiv.org/abs/2307.01952).
    """
    step = max(MULTIPLE, side // 16 // MULTIPLE * MULTIPLE)
    buckets = {(side, side)}
    for long in range(side, int(side * math.sqrt(MAX_ASPECT_RATIO)) + step, step):
        short = side * side // long // step * step
        if short and long <= MAX_ASPECT_RATIO * short:
            buckets |= {(long, short), (short, long)}
    return sorted(buckets)


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose shape is most like an image's; of several the largest."""

    def rank(bucket: Size) -> tuple[float, int, Size]:
        # Shapes differ by the logarithm of their aspect ratios: tall and wide count the same.
        difference = math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1])
        return round(abs(difference), 6), -bucket[0] * bucket[1], bucket

    return min(sizes, key=rank)


def nearest_multiple(side: int) -> int:
    return max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE)
