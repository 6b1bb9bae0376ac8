"""Inputs and losses of a micro-batch for different options of the image script."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from bilora_diffusion import adapters
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.loss import GUIDANCE_SHARE, HELD_WEIGHTS, UNCONDITIONAL
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import embed, embed_negative
from bilora_diffusion.image.stream import TrainingStream
from bilora_diffusion.image.task import DreamBooth
from tests.scripts.runs import flags


@pytest.fixture(scope="module")
def make_task():
    """Return a function that builds a task from options, with a copy of the miniature."""
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
    plain = micro_batch(make_task(noise_offset=0)).inputs
    shifted = micro_batch(make_task(noise_offset=0.1)).inputs
    offsets = (shifted["noise"] - plain["noise"]) / 0.1  # (n, c, h, w)
    numbers = offsets.mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(offsets, numbers.expand_as(offsets), atol=1e-5)
    assert len(numbers.unique()) == numbers.numel()
    assert 0.5 < numbers.std() < 2  # the true deviation is 1, but there are few numbers
    assert torch.equal(plain["latents"], shifted["latents"])
    assert torch.equal(plain["level_index"], shifted["level_index"])


CLASS = {"class_prompt": "an icon", "class_data_dir": "class"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"prior_prediction_weight": 2, "class_prompt": "an icon"}, marks=pytest.mark.slow
        ),
        pytest.param({"with_prior_preservation": True, **CLASS}, marks=pytest.mark.slow),
        pytest.param({"train_text_encoder": True}, marks=pytest.mark.slow),
    ],
    ids=["alone", "class kept", "class images", "encoders"],
)
@torch.no_grad()
def test_every_16th_step_holds_the_unconditional_prediction(options, make_task):
    """The loss equals the formula, also with smaller micro-batches."""
    task = make_task(hold_unconditional=4, **options)
    original = copy.deepcopy(task.pipeline)
    for target in task.targets():
        adapters.inject(target.model, target.spec)
        for number, factors in enumerate(adapters.factors(target.model, adapters.PRIMARY)):
            random = torch.Generator().manual_seed(number)
            # B is not zero, so the adapters change the prediction.
            torch.nn.init.normal_(factors.B, std=0.2, generator=random)
    # Steps are counted from 0, so the 16th is step 15.
    for step in (0, 14, 16):
        assert UNCONDITIONAL not in micro_batch(task, step).inputs
    inputs = micro_batch(task, 15).inputs
    losses = task.module(inputs)
    noisy, timesteps = task.module.noise_schedule.add_noise(inputs)

    def predict_unconditionally(pipeline):
        """Return the unconditional prediction for the two instances; class images have none."""
        negative = embed_negative(pipeline, 2)
        added = {"text_embeds": negative["pooled"], "time_ids": inputs["time_ids"][:2]}
        sequence = negative["sequence"]
        return pipeline.unet(noisy[:2], timesteps[:2], sequence, added_cond_kwargs=added).sample

    changes = predict_unconditionally(task.pipeline) - predict_unconditionally(original)
    changes = changes.square().mean(dim=(1, 2, 3))  # (slots,)
    assert (changes > 1e-4).all()
    del inputs[HELD_WEIGHTS][UNCONDITIONAL]
    torch.testing.assert_close(losses - task.module(inputs), 4 * changes, rtol=1e-3, atol=1e-5)

    cut_losses = []
    for batch in task.micro_batches([(15, (0,)), (15, (1,))], 2):
        cut_losses.append(task.module(batch.inputs))
    torch.testing.assert_close(torch.cat(cut_losses), losses)


def predict(pipeline, inputs, embedded):
    """Call diffusers' UNet on the rows of a micro-batch, in float64."""
    alphas = pipeline.scheduler.alphas_cumprod.double()[inputs["level_index"]].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * inputs["latents"].double()
    noisy = noisy + (1 - alphas).sqrt() * inputs["noise"].double()
    time_ids = inputs["time_ids"].double()
    added = {"text_embeds": embedded["pooled"].double(), "time_ids": time_ids}
    sequence = embedded["sequence"].double()
    return pipeline.unet(noisy, inputs["level_index"], sequence, added_cond_kwargs=added).sample


GUIDED_RUNS: dict[str, tuple[dict[str, Any], tuple[bool, ...]]] = {
    "alone": ({}, (True, True)),
    "class images": ({"with_prior_preservation": True, **CLASS}, (True, True, False, False)),
    "encoders": ({"train_text_encoder": True}, (True, True)),
    "dropped caption": ({"caption_dropout": 0.5}, (False, True)),
    "held": ({"hold_unconditional": 4, "hold_unconditional_every": 1}, (True, True)),
    "checkpointing": ({"gradient_checkpointing": True, "method": "bilora", "rho": 3}, (True, True)),
}
"""Name -> options of a run, and which rows of a step have a guided target."""


