"""Inputs and losses of a micro-batch, by options of the image script."""

import copy
from pathlib import Path

import pytest
import torch

from bilora_diffusion import adapters
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.loss import UNCONDITIONAL
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import embed_negative
from bilora_diffusion.image.stream import TrainingStream
from bilora_diffusion.image.task import DreamBooth
from tests.scripts.runs import flags


@pytest.fixture(scope="module")
def make_task():
    """A function that makes the task of some flags, on a copy of the miniature and its icons."""
    pipeline = load_pipeline("mini", dtype=torch.float32)
    images = open_images("mini", caption_column="prompt")

    def make(**options):
        cfg = resolve(flags(Path("run"), max_train_steps=16, **options))
        class_images = images if cfg.with_prior_preservation else None
        stream = TrainingStream(cfg, images, class_images)
        task = DreamBooth(cfg, copy.deepcopy(pipeline), stream)
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
    for name in ("latents", "level_index"):
        assert torch.equal(plain[name], shifted[name])


CLASS = {"class_prompt": "an icon", "class_data_dir": "class"}
HOLD_OPTIONS = {
    "alone": {},
    "class kept": {"prior_prediction_weight": 2, "class_prompt": "an icon"},
    "class images": {"with_prior_preservation": True, **CLASS},
    "encoders": {"train_text_encoder": True},
}


@pytest.mark.parametrize("options", HOLD_OPTIONS.values(), ids=HOLD_OPTIONS)
@torch.no_grad()
def test_every_16th_step_holds_what_guidance_leads_away_from(options, make_task):
    """The formula, on whole and on cut micro-batches."""
    task = make_task(hold_unconditional=4, **options)
    original = copy.deepcopy(task.pipeline)
    for target in task.targets():
        adapters.inject(target.model, target.spec)
        for number, factors in enumerate(adapters.factors(target.model, adapters.PRIMARY)):
            random = torch.Generator().manual_seed(number)
            torch.nn.init.normal_(factors.B, std=0.2, generator=random)
    for step in (0, 14, 16):
        assert UNCONDITIONAL not in micro_batch(task, step).inputs
    inputs = micro_batch(task, 15).inputs
    losses = task.module(inputs)
    plain_losses = task.module(
        {name: value for name, value in inputs.items() if name != UNCONDITIONAL}
    )

    noisy, timesteps = task.module.noise_schedule.add_noise(inputs)
    predictions = []
    for pipeline in (task.pipeline, original):
        negative = embed_negative(pipeline, 2)
        added = {"text_embeds": negative["pooled"], "time_ids": inputs["time_ids"][:2]}
        sequence = negative["sequence"]
        unet = pipeline.unet
        predictions.append(unet(noisy[:2], timesteps[:2], sequence, added_cond_kwargs=added).sample)
    departures = (predictions[0] - predictions[1]).square().mean(dim=(1, 2, 3))  # (slots,)
    assert (departures > 1e-4).all()
    torch.testing.assert_close(losses - plain_losses, 4 * departures, rtol=1e-3, atol=1e-5)

    cut = [task.module(batch.inputs) for batch in task.micro_batches([(15, (0,)), (15, (1,))], 2)]
    torch.testing.assert_close(torch.cat(cut), losses)
