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

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.crops import INTERPOLATIONS, Plan, apply, plan, resized, view
from bilora_diffusion.seeds import generator

SIDES = st.integers(1, 400)
RESOLUTIONS = st.integers(1, 32).map(lambda k: 8 * k)


def picture(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8), "RGB")


@given(SIDES, SIDES, RESOLUTIONS)
def test_the_shorter_side_becomes_the_resolution(height: int, width: int, side: int) -> None:
    size = resized((height, width), side)
    assert min(size) == side
    by_torchvision = transforms.Resize(side)(Image.new("L", (width, height)))
    assert size == (by_torchvision.height, by_torchvision.width)


@given(SIDES, SIDES, RESOLUTIONS, st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_crop_lies_inside(
    height: int, width: int, side: int, center: bool, flip: bool, key: int
) -> None:
    draws = generator("test", key)
    chosen = plan((height, width), side, center_crop=center, random_flip=flip, generator=draws)
    high, wide = resized((height, width), side)
    top, left = chosen.crop_top_left
    assert 0 <= top <= high - side
    assert 0 <= left <= wide - side
    assert flip or not chosen.flipped


def test_random_crops_reach_every_place_and_flips_are_even() -> None:
    plans = [
        plan((8, 11), 8, center_crop=False, random_flip=True, generator=generator(i))
        for i in range(2000)
    ]
    lefts = np.bincount([p.crop_top_left[1] for p in plans], minlength=4)
    assert len(lefts) == 4
    assert np.all(np.abs(lefts / 2000 - 0.25) < 0.05)
    assert abs(np.mean([p.flipped for p in plans]) - 0.5) < 0.05


def test_an_option_leaves_the_other_draws_alone() -> None:
    def chosen(*, center_crop: bool, random_flip: bool) -> tuple[Plan, float]:
        draws = generator("same")
        result = plan(
            (40, 90), 16, center_crop=center_crop, random_flip=random_flip, generator=draws
        )
        return result, float(torch.rand(1, generator=draws))

    both, after = chosen(center_crop=False, random_flip=True)
    no_flip, after_no_flip = chosen(center_crop=False, random_flip=False)
    centered, after_centered = chosen(center_crop=True, random_flip=True)
    assert both.crop_top_left == no_flip.crop_top_left
    assert both.flipped == centered.flipped
    assert after == after_no_flip == after_centered


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (41, 67), (16, 16), (7, 5)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_centered_view_equals_torchvisions(size: tuple[int, int], interpolation: str) -> None:
    image = picture(*size)
    seen = view(
        image,
        16,
        center_crop=True,
        random_flip=False,
        interpolation=interpolation,
        generator=generator(0),
    )
    reference = transforms.Compose(
        [
            transforms.Resize(16, InterpolationMode(interpolation.replace("_", "-"))),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    torch.testing.assert_close(seen.pixels, reference(image), rtol=0, atol=1e-6)
    assert seen.original_size == size
    assert seen.pixels.shape == (3, 16, 16)
    assert seen.pixels.dtype == torch.float32


def test_the_crop_position_is_that_of_the_mirrored_image() -> None:
    image = picture(16, 40)
    whole = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    seen = apply(image, Plan((0, 3), flipped=True), 16, "lanczos")
    torch.testing.assert_close(seen.pixels, whole.flip(-1)[:, :, 3:19], rtol=0, atol=1e-6)
    assert (seen.crop_top_left, seen.flipped) == ((0, 3), True)


def test_a_view_is_its_plan_applied() -> None:
    image = picture(30, 50)
    options = {"center_crop": False, "random_flip": True}
    seen = view(image, 24, interpolation="bicubic", generator=generator(5), **options)
    chosen = plan((30, 50), 24, generator=generator(5), **options)
    again = apply(image, chosen, 24, "bicubic")
    assert torch.equal(seen.pixels, again.pixels)
    assert (seen.crop_top_left, seen.flipped) == (chosen.crop_top_left, chosen.flipped)


def test_pixels_span_minus_one_to_one() -> None:
    image = Image.new("RGB", (8, 8), (0, 255, 255))
    pixels = apply(image, Plan((0, 0), flipped=False), 8, "nearest").pixels
    assert pixels.min() == -1
    assert pixels.max() == 1


def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(UserError, match=r'"lancos" \(did you mean "lanczos"'):
        apply(picture(8, 8), Plan((0, 0), flipped=False), 8, "lancos")
