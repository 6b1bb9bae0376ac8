"""Inputs and losses of a micro-batch, by options of the image script."""

import pytest
import torch

from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.stream import TrainingStream
from bilora_diffusion.image.task import DreamBooth
from tests.scripts.runs import flags


@pytest.fixture(scope="module")
def make_task():
    """A function that makes the task of some flags, on the miniature and its icons."""
    pipeline = load_pipeline("mini", dtype=torch.float32)
    images = open_images("mini", caption_column="prompt")

    def make(**options):
        cfg = resolve(flags("run", **options))
        task = DreamBooth(cfg, pipeline, TrainingStream(cfg, images))
        task.to_device(torch.device("cpu"))
        return task

    return make


def micro_batch(task, step=0):
    (batch,) = task.micro_batches([(step, (0, 1))], 2)
    return batch


def test_offset_noise_adds_a_number_to_each_channel_and_changes_nothing_else(make_task):
    plain, shifted = (micro_batch(make_task(noise_offset=offset)).inputs for offset in (0, 0.1))
    offsets = (shifted["noise"] - plain["noise"]) / 0.1  # (n, c, h, w)
    numbers = offsets.mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(offsets, numbers.expand_as(offsets), atol=1e-5)
    assert len(numbers.unique()) == numbers.numel()
    assert 0.5 < numbers.std() < 2
    for name in ("latents", "index"):
        assert torch.equal(plain[name], shifted[name])
