"""Guidance with the base model's unconditional prediction, against loops written out by hand."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft.helpers import rescale_adapter_scale

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image import sampling
from bilora_diffusion.image.families import SDXL, family_of
from bilora_diffusion.image.families.base import pack, unpack
from bilora_diffusion.image.pipeline import load_pipeline, select_layers
from bilora_diffusion.image.sampling import bare_sampler, decode, embed, embed_negative, generate
from tests.export.export_models import add_adapters
from tests.image.test_flow_families import noise_of
from tests.image.tiny import FILES, make_pipeline

SIDE, STEPS, GUIDANCE = 64, 2, 3.0
PROMPTS, SEEDS = ["a TOK icon of a rabbit", "an icon"], [3, 4]
ONE_PREDICTION = "FluxPipeline"
GUIDED = [kind for kind in FILES if kind != ONE_PREDICTION]


def adapted(kind, spec=None, layers="all-linear") -> Any:
    """A pipeline with two random adapters on its denoiser, of which the primary acts."""
    pipeline = load_pipeline("mini", dtype=torch.float32) if kind == SDXL else make_pipeline(kind)
    model = family_of(pipeline).model(pipeline)
    targets = select_layers([layers], family_of(pipeline), model)
    add_adapters(model, spec or AdapterSpec(rank=2, alpha=1, target_modules=targets))
    scale_factors(model, 0.3)
    adapters.activate(model, [PRIMARY])
    return pipeline


def scale_factors(model, scale):
    with torch.no_grad():
        for parameter in adapters.parameters(model, PRIMARY):
            parameter.mul_(scale)


@pytest.fixture(scope="module")
def sdxl():
    return adapted(SDXL, layers="all")


def images_of(pipeline, source, **options):
    settings = {"size": SIDE, "steps": STEPS, "guidance_scale": GUIDANCE, **options}
    return generate(pipeline, PROMPTS, SEEDS, guidance_from=source, **settings)


def difference(images, expected_images):
    """The largest difference of two lists of images, in steps of 255."""
    pixels: list[Any] = []
    for part in (images, expected_images):
        pixels.append(np.stack([np.asarray(image) for image in part]).astype(int))
    return np.abs(pixels[0] - pixels[1]).max()


@torch.no_grad()
def by_hand(pipeline, negatives=()):
    """Images whose unconditional predictions are made with the adapters disabled."""
    family, sampler = family_of(pipeline), bare_sampler(family_of(pipeline), pipeline)
    model, scheduler = family.model(pipeline), sampler.scheduler
    layers = [layer for _, layer in adapters.layers(model)]
    conditional = embed(pipeline, PROMPTS)
    unconditional = embed_negative(pipeline, len(PROMPTS), negatives)
    # One call fills in the scheduler's noise levels; its images are not used.
    sampler(
        **family.sampling(conditional, unconditional, 0.0),
        **{"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "latent"},
    )
    x = noise_of(pipeline, SEEDS)
    time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(PROMPTS)).float()

    def predict(noisy, level, conditions):
        if kind_of(pipeline) == SDXL:
            conditions = {**conditions, "time_ids": time_ids}
        return family.predict(model, noisy, level, conditions)

    def guided(noisy, level):
        c = predict(noisy, level, conditional)
        for layer in layers:
            layer.enable_adapters(False)
        u = predict(noisy, level, unconditional)
        for layer in layers:
            layer.enable_adapters(True)
        prediction = u + (GUIDANCE + 1 - family.unguided) * (c - u)
        if kind_of(pipeline) == "QwenImagePipeline":  # each token keeps the norm of c
            tokens, norms = pack(prediction), pack(c).norm(dim=-1, keepdim=True)
            tokens = tokens * norms / tokens.norm(dim=-1, keepdim=True)
            prediction = unpack(tokens, *x.shape[2:])
        elif kind_of(pipeline) == "Lumina2Pipeline":  # each row of latents does
            norms = c.norm(dim=-1, keepdim=True)
            prediction = prediction * norms / prediction.norm(dim=-1, keepdim=True)
        return prediction

    if kind_of(pipeline) == SDXL:
        x = x * scheduler.init_noise_sigma
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            prediction = guided(scheduler.scale_model_input(x, t), t.expand(len(x)))
            x = scheduler.step(prediction, t, x, return_dict=False)[0]
    else:
        for level, following in pairwise(scheduler.sigmas):
            x = x + (following - level) * guided(x, level.expand(len(x)))
    return decode(pipeline, x, PROMPTS)


def kind_of(pipeline):
    return type(pipeline).__name__


@pytest.mark.parametrize("kind", [SDXL, *GUIDED])
def test_images_are_those_of_a_loop_with_the_adapters_off_in_the_unconditional_half(kind, request):
    pipeline = request.getfixturevalue("sdxl") if kind == SDXL else adapted(kind)
    images = images_of(pipeline, "base")
    assert difference(images, by_hand(pipeline)) <= 1
    assert difference(images, images_of(pipeline, "adapter")) > 4


def test_without_it_an_image_is_that_of_diffusers_pipeline_to_the_bit(sdxl):
    """One image, since `decode` takes images one by one and the pipeline all at once."""
    sdxl.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS}
    generator = torch.Generator().manual_seed(SEEDS[0])
    expected = sdxl(PROMPTS[0], generator=generator, height=SIDE, width=SIDE, **settings).images
    images = generate(sdxl, PROMPTS[:1], SEEDS[:1], size=SIDE, steps=STEPS, guidance_scale=GUIDANCE)
    assert difference(images, expected) == 0


def test_one_call_of_both_halves_equals_two_calls(sdxl, monkeypatch):
    images = images_of(sdxl, "base")
    monkeypatch.setattr(sampling, "_is_plain", lambda _: False)
    assert difference(images, images_of(sdxl, "base")) <= 1


def test_dora_makes_two_calls():
    pipeline = adapted(SDXL, AdapterSpec(rank=2, use_dora=True, target_modules=("to_q", "to_v")))
    rows = []
    pipeline.unet.conv_in.register_forward_hook(lambda *inputs: rows.append(len(inputs[2])))
    images = images_of(pipeline, "base")
    assert rows == [2] * 2 * STEPS  # of 2 images
    assert difference(images, by_hand(pipeline)) <= 1


def test_strength_acts_on_the_conditional_half_and_0_is_the_base_model(sdxl):
    layers = [layer for _, layer in adapters.layers(sdxl.unet)]
    with adapters.off(layers):
        base = [image.tobytes() for image in images_of(sdxl, "adapter")]
        assert [image.tobytes() for image in images_of(sdxl, "base")] == base
    with rescale_adapter_scale(sdxl.unet, 0.0):
        for source in ("adapter", "base"):
            assert [image.tobytes() for image in images_of(sdxl, source)] == base
    full = images_of(sdxl, "base")
    with rescale_adapter_scale(sdxl.unet, 0.5):
        half = images_of(sdxl, "base")
        assert difference(half, by_hand(sdxl)) <= 1
    assert difference(half, full) > 4


@pytest.mark.parametrize("kind", [SDXL, "QwenImagePipeline", "ZImagePipeline"])
def test_an_error_leaves_nothing_behind(kind, request):
    pipeline = request.getfixturevalue("sdxl") if kind == SDXL else adapted(kind)
    model = family_of(pipeline).model(pipeline)
    before = images_of(pipeline, "adapter")

    def stop(_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        images_of(pipeline, "base", on_step=stop)
    assert "forward" not in vars(model)
    for _, layer in adapters.layers(model):
        assert not layer.disable_adapters
        assert not layer.lora_A[PRIMARY]._forward_hooks
    assert difference(images_of(pipeline, "adapter"), before) == 0


def test_the_negative_prompt_is_embedded_without_the_encoders_adapters():
    pipeline = load_pipeline("mini", dtype=torch.float32)
    base = embed_negative(pipeline, 1, ["blurry"])
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        add_adapters(encoder, AdapterSpec(rank=2, target_modules=("q_proj", "v_proj")))
    for name, values in base.items():
        by_base = embed_negative(pipeline, 1, ["blurry"], guidance_from="base")[name]
        assert torch.equal(by_base, values)
        assert not torch.equal(embed_negative(pipeline, 1, ["blurry"])[name], values)


def test_a_model_without_an_unconditional_prediction_is_refused(sdxl):
    with pytest.raises(UserError, match=r"guidance of 1: give a guidance above 1, or drop it"):
        images_of(sdxl, "base", guidance_scale=1.0)
    with pytest.raises(UserError, match=r"FLUX.1 .* guidance of 3: drop it"):
        images_of(make_pipeline("FluxPipeline"), "base")
    klein = make_pipeline("Flux2KleinPipeline")
    klein.register_to_config(is_distilled=True)
    with pytest.raises(UserError, match=r"guidance of 3: drop it"):
        images_of(klein, "base")
