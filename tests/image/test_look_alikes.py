"""Images that look alike: changed copies are found, and different images are not reported."""

import io
import logging
import shutil
from typing import Any

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image

from bilora_diffusion.image import sets
from bilora_diffusion.image.look_alikes import describe_pairs, find_look_alikes, look_of
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.script import warn_of_copies
from bilora_diffusion.mini import FOLDERS, HELDOUT_SUFFIX
from tests.eval.clip_models import pictures


@pytest.fixture(scope="module")
def photographs():
    portrait: Any = get_sample_data("grace_hopper.jpg")
    with portrait as file:
        images = [Image.open(file).convert("RGB")]
    for name in ("china.jpg", "flower.jpg"):
        images.append(Image.fromarray(load_sample_image(name)))
    return images


def compressed(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file).convert("RGB")


def cropped(image):
    """Crop 2 % off each side."""
    width, height = image.size
    return image.crop((width // 50, height // 50, width - width // 50, height - height // 50))


CHANGES = {
    "compressed": compressed,
    "halved": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    "cropped": cropped,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_other_photographs_are_not(change, photographs):
    looks = [look_of(image) for image in photographs]
    assert find_look_alikes(looks) == []
    copies = [look_of(CHANGES[change](image)) for image in photographs]
    pairs = find_look_alikes(looks, copies)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 0), (1, 1), (2, 2)]


# The duotone sets are left out: without colors, two of the 64 held-out animals look alike.
PLAIN_SETS = [name for name in FOLDERS if not name.startswith("mini-animals-duotone")]


@pytest.mark.parametrize("name", PLAIN_SETS)
def test_no_icons_of_the_miniature_look_alike(name):
    looks = open_images(name).looks()
    assert find_look_alikes(looks) == []
    if not name.endswith(HELDOUT_SUFFIX):
        assert find_look_alikes(looks, open_images(name + HELDOUT_SUFFIX).looks()) == []


def test_each_image_is_paired_with_the_first_one_that_it_resembles():
    image, other_image = pictures(2, 64)
    looks = [look_of(other_image), *[look_of(image)] * 3]
    pairs = find_look_alikes(looks)
    assert [(pair.first, pair.second, pair.distance) for pair in pairs] == [(1, 2, 0), (1, 3, 0)]
    names = ["a", "b", "c", "d"]
    assert describe_pairs(pairs, names)[0] == "b and c look alike (distance 0 of 64)"
    assert find_look_alikes([]) == []
    many_looks = [look_of(image)] * 20
    assert len(describe_pairs(find_look_alikes(many_looks), [str(i) for i in range(20)])) == 6


def test_plain_gray_images_look_alike_and_a_plain_red_one_does_not():
    gray, dark_gray, red = (
        look_of(Image.new("RGB", (9, 9), color)) for color in ("gray", "#222", "red")
    )
    assert len(find_look_alikes([gray, dark_gray])) == 1
    assert find_look_alikes([gray, red]) == []


def test_training_reports_look_alikes_among_training_and_held_out_images(
    tmp_path, caplog, monkeypatch
):
    for name in ("train", "heldout"):
        (tmp_path / name).mkdir()
    image, other_image, third_image = pictures(3, 64)
    image.save(tmp_path / "train" / "a.png")
    image.resize((50, 50)).save(tmp_path / "train" / "b.jpg")
    other_image.save(tmp_path / "train" / "c.png")
    other_image.save(tmp_path / "heldout" / "d.jpg")
    third_image.save(tmp_path / "heldout" / "e.png")
    shutil.copy(tmp_path / "train" / "a.png", tmp_path / "heldout" / "f.png")
    training, heldout = (open_images(str(tmp_path / name)) for name in ("train", "heldout"))
    with caplog.at_level(logging.WARNING):
        warn_of_copies(training, heldout)
    alike, copies, held_out = [record.getMessage() for record in caplog.records]
    assert alike.startswith("a.png and b.jpg look alike (distance ")
    assert "1 of the 3 held-out images are also trained on, such as f.png" in copies
    assert held_out.startswith("c.png and d.jpg look alike (distance ")
    assert "held-out loss is too low" in held_out

    # Large sets are not decoded, so nothing is compared.
    monkeypatch.setattr(sets, "FULL_CHECK_LIMIT", 1)
    caplog.clear()
    warn_of_copies(open_images(str(tmp_path / "train")), open_images(str(tmp_path / "heldout")))
    assert not caplog.records


def test_thousands_of_images_are_compared_quickly():
    """One call of numpy compares a hash with all others."""
    random = np.random.default_rng(0)
    look = look_of(pictures(1, 64)[0])
    hashes = random.integers(0, 2**63, 4000, dtype=np.uint64)
    looks = [type(look)(number, look.copy) for number in hashes]
    assert find_look_alikes(looks) == []
