"""Color maps that give the icons further styles, and a color difference between images.

A held-out icon with its colors mapped is the ideal sample for the icon's caption.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

DARK, LIGHT = (30, 20, 110), (255, 240, 200)  # RGB of black and of white in a duotone
# Factor for each channel's distance from white. A map must keep white areas light: the autoencoder
# can't decode inverted icons, since few of its training pictures have a dark background.
PASTEL = 0.4
SQUARE = 8  # side, in pixels, of the squares whose mean colors `color_difference` compares


def duotone(image: Image.Image) -> Image.Image:
    """Map brightness to mixtures of ``DARK`` and ``LIGHT``."""
    brightness = np.asarray(image.convert("L"), dtype=np.float64)[..., None] / 255  # (h, w, 1)
    pixels = brightness * np.array(LIGHT) + (1 - brightness) * np.array(DARK)  # (h, w, 3)
    return Image.fromarray(pixels.round().astype(np.uint8))


def gray(image: Image.Image) -> Image.Image:
    """Remove all colors."""
    return image.convert("L").convert("RGB")


def pastel(image: Image.Image) -> Image.Image:
    """Move all channels toward white."""
    distance = 255 - np.asarray(image, dtype=np.float64)  # (h, w, 3)
    return Image.fromarray((255 - PASTEL * distance).round().astype(np.uint8))


# Maps from RGB to RGB, by the names in `mini.COLORED`.
MAPS = {"duotone": duotone, "gray": gray, "pastel": pastel}


def color_difference(image: Image.Image, truth: Image.Image) -> float:
    """Compute the mean absolute difference of the squares' mean colors, in [0, 1].

    The images' sides must be multiples of `SQUARE`. The means make the difference insensitive to
    fine detail.
    """
    return float(np.abs(_mean_colors(image) - _mean_colors(truth)).mean())


def _mean_colors(image: Image.Image) -> np.ndarray:
    """Compute the mean color of each square of an image, (rows, columns, 3) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255  # (h, w, 3)
    height, width, _ = pixels.shape
    squares = pixels.reshape(height // SQUARE, SQUARE, width // SQUARE, SQUARE, 3)
    return squares.mean(axis=(1, 3))
