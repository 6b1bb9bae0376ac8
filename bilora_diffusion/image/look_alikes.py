"""Images that look alike: the same picture twice, resized, compressed, brightened or a bit cropped.

Two images look alike if their difference hashes differ in at most ``MAX_DISTANCE`` of 64 bits and
their small copies correlate. The hash alone takes small objects on a plain background for each
other: most of its bits are then those of the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling

# Rows and columns of the difference hash: 64 bits.
SIDE = 8
# Of copies of photographs that were compressed, halved, brightened by a fifth or cropped by 3 % on
# each side, the distance is 0 to 8 of 64 and the correlation 0.94 to 1. Of the icons of the
# miniature, the nearest in shape are two clocks with a distance of 3 and a correlation of 0.943.
MAX_DISTANCE = 8
MIN_CORRELATION = 0.95
# Side of the copies that are correlated.
COPY_SIDE = 16
# Pillow's: how much larger an image still is when it is filtered.
REDUCING_GAP = 3.0
# Maximum number of pairs that are named.
MAX_NAMED = 5


@dataclass(frozen=True)
class Look:
    """What is compared of an image."""

    # One bit for each of 8 x 8 places: the gray level rises from there to the right.
    hash: np.uint64
    # Small copy in RGB, its mean removed, of unit length, (768,); zeros for an image of one color.
    copy: NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """Two images that look alike, by their numbers."""

    first: int
    second: int
    distance: int  # bits of 64 in which the hashes differ


def look_of(image: Image) -> Look:
    """The look of an image in RGB."""
    # Photographs are halved a few times before they are filtered, which takes a tenth of the time.
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
    """Pairs of images that look alike, each image with the first that it resembles.

    Args:
        looks: of images.
        further_looks: of images that are compared with these; None compares the images with each
            other.

    Returns:
        Pairs by their second image, which is one of ``further_looks`` where these are given.
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
    """Test that the small copies of two images correlate; two images of one color each do."""
    is_plain = [not look.copy.any() for look in (first, second)]
    if any(is_plain):
        return all(is_plain)
    return float(first.copy @ second.copy) >= MIN_CORRELATION


def describe_pairs(
    pairs: Sequence[Pair], names: Sequence[str], other_names: Sequence[str] | None = None
) -> list[str]:
    """A phrase for each of the first pairs, and the number of the others.

    Args:
        pairs: of `find_look_alikes`.
        names, other_names: of its images.
    """
    second_names = names if other_names is None else other_names
    phrases = []
    for pair in pairs[:MAX_NAMED]:
        phrases.append(
            f"{names[pair.first]} and {second_names[pair.second]} look alike (distance"
            f" {pair.distance} of {SIDE * SIDE})"
        )
    if len(pairs) > MAX_NAMED:
        phrases.append(f"{len(pairs) - MAX_NAMED} more look like another image")
    return phrases
