"""Prompt embeddings and sampled images, compared with diffusers' pipeline."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from bilora_diffusion.core.errors import TrainingError
from bilora_diffusion.image import script
from bilora_diffusion.image.captions import PromptCache
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.disk_cache import DiskCache
from bilora_diffusion.image.families.lumina2 import Lumina2
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.image.latents import Encoder, LatentSpace
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import embed, embed_negative, generate
from bilora_diffusion.image.script import class_images, missing_class_images
from bilora_diffusion.image.stream import TrainingStream
from bilora_diffusion.image.task import DreamBooth
from tests.image.image_folders import difference
from tests.scripts.runs import flags

PROMPTS = ["a TOK icon of a rabbit, in the style of TOK", ""]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("mini", dtype=torch.float32)


def test_embeddings_equal_those_of_the_pipeline(pipeline):
    sequence, negative_sequence, pooled, negative_pooled = pipeline.encode_prompt(
        PROMPTS, do_classifier_free_guidance=True
    )
    expected = {"sequence": sequence, "pooled": pooled}
    torch.testing.assert_close(embed(pipeline, PROMPTS), expected, rtol=0, atol=0)
    # The cache embeds each prompt on its own.
    cached = PromptCache(pipeline, torch.device("cpu")).embed(PROMPTS)
    torch.testing.assert_close(cached, expected)
    negative = {"sequence": negative_sequence, "pooled": negative_pooled}
    torch.testing.assert_close(embed_negative(pipeline, 2), negative, rtol=0, atol=0)


@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_caption_gets_the_unconditional_embedding(zeros, tmp_path):
    pipeline = load_pipeline("mini", dtype=torch.float32)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    images = open_images("mini", caption_column="prompt")
    inputs: dict[str, Any] = {
        "latents": torch.randn(2, 8, 8, 8),
        "noise": torch.randn(2, 8, 8, 8),
        "level_index": torch.tensor([300, 300]),
        "is_instance": torch.ones(2, dtype=torch.bool),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    }

    def task_of(trains_encoders):
        options = {"train_text_encoder": trains_encoders, "caption_dropout": 0.5}
        cfg = resolve(flags(tmp_path, **options))
        return DreamBooth(cfg, pipeline, TrainingStream(cfg, images))

    @torch.no_grad()
    def losses_of(task):
        return task.module.sample_losses(inputs | task.condition(PROMPTS))

    task = task_of(trains_encoders=None)
    task.embed(torch.device("cpu"))
    conditions, negative = task.condition(PROMPTS), embed_negative(pipeline, 1)
    # diffusers' SDXL replaces an empty negative prompt with zeros if its configuration says so.
    assert (negative["pooled"] == 0).all() == zeros
    for name, values in negative.items():
        torch.testing.assert_close(conditions[name][1], values[0])
        assert (conditions[name][0] != 0).any()
    torch.testing.assert_close(losses_of(task_of(trains_encoders=True)), losses_of(task))


def test_an_image_does_not_depend_on_its_batch(pipeline):
    prompts = [PROMPTS[0]] * 3
    global_state = torch.get_rng_state()
    batched = generate(pipeline, prompts, [1, 2, 3], size=64, steps=2, batch=3)
    single = generate(pipeline, prompts, [1, 2, 3], size=64, steps=2, batch=1)
    assert difference(batched, single) <= 1
    assert torch.equal(global_state, torch.get_rng_state())


@pytest.fixture
def batch_sizes(pipeline):
    """Return a list that collects the batch size of each UNet call, two rows for each image."""
    sizes = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    yield sizes
    hook.remove()


@pytest.mark.parametrize("size", [1, 9])  # 9 is more than `generate`'s default
def test_sample_batch_size_is_the_number_of_images_sampled_at_a_time(
    size, pipeline, batch_sizes, tmp_path, monkeypatch
):
    """This holds for validation images and class images."""
    monkeypatch.setattr(type(pipeline), "to", lambda self, _: self)
    monkeypatch.setattr(script, "load_base", lambda *_: pipeline)
    monkeypatch.setattr(StableDiffusionXL, "usual_sampling", lambda *_: (1, 5.0))
    prompts = {"validation_prompt": "an icon", "num_validation_images": 9}
    cfg = resolve(flags(tmp_path, **prompts, sample_batch_size=size))
    images = open_images("mini", caption_column="prompt")
    task = DreamBooth(cfg, pipeline, TrainingStream(cfg, images))
    task.embed(torch.device("cpu"))
    task.sample_images(cfg.samples)
    assert set(batch_sizes) == {2 * size}

    batch_sizes.clear()
    classes = {"class_prompt": "an icon", "class_data_dir": tmp_path / "class"}
    prior = {**classes, "with_prior_preservation": True, "num_class_images": 9}
    cfg = resolve(flags(tmp_path, **prior, sample_batch_size=size))
    assert len(class_images(cfg, Accelerator())) == 9
    assert set(batch_sizes) == {2 * size}


@pytest.mark.slow
def test_an_out_of_memory_error_names_the_image_and_the_options_that_help(pipeline, tmp_path):
    def fill_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    images = open_images("mini", caption_column="prompt")

    def error_of(module, **options):
        prompts = {"validation_prompt": "an icon", "num_validation_images": 2}
        cfg = resolve(flags(tmp_path, **prompts, **options))
        task = DreamBooth(cfg, pipeline, TrainingStream(cfg, images))
        task.embed(torch.device("cpu"))
        hook = module.register_forward_pre_hook(fill_memory)
        try:
            with pytest.raises(TrainingError) as caught:
                task.sample_images(cfg.samples)
        finally:
            hook.remove()
        # The frames of a traceback would keep the memory in use.
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert caught.value.__cause__.__traceback__ is None
        return str(caught.value)

    sentence = error_of(pipeline.unet)
    assert "'an icon' with seed 0 together with 1 other image" in sentence
    assert "--sample_batch_size (now 4)" in sentence
    assert "--offload" in sentence
    sentence = error_of(pipeline.unet, sample_batch_size=1, offload=True)
    assert "--sample_batch_size" not in sentence
    assert "--offload" not in sentence
    # Images are decoded one at a time.
    assert "decoding 'an icon' with seed 0 needs" in error_of(pipeline.vae.post_quant_conv)


def test_latents_that_are_not_finite_are_refused_with_the_images_name(pipeline, tmp_path):
    space, device = LatentSpace.from_config(pipeline.vae), torch.device("cpu")
    infinite = torch.full((3, 64, 64), torch.inf)
    sample: Any = SimpleNamespace(name="a.png", content=("a",), read=lambda: (infinite, None))
    with pytest.raises(TrainingError, match=r"'a.png' is not finite"):
        Encoder(pipeline.vae, space, device)([sample])
    disk = DiskCache(tmp_path)
    disk.put({"mean": torch.full((4, 8, 8), torch.nan), "std": torch.ones(4, 8, 8)}, "a")
    with pytest.raises(TrainingError, match=r"'a.png' is not finite.*--disk_cache"):
        Encoder(pipeline.vae, space, device, lambda _: True, disk)([sample])


def test_a_sampled_image_that_is_not_finite_is_refused_with_its_prompt(pipeline):
    hook = pipeline.unet.conv_out.register_forward_hook(
        lambda module, inputs, output: output * torch.inf
    )
    with pytest.raises(TrainingError, match=r"'an icon' with seed 5 is not finite.*learning rate"):
        generate(pipeline, ["an icon"], [5], size=64, steps=1)
    hook.remove()


@pytest.mark.parametrize(
    ("family", "has_bf16", "precision"),
    [
        (StableDiffusionXL, True, torch.float16),
        (StableDiffusionXL, False, torch.float16),
        (Lumina2, True, torch.bfloat16),
        (Lumina2, False, torch.float32),
    ],
)
def test_a_flow_model_does_not_sample_in_fp16(family, has_bf16, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert family().precision(torch.device("cuda")) == precision
    assert family().precision(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("names", "count", "missing"),
    [
        ("", 3, [0, 1, 2]),
        ("0-0123456789ab.png 1-0123456789ab.png", 4, [2, 3]),
        # Two processes were interrupted, one of them ahead of the other.
        ("0-0123456789ab.png 1-0123456789ab.png 3-0123456789ab.png", 5, [2, 4]),
        ("mine.jpg my-2.png", 3, [2]),
        ("0-0123456789ab.png mine.jpg", 1, []),
    ],
)
def test_missing_class_images_get_the_unused_numbers(names, count, missing):
    assert missing_class_images([Path(name) for name in names.split()], count) == missing
