"""The contact sheet of training images: its crops, its limit, and that it stays local."""

import numpy as np
import pytest
from PIL import Image

from bilora_diffusion.image import contact_sheet
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.script import training_images
from bilora_diffusion.image.stream import INSTANCE, TrainingStream
from bilora_diffusion.run.hub import NOT_UPLOADED
from bilora_diffusion.run.record import CONTACT_SHEET
from tests.image.image_folders import save

COLORS = (40, 120, 200)


@pytest.fixture
def stream(tmp_path):
    folder = tmp_path / "photos"
    for number, color in enumerate(COLORS):
        save(folder / f"{number}.png", color, (90, 64))
    words = f"--dataset {folder} --pretrained_model_name_or_path mini --resolution 64"
    cfg = resolve([*words.split(), "--instance_prompt=a TOK", "--report_to=none"])
    return TrainingStream(cfg, training_images(cfg))


@pytest.mark.parametrize("step_size", [1, 2])
def test_each_image_has_the_crop_of_its_first_use(stream, step_size):
    samples = contact_sheet.first_samples(stream, step_size)
    assert [sample.index for sample in samples] == [0, 1, 2]
    first_uses = {}
    for position in range(len(COLORS)):
        step, slot = divmod(position, step_size)
        sample = stream.sample(step, slot, step_size, INSTANCE)
        first_uses.setdefault(sample.index, sample.crop)
    assert [sample.crop for sample in samples] == [first_uses[index] for index in range(3)]


def test_the_sheet_shows_every_image_up_to_its_limit(stream, tmp_path, monkeypatch):
    path = tmp_path / CONTACT_SHEET
    contact_sheet.write_contact_sheet(stream, path, 2)
    sheet = np.asarray(Image.open(path))
    reds = sheet[contact_sheet.MARGIN + 5, :, 0]
    assert [color in reds for color in COLORS] == [True, True, True]
    monkeypatch.setattr(contact_sheet, "MAX_IMAGES", 2)
    contact_sheet.write_contact_sheet(stream, path, 2)
    assert COLORS[2] not in np.asarray(Image.open(path))[contact_sheet.MARGIN + 5, :, 0]


def test_the_sheet_is_not_uploaded():
    assert CONTACT_SHEET in NOT_UPLOADED
