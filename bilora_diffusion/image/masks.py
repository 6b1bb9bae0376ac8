"""Weights of the loss by masks: what they show is learned, the rest less or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_map(masks: Sequence[Tensor | None], like: Tensor, outside: float) -> Tensor:
    """Weights of the latents' places, (n, 1, h, w): 1 within a mask, ``outside`` beyond it.

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
