"""Files of every kind become upright RGB on white; crops, flips and resizing are torchvision's."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from bilora_diffusion.core.seeds import generator
from bilora_diffusion.image.crops import (
    Crop,
    ResizedImages,
    covering_size,
    cut,
    resize,
    sample_crop,
)
from bilora_diffusion.image.image_files import (
    read_mask,
    read_rgb,
    to_rgb,
    upright_size,
)
from bilora_diffusion.image.opening import open_images

INTERPOLATIONS = [mode.value.replace("-", "_") for mode in InterpolationMode]
SIDES = st.integers(1, 400)
RESOLUTIONS = st.integers(1, 32).map(lambda k: 8 * k)


def picture(height, width):
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8), "RGB")


@given(SIDES, SIDES, RESOLUTIONS, st.booleans(), st.booleans(), st.integers(0, 99))
def test_every_crop_lies_inside_an_image_whose_shorter_side_is_the_resolution(
    height, width, side, center, flip, key
):
    high, wide = covering_size((height, width), (side, side))
    by_torchvision = transforms.Resize(side)(Image.new("L", (width, height)))
    assert (high, wide) == (by_torchvision.height, by_torchvision.width)
    draws = generator("test", key)
    crop = sample_crop(
        (height, width), (side, side), center_crop=center, random_flip=flip, generator=draws
    )
    assert 0 <= crop.top <= high - side
    assert 0 <= crop.left <= wide - side
    assert flip or not crop.flipped


def test_random_crops_reach_every_place_and_flips_are_even():
    options = {"center_crop": False, "random_flip": True}
    crops = [sample_crop((8, 11), (8, 8), generator=generator(i), **options) for i in range(2000)]
    lefts = np.bincount([crop.left for crop in crops], minlength=4)
    assert len(lefts) == 4
    assert np.all(np.abs(lefts / 2000 - 0.25) < 0.05)
    assert abs(np.mean([crop.flipped for crop in crops]) - 0.5) < 0.05


def test_an_option_leaves_the_other_draws_alone():
    def crop_and_number(center_crop, random_flip):
        draws, options = generator("same"), {"center_crop": center_crop, "random_flip": random_flip}
        return sample_crop((40, 90), (16, 16), generator=draws, **options), float(
            torch.rand(1, generator=draws)
        )

    (both, after), (unflipped, second_number), (centered, alike) = (
        crop_and_number(*options) for options in ((False, True), (False, False), (True, True))
    )
    assert (both.top, both.left) == (unflipped.top, unflipped.left)
    assert both.flipped == centered.flipped
    assert after == second_number == alike


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (41, 67), (16, 16), (7, 5)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_centered_cut_equals_torchvisions(size, interpolation):
    crop = sample_crop(size, (16, 16), center_crop=True, random_flip=False, generator=generator(0))
    mode = InterpolationMode(interpolation.replace("_", "-"))
    reference = transforms.Compose(
        [
            *(transforms.Resize(16, mode), transforms.CenterCrop(16)),
            *(transforms.ToTensor(), transforms.Normalize([0.5], [0.5])),
        ]
    )
    image = picture(*size)
    pixels = cut(resize(image, (16, 16), interpolation), crop, (16, 16)) * 2 - 1
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, reference(image), rtol=0, atol=1e-6)


def test_the_crop_position_is_that_of_the_mirrored_image():
    image = picture(16, 40)
    pixels_before = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    small = resize(image, (16, 16), "lanczos")
    pixels = cut(small, Crop(0, 3, flipped=True), (16, 16)) * 2 - 1
    torch.testing.assert_close(pixels, pixels_before.flip(-1)[:, :, 3:19], rtol=0, atol=1e-6)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (12, 8), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    images = open_images(str(tmp_path))
    assert images.entries[0].size == (12, 8)
    turned = images.image(0)
    assert turned.size == (8, 12)
    assert turned.getpixel((7, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_size_is_upright_whether_pixels_are_decoded_or_not(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a{suffix}"
    Image.new("RGB", (12, 8)).save(file, exif=exif)
    image = read_rgb(file)
    sizes = [upright_size(file, decode=decode) for decode in (False, True)]
    assert sizes == [(image.height, image.width)] * 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    options: dict[str, Any] = {}
    if mode == "RGB":  # one color is declared transparent
        image, options = Image.new("RGB", (4, 4), (9, 9, 9)), {"transparency": (9, 9, 9)}
    elif mode == "I;16":
        gray = np.full((4, 4), 3000, dtype=np.uint16)
        image, options = Image.fromarray(gray), {"transparency": 3000}
    elif mode == "P":
        image, options = Image.new("P", (4, 4), 3), {"transparency": 3}
        image.putpalette([level for level in range(256) for _ in "rgb"])
    else:
        image = Image.new("RGBA", (4, 4), (200, 10, 10, 0)).convert(mode)
    image.save(tmp_path / "a.png", **options)
    assert read_rgb(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)
    assert read_mask(tmp_path / "a.png", alpha=True).getpixel((1, 1)) == 0
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        red = np.asarray(read_rgb(tmp_path / name))[..., 0]
        assert red.tolist() == [[0, 100], [200, 255]]


def test_an_image_is_decoded_once_while_there_is_room(tmp_path):
    picture(96, 64).save(tmp_path / "odd.png")
    images = open_images(str(tmp_path))

    def is_cached(room):
        cache = ResizedImages(room)
        first, second = (cache.get(images, 0, (64, 64), "lanczos")[0] for _ in range(2))
        assert torch.equal(first, second)
        return second is first

    size = 96 * 64 * 3
    assert [is_cached(room) for room in (0, size - 1, size)] == [False, False, True]
