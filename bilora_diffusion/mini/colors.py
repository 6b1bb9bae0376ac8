"""Fixed maps of colours, which make further styles of the shipped icons.

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
