"""Image files of every kind become upright RGB on white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.decode import read_rgb, to_rgb
from bilora_diffusion.image.opening import open_images


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (12, 8), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    images = open_images(str(tmp_path))
    assert images.size(0) == (12, 8)
    turned = images.image(0)
    assert turned.size == (8, 12)
    assert turned.getpixel((7, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_laid_on_white(mode: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if mode == "RGB":  # one color is declared transparent
        image, options = Image.new("RGB", (4, 4), (9, 9, 9)), {"transparency": (9, 9, 9)}
    elif mode == "P":
        image, options = Image.new("P", (4, 4), 3), {"transparency": 3}
        image.putpalette([level for level in range(256) for _ in "rgb"])
    else:
        image = Image.new("RGBA", (4, 4), (200, 10, 10, 0)).convert(mode)
    image.save(tmp_path / "a.png", **options)
    assert read_rgb(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (255, 255, 255))
    source = image.convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4), (255, 128, 128))
    converted = to_rgb(source)
    assert converted.mode == "RGB"
    assert converted.size == (4, 4)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        red = np.asarray(read_rgb(tmp_path / name))[..., 0]
        assert red.tolist() == [[0, 100], [200, 255]]


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif .*8 bits"):
        open_images(str(tmp_path))
