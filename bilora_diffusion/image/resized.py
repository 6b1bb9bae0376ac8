"""Images at the size that they are cropped from, kept in memory for the visits that follow.

Decoding and resizing a photo of 12 megapixels takes half a second, cutting another place out of the
result next to nothing.
"""

from __future__ import annotations

from torch import Tensor

from . import crops
from .buckets import Size
from .sets import ImageSet

MOST_BYTES = 10**9
"""Of all that a run keeps so, in all of its processes that read images."""


class Resized:
    """Images and their masks as small as covers what is cut out of them, 8 bits a value.

    Args:
        most_bytes: what does not fit into so many is made anew at each visit.
    """

    def __init__(self, most_bytes: int) -> None:
        self._room = most_bytes
        self._kept: dict[tuple[int, int, Size], tuple[Tensor, Tensor | None]] = {}

    def __call__(
        self, images: ImageSet, sample: int, target: Size, interpolation: str
    ) -> tuple[Tensor, Tensor | None]:
        """An image, (3, H, W) in 0 to 255, and its mask, (1, H, W), if it has one.

        Args:
            images: a set that lives as long as this.
            sample: which of them.
            target: (height, width) of what will be cut out.
            interpolation: a choice of ``--image_interpolation_mode``.
        """
        key = id(images), sample, target
        if key in self._kept:
            return self._kept[key]
        mask = images.mask(sample)
        made = (
            crops.fitted(images.image(sample), target, interpolation),
            None if mask is None else crops.fitted(mask, target, "bilinear"),
        )
        size = sum(part.nbytes for part in made if part is not None)
        if size <= self._room:
            self._room -= size
            self._kept[key] = made
        return made
