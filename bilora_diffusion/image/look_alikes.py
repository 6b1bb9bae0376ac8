"""Detection of images that look alike, such as resized, compressed or slightly cropped copies.

Two images look alike if their difference hashes differ in at most ``MAX_DISTANCE`` of 64 bits and
their small copies correlate. The hash alone would confuse small objects on a plain background,
since most of its bits then describe the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling

from ..core.files import counted

# Number of rows and of columns of the difference hash, which has 64 bits.
SIDE = 8
# Copies of photographs that were compressed, halved, brightened by a fifth or cropped by 3 % on
# each side have a distance of 0 to 8 bits and a correlation of 0.94 to 1. Among the miniature's
# icons, the most similar shapes are two clocks with a distance of 3 and a correlation of 0.942.
MAX_DISTANCE = 8
MIN_CORRELATION = 0.95
# Side of the small copies in pixels.
COPY_SIDE = 16
# Pillow's ``reducing_gap``: a large image is first reduced to at least this many times its final
# size, and then filtered.
REDUCING_GAP = 3.0
# Maximum number of pairs that a message names.
MAX_NAMED = 5


@dataclass(frozen=True)
class Look:
    """The features of an image that are compared."""

    # One bit for each of 8 x 8 positions: 1 if the gray level rises to the next one on the right.
    hash: np.uint64
    # Small RGB copy minus its mean, of unit length, (768,); zeros for an image of one gray level.
    copy: NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """The indices of two images that look alike."""

    first: int
    second: int
    distance: int  # number of hash bits that differ, out of 64


def look_of(image: Image) -> Look:
    """Compute the look of an RGB image."""
    # Photographs are reduced before they are filtered, which takes a third of the time.
    shape = (SIDE + 1, SIDE)
    gray = image.resize(shape, Resampling.LANCZOS, reducing_gap=REDUCING_GAP).convert("L")
    levels = np.asarray(gray, dtype=np.int16)  # (8, 9)
    rises = levels[:, 1:] > levels[:, :-1]  # (8, 8)
    (bits,) = np.packbits(rises).view(np.uint64)
    shape = (COPY_SIDE, COPY_SIDE)
    small_image = image.resize(shape, Resampling.BOX, reducing_gap=REDUCING_GAP)
    copy = np.asarray(small_image, dtype=np.float32).ravel()
    copy = copy - copy.mean()
    length = np.linalg.norm(copy)
    if length > 0:
        copy = copy / length
    return Look(bits, copy)


def find_look_alikes(
    looks: Sequence[Look], further_looks: Sequence[Look] | None = None
) -> list[Pair]:
    """Pair images that look alike, each one with the first image that it resembles.

    Args:
        looks: looks of the images.
        further_looks: looks of other images to compare with ``looks``; None compares the images of
            ``looks`` with each other.

    Returns:
        Pairs sorted by ``second``, which is an index of ``further_looks`` if they are given.
    """
    if not looks:
        return []
    hashes = np.array([look.hash for look in looks])  # (n,)
    pairs = []
    for number, look in enumerate(looks if further_looks is None else further_looks):
        earlier = len(looks) if further_looks is not None else number
        distances = np.bitwise_count(hashes[:earlier] ^ look.hash)  # (earlier,)
        for candidate in np.flatnonzero(distances <= MAX_DISTANCE).tolist():
            if are_correlated(looks[candidate], look):
                pairs.append(Pair(candidate, number, int(distances[candidate])))
                break
    return pairs


def are_correlated(first: Look, second: Look) -> bool:
    """Return whether two small copies correlate. Two copies of one gray level each always do."""
    is_plain = [not look.copy.any() for look in (first, second)]
    if any(is_plain):
        return all(is_plain)
    return float(first.copy @ second.copy) >= MIN_CORRELATION


def describe_pairs(
    pairs: Sequence[Pair], names: Sequence[str], other_names: Sequence[str] | None = None
) -> list[str]:
    """Return a phrase for each of the first `MAX_NAMED` pairs, and one that counts the others.

    Args:
        pairs: result of `find_look_alikes`.
        names, other_names: names of the images in ``looks`` and ``further_looks``.
    """
    second_names = names if other_names is None else other_names
    phrases = []
    for pair in pairs[:MAX_NAMED]:
        phrases.append(
            f"{names[pair.first]} and {second_names[pair.second]} look alike (distance"
            f" {pair.distance} of {SIDE * SIDE})"
        )
    if len(pairs) > MAX_NAMED:
        phrases.append(f"{counted(len(pairs) - MAX_NAMED, 'more pair')} of images look alike")
    return phrases
