"""Fixed maps of colours, which make further styles of the shipped icons, and how far a sample is
from the mapped picture.

The mapped picture of a held-out icon is exactly what a model that learned the style should make of
its caption.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

DARK, LIGHT = (30, 20, 110), (255, 240, 200)
"""Colours of black and of white in a duotone."""
PASTEL = 0.4
"""What is left of each channel's distance from white: the autoencoder knows white backgrounds only,
so a map has to leave white light (an inverted set can't be decoded).
"""

SQUARE = 8
"""Side, in pixels, of the squares whose mean colours `color_difference` compares."""


def duotone(image: Image.Image) -> Image.Image:
    """Brightness as a mixture of ``DARK`` and ``LIGHT``."""
    brightness = np.asarray(image.convert("L"), dtype=np.float64)[..., None] / 255  # (h, w, 1)
    pixels = brightness * np.array(LIGHT) + (1 - brightness) * np.array(DARK)  # (h, w, 3)
    return Image.fromarray(pixels.round().astype(np.uint8))


def gray(image: Image.Image) -> Image.Image:
    """Brightness alone."""
    return image.convert("L").convert("RGB")


def pastel(image: Image.Image) -> Image.Image:
    """All channels near white."""
    distance = 255 - np.asarray(image, dtype=np.float64)  # (h, w, 3)
    return Image.fromarray((255 - PASTEL * distance).round().astype(np.uint8))


MAPS = {"duotone": duotone, "gray": gray, "pastel": pastel}
"""From RGB to RGB, by the names in ``mini.COLORED``."""


def color_difference(image: Image.Image, truth: Image.Image) -> float:
    """Mean absolute difference of the mean colours of squares, in [0, 1]; fine detail does not
    count.
    """
    return float(np.abs(_mean_colors(image) - _mean_colors(truth)).mean())


def _mean_colors(image: Image.Image) -> np.ndarray:
    """Mean colours of the squares of an image, (rows, columns, 3) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255  # (h, w, 3)
    height, width, _ = pixels.shape
    squares = pixels.reshape(height // SQUARE, SQUARE, width // SQUARE, SQUARE, 3)
    return squares.mean(axis=(1, 3))
