"""Files of all kinds become upright RGB on white; crops, flips and sizes equal torchvision's."""

from collections import Counter

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
from bilora_diffusion.image.image_files import read_mask, read_rgb, to_rgb, upright_size
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
    # torchvision scales the shorter side and rounds the longer one down.
    by_torchvision = transforms.Resize(side)(Image.new("L", (width, height)))
    assert (high, wide) == (by_torchvision.height, by_torchvision.width)
    draws = generator("test", key)
    crop = sample_crop(
        (height, width), (side, side), center_crop=center, random_flip=flip, generator=draws
    )
    assert 0 <= crop.top <= high - side
    assert 0 <= crop.left <= wide - side
    assert flip or not crop.flipped


def test_random_crops_reach_every_position_and_half_of_them_are_flipped():
    options = {"center_crop": False, "random_flip": True}
    counts: Counter[int | str] = Counter()
    for key in range(2000):
        crop = sample_crop((8, 11), (8, 8), generator=generator(key), **options)
        counts[crop.left] += 1
        counts["flipped"] += crop.flipped
    # Four positions from 0 to 3; 0.05 is five standard deviations.
    expected = pytest.approx({0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25, "flipped": 0.5}, abs=0.05)
    assert {key: count / 2000 for key, count in counts.items()} == expected


def test_center_crop_and_random_flip_do_not_change_other_random_draws():
    def crop_and_next_number(center_crop, random_flip):
        draws = generator("same")
        crop = sample_crop(
            (40, 90), (16, 16), center_crop=center_crop, random_flip=random_flip, generator=draws
        )
        return crop, float(torch.rand(1, generator=draws))

    crop, number = crop_and_next_number(center_crop=False, random_flip=True)
    unflipped, number_without_flip = crop_and_next_number(center_crop=False, random_flip=False)
    centered, number_when_centered = crop_and_next_number(center_crop=True, random_flip=True)
    assert (crop.top, crop.left) == (unflipped.top, unflipped.left)
    assert crop.flipped == centered.flipped
    assert number == number_without_flip == number_when_centered


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (41, 67), (16, 16), (7, 5)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_center_crop_equals_torchvisions(size, interpolation):
    crop = sample_crop(size, (16, 16), center_crop=True, random_flip=False, generator=generator(0))
    mode = InterpolationMode(interpolation.replace("_", "-"))
    reference = transforms.Compose(
        [transforms.Resize(16, mode), transforms.CenterCrop(16), transforms.ToTensor()]
    )
    image = picture(*size)
    pixels = cut(resize(image, (16, 16), interpolation), crop, (16, 16))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, reference(image), rtol=0, atol=1e-6)


def test_a_flipped_crop_is_cut_from_the_mirrored_image():
    image = picture(16, 40)  # already as high as the crop
    mirrored = transforms.ToTensor()(image).flip(-1)
    pixels = cut(resize(image, (16, 16), "lanczos"), Crop(0, 3, flipped=True), (16, 16))
    torch.testing.assert_close(pixels, mirrored[:, :, 3:19], rtol=0, atol=1e-6)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (12, 8), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    images = open_images(str(tmp_path))
    assert images.entries[0].size == (12, 8)
    turned = images.image(0)
    assert turned.size == (8, 12)
    # The top left corner is now the top right one.
    assert turned.getpixel((7, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_the_size_from_the_header_is_that_of_the_upright_image(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a{suffix}"
    Image.new("RGB", (12, 8)).save(file, exif=exif)
    image = read_rgb(file)
    assert upright_size(file) == (image.height, image.width)


def palette_image():
    image = Image.new("P", (4, 4), 3)
    image.putpalette(bytes(range(256)) * 3)
    return image


TRANSPARENT = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
GRAY_16_BIT = Image.fromarray(np.full((4, 4), 3000, dtype=np.uint16))


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        (TRANSPARENT, None),
        (TRANSPARENT.convert("LA"), None),
        # These declare one color transparent.
        (palette_image(), 3),
        (Image.new("RGB", (4, 4), (9, 9, 9)), (9, 9, 9)),
        (GRAY_16_BIT, 3000),
    ],
    ids=["RGBA", "LA", "P", "RGB", "I;16"],
)
def test_transparent_pixels_become_white(image, transparency, tmp_path):
    image.save(tmp_path / "a.png", transparency=transparency)
    assert read_rgb(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)
    assert read_mask(tmp_path / "a.png", alpha=True).getpixel((1, 1)) == 0


def test_a_half_transparent_pixel_is_blended_with_white():
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)


def test_16_bit_images_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        red = np.asarray(read_rgb(tmp_path / name))[..., 0]
        # 257 is 65535 / 255.
        assert red.tolist() == [[0, 100], [200, 255]]


SIZE = 96 * 64 * 3
"""Bytes of a decoded image."""


@pytest.mark.parametrize(("max_bytes", "is_cached"), [(0, False), (SIZE - 1, False), (SIZE, True)])
def test_an_image_is_decoded_only_once_if_it_fits_in_the_cache(max_bytes, is_cached, tmp_path):
    picture(96, 64).save(tmp_path / "odd.png")
    images = open_images(str(tmp_path))
    cache = ResizedImages(max_bytes)
    first_pixels, _ = cache.get(images, 0, (64, 64), "lanczos")
    pixels, _ = cache.get(images, 0, (64, 64), "lanczos")
    assert torch.equal(first_pixels, pixels)
    assert (pixels is first_pixels) == is_cached
