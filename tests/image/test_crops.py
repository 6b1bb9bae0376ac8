"""Crops, flips and resizing, against torchvision's own transforms, and what SDXL is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from bilora_diffusion.image.crops import Crop, cut, draw, resized
from bilora_diffusion.seeds import generator

INTERPOLATIONS = [mode.value.replace("-", "_") for mode in InterpolationMode]
SIDES = st.integers(1, 400)
RESOLUTIONS = st.integers(1, 32).map(lambda k: 8 * k)


def picture(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8), "RGB")


@given(SIDES, SIDES, RESOLUTIONS, st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_crop_lies_inside_an_image_whose_shorter_side_is_the_resolution(
    height: int, width: int, side: int, center: bool, flip: bool, key: int
) -> None:
    high, wide = resized((height, width), side)
    by_torchvision = transforms.Resize(side)(Image.new("L", (width, height)))
    assert (high, wide) == (by_torchvision.height, by_torchvision.width)
    draws = generator("test", key)
    crop = draw((height, width), side, center_crop=center, random_flip=flip, generator=draws)
    assert 0 <= crop.top <= high - side
    assert 0 <= crop.left <= wide - side
    assert flip or not crop.flipped


def test_random_crops_reach_every_place_and_flips_are_even() -> None:
    crops = [
        draw((8, 11), 8, center_crop=False, random_flip=True, generator=generator(i))
        for i in range(2000)
    ]
    lefts = np.bincount([crop.left for crop in crops], minlength=4)
    assert len(lefts) == 4
    assert np.all(np.abs(lefts / 2000 - 0.25) < 0.05)
    assert abs(np.mean([crop.flipped for crop in crops]) - 0.5) < 0.05


def test_an_option_leaves_the_other_draws_alone() -> None:
    def drawn(*, center_crop: bool, random_flip: bool) -> tuple[Crop, float]:
        draws = generator("same")
        options = {"center_crop": center_crop, "random_flip": random_flip}
        return draw((40, 90), 16, generator=draws, **options), float(torch.rand(1, generator=draws))

    both, after = drawn(center_crop=False, random_flip=True)
    no_flip, after_no_flip = drawn(center_crop=False, random_flip=False)
    centered, after_centered = drawn(center_crop=True, random_flip=True)
    assert (both.top, both.left) == (no_flip.top, no_flip.left)
    assert both.flipped == centered.flipped
    assert after == after_no_flip == after_centered


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (41, 67), (16, 16), (7, 5)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_centered_cut_equals_torchvisions(size: tuple[int, int], interpolation: str) -> None:
    crop = draw(size, 16, center_crop=True, random_flip=False, generator=generator(0))
    mode = InterpolationMode(interpolation.replace("_", "-"))
    reference = transforms.Compose(
        [
            *(transforms.Resize(16, mode), transforms.CenterCrop(16)),
            *(transforms.ToTensor(), transforms.Normalize([0.5], [0.5])),
        ]
    )
    image = picture(*size)
    pixels = cut(image, crop, 16, interpolation)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, reference(image), rtol=0, atol=1e-6)


def test_the_crop_position_is_that_of_the_mirrored_image() -> None:
    image = picture(16, 40)
    whole = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    pixels = cut(image, Crop(0, 3, flipped=True), 16, "lanczos")
    torch.testing.assert_close(pixels, whole.flip(-1)[:, :, 3:19], rtol=0, atol=1e-6)
