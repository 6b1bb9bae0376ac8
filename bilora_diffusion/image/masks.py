"""Which part of each image is learned: what a mask shows, or the image's own opacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .decode import read_brightness, read_opacity

BESIDE = "the .mask.png files beside them"
ALPHA = "their alpha channel"


@dataclass(frozen=True)
class Masks:
    """The masks of a set of images: bright is learned, dark is not.

    Args:
        where: what they come from, for messages.
        sources: one per image: a file, its content, or None for an image that is learned whole.
    """

    where: str
    sources: Sequence[Path | bytes | None]

    def read(self, row: int) -> Image.Image | None:
        """The mask of one image, mode "L", upright.

        Raises:
            One of ``DECODE_ERRORS`` if it can't be decoded.
        """
        source = self.sources[row]
        if source is None:
            return None
        return read_opacity(source) if self.where == ALPHA else read_brightness(source)

    def checked(self, row: int, size: tuple[int, int]) -> bool:
        """Whether a mask hides anything of an image of this size, (height, width).

        Raises:
            ValueError: it is of another size, or hides all.
        """
        mask = self.read(row)
        if mask is None:
            return False
        if (mask.height, mask.width) != size:
            raise ValueError(
                f"its mask is {mask.width} x {mask.height} pixels and it is {size[1]} x {size[0]};"
                " make them alike"
            )
        if mask.getbbox() is None:
            raise ValueError("its mask is black all over, so nothing of it would be learned")
        return mask.getextrema() != (255, 255)


def weight_map(masks: Sequence[Tensor | None], like: Tensor, outside: float) -> Tensor:
    """What each place of the latents counts, (n, 1, h, w): 1 within a mask, ``outside`` beyond it.

    Args:
        masks: (1, H, W) in [0, 1] each; None for an image that is learned whole.
        like: latents, (n, c, h, w).
    """
    whole = torch.ones(1, *like.shape[-2:])
    shown = [whole if mask is None else at_size(mask, like) for mask in masks]
    return outside + (1 - outside) * torch.stack(shown)


def at_size(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (1, H, W) averaged down to the grid of latents (..., h, w): (1, h, w)."""
    return F.adaptive_avg_pool2d(mask, (like.shape[-2], like.shape[-1]))


def mean_of_shown(squares: Tensor, shown: Tensor | None) -> Tensor:
    """Mean over each sample of (n, c, h, w), weighted by (n, 1, h, w): (n,); 0 where nothing is."""
    if shown is None:
        return squares.flatten(1).mean(dim=1)
    count = squares.shape[1] * shown.flatten(1).sum(dim=1)
    return (squares * shown).flatten(1).sum(dim=1) / count.clamp_min(torch.finfo(count.dtype).tiny)
