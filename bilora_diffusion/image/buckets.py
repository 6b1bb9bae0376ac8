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
MOST_ELONGATED = 2.0
"""Most by which one side of an automatic bucket is longer than the other."""


def sizes(side: int, buckets: str | None) -> list[Size]:
    """The sizes that a run's images are cut to; the square of ``--resolution`` alone by default."""
    if buckets is None:
        return [(side, side)]
    return around(side) if buckets == AUTO else read(buckets)


def read(text: str) -> list[Size]:
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
                f" {MULTIPLE}: give {_near(height)},{_near(width)}."
            )
        sizes.append((height, width))
    return list(dict.fromkeys(sizes))


def around(side: int) -> list[Size]:
    """The square of a side, and sizes up to 1:2 and 2:1 with no more pixels than it, in steps of
    a sixteenth of the side, in the manner of Stable Diffusion XL (Appendix I of
    https://arxiv.org/abs/2307.01952).
    """
    step = max(MULTIPLE, side // 16 // MULTIPLE * MULTIPLE)
    long = range(side, int(side * math.sqrt(MOST_ELONGATED)) + step, step)
    tall = {(height, side * side // height // step * step) for height in long}
    tall = {size for size in tall if size[1] and size[0] <= MOST_ELONGATED * size[1]}
    return sorted({(side, side)} | tall | {(width, height) for height, width in tall})


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose shape is most like an image's; of several the largest."""
    shape = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - shape), 6), -s[0] * s[1], s))


def _near(side: int) -> int:
    return max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE)
