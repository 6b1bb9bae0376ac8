"""What embeddings say about copies and variety: the nearest training picture, and diversity."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from bilora_diffusion.errors import UserError


def nearest(images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """For each image the training picture that is most like it.

    Args:
        images: embeddings, (n, d); n may be 0.
        train: embeddings, (m, d), m >= 1. Neither has to be of unit length.

    Returns:
        Cosine with the nearest, (n,) float64 in [-1, 1], and its position in ``train``, (n,) long;
        the first of several that are equally near.

    Raises:
        UserError: no training picture.
        ValueError: shapes that do not fit.
    """
    if images.ndim != 2 or train.ndim != 2 or images.shape[1] != train.shape[1]:
        raise ValueError(f"(n, d) and (m, d) are needed, not {images.shape} and {train.shape}")
    if not len(train):
        raise UserError("there is no training picture to compare with: give the training set.")
    cosine = _unit(images) @ _unit(train).T
    index = cosine.argmax(dim=1)  # documented: the first of equal maxima
    return cosine.gather(1, index[:, None])[:, 0].clamp(-1, 1), index


def pairwise_diversity(embeddings: Tensor) -> float:
    """1 - mean cosine over all pairs: 0 when all are the same, 1 when they are orthogonal.

    Args:
        embeddings: of one prompt's images, (n, d), n >= 2.

    Raises:
        UserError: fewer than two images.
        ValueError: not two-dimensional.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"(n, d) is needed, not {tuple(embeddings.shape)}")
    count = len(embeddings)
    if count < 2:
        raise UserError(f"diversity needs at least 2 images of a prompt, not {count}: add seeds.")
    unit = _unit(embeddings)
    # |sum of all|^2 holds each pair twice and each square, which is 1, once
    pairs = (unit.sum(dim=0).square().sum() - unit.square().sum()) / (count * (count - 1))
    return 1.0 - float(pairs)


def _unit(embeddings: Tensor) -> Tensor:
    """Rows of unit length in float64, so that n and m do not show in the result."""
    return normalize(embeddings.double(), dim=1)