@pytest.mark.parametrize(
    ("options", "guided_rows"),
    [
        pytest.param(*run, marks=() if name == "alone" else pytest.mark.slow, id=name)
        for name, run in GUIDED_RUNS.items()
    ],
)
def test_the_guided_target_reverses_guidance_from_the_base_model(options, guided_rows, make_task):
    """Loss and gradients equal a float64 reference.

    Class images and dropped captions keep the plain target. The base model's unconditional
    prediction uses no adapter in any of the models.
    """
    scale = 3
    task = make_task(guided_target=scale, random_flip=True, **options)
    original = copy.deepcopy(task.pipeline)
    names = (adapters.PRIMARY, adapters.AUXILIARY)[: 2 if "rho" in options else 1]
    for target in task.targets():
        for name in names:
            adapters.inject(target.model, target.spec, name)
            for number, factors in enumerate(adapters.factors(target.model, name)):
                random = torch.Generator().manual_seed(number)
                torch.nn.init.normal_(factors.B, std=0.2, generator=random)
        adapters.activate(target.model, names)
    for step in range(20):  # until the rows are as required
        ((_, samples),) = task.stream.batches([(step, (0, 1))], 2)
        captions = [sample.caption for sample in samples]
        if [caption != "" for caption in captions[:2]] == list(guided_rows[:2]):
            break
    inputs = micro_batch(task, step).inputs
    losses = task.module(inputs)
    losses.sum().backward()

    count = len(guided_rows)
    exact, exact_original = copy.deepcopy(task.pipeline), original
    for pipeline in (exact, exact_original):
        for part in ("unet", "text_encoder", "text_encoder_2"):
            getattr(pipeline, part).double()
    exact.unet.zero_grad()
    empty = embed_negative(exact_original, count)
    if "train_text_encoder" in options:
        captioned = embed(exact, captions)
    else:
        captioned = {name: inputs[name] for name in ("sequence", "pooled")}
    prediction = predict(exact, inputs, captioned)
    with torch.no_grad():
        unconditional = predict(exact_original, inputs, empty)
        # The plain target is that of u + (p - u) / S, so guidance of scale S would give p.
        share = (1 - 1 / scale) * torch.tensor(guided_rows).double().view(-1, 1, 1, 1)
        guided_target = inputs["noise"].double() + share * (prediction - unconditional)
    row_losses = (prediction - guided_target).square().mean(dim=(1, 2, 3))
    expected = row_losses[:2] + row_losses[2:] if count == 4 else row_losses  # with class images
    if UNCONDITIONAL in inputs.get(HELD_WEIGHTS, {}):
        change = predict(exact, inputs, empty) - unconditional
        expected = expected + 4 * change.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)
    expected.sum().backward()
    for name in names:
        parameters = adapters.parameters(task.pipeline.unet, name)
        exact_parameters = adapters.parameters(exact.unet, name)
        for parameter, exact_parameter in zip(parameters, exact_parameters, strict=True):
            gradient, exact_gradient = parameter.grad, exact_parameter.grad
            assert gradient is not None and exact_gradient is not None  # noqa: PT018
            error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
            assert error < 1e-3

    # Rows with the plain target have exactly the loss of a run without a guided target.
    if GUIDANCE_SHARE in inputs:
        del inputs[GUIDANCE_SHARE]
    is_plain = [not is_guided for is_guided in guided_rows[:2]]
    if any(is_plain):
        assert torch.equal(task.module(inputs)[is_plain], losses[is_plain])
    cut = [task.module(b.inputs) for b in task.micro_batches([(step, (0,)), (step, (1,))], 2)]
    torch.testing.assert_close(torch.cat(cut), losses)


@pytest.mark.slow
def test_processes_that_read_ahead_hand_over_only_pixels(make_task, monkeypatch):
    """The data are the same bit for bit, and no sample carries the image set and its hashes."""
    handed_over = []

    class RecordingLoader(DataLoader):
        def __iter__(self):
            for item in super().__iter__():
                handed_over.append(len(pickle.dumps(item)))
                yield item

    monkeypatch.setattr("bilora_diffusion.image.stream.DataLoader", RecordingLoader)
    schedule = [(step, (0, 1)) for step in range(4)]
    shared = {"cache_latents": "no", "random_flip": True, "with_prior_preservation": True, **CLASS}
    batches = list(make_task(**shared).micro_batches(schedule, 2))
    handed_over.clear()
    batches_read_ahead = make_task(**shared, dataloader_num_workers=2).micro_batches(schedule, 2)
    for batch, read_ahead in zip(batches, batches_read_ahead, strict=True):
        assert (read_ahead.names, read_ahead.digests) == (batch.names, batch.digests)
        for name, values in batch.inputs.items():
            torch.testing.assert_close(read_ahead.inputs[name], values, rtol=0, atol=0)
    num_pixel_bytes = 4 * 4 * 3 * 64 * 64  # float32; two images and two class images
    assert num_pixel_bytes < max(handed_over) < num_pixel_bytes + 4000
