"""Fixed color maps, which turn the icons into further styles, and a distance of pictures.

The mapped picture of a held-out icon is the ideal sample for the icon's caption.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

DARK, LIGHT = (30, 20, 110), (255, 240, 200)  # colors of black and of white in a duotone
# Factor of each channel's distance from white. A map must keep white light: the autoencoder was
# trained on white backgrounds only, and can't decode an inverted set.
PASTEL = 0.4
SQUARE = 8  # pixels; side of the squares whose mean colors `color_difference` compares


def duotone(image: Image.Image) -> Image.Image:
    """Map brightness to mixtures of ``DARK`` and ``LIGHT``."""
    brightness = np.asarray(image.convert("L"), dtype=np.float64)[..., None] / 255  # (h, w, 1)
    pixels = brightness * np.array(LIGHT) + (1 - brightness) * np.array(DARK)  # (h, w, 3)
    return Image.fromarray(pixels.round().astype(np.uint8))


def gray(image: Image.Image) -> Image.Image:
    """Remove all colors."""
    return image.convert("L").convert("RGB")


def pastel(image: Image.Image) -> Image.Image:
    """Move all channels towards white."""
    distance = 255 - np.asarray(image, dtype=np.float64)  # (h, w, 3)
    return Image.fromarray((255 - PASTEL * distance).round().astype(np.uint8))


# Maps from RGB to RGB, by the names in `mini.COLORED`.
MAPS = {"duotone": duotone, "gray": gray, "pastel": pastel}


def color_difference(image: Image.Image, truth: Image.Image) -> float:
    """Mean absolute difference of the squares' mean colors, in [0, 1]; fine detail is ignored."""
    return float(np.abs(_mean_colors(image) - _mean_colors(truth)).mean())


def _mean_colors(image: Image.Image) -> np.ndarray:
    """Mean colors of the squares of an image, (rows, columns, 3) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255  # (h, w, 3)
    height, width, _ = pixels.shape
    squares = pixels.reshape(height // SQUARE, SQUARE, width // SQUARE, SQUARE, 3)
    return squares.mean(axis=(1, 3))
