"""Guidance from the base model or a weaker adapter, compared with explicit sampling loops."""

from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft.helpers import rescale_adapter_scale

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.families import FAMILIES, SDXL, family_class, family_of
from bilora_diffusion.image.families.base import Unconditional
from bilora_diffusion.image.families.tensors import pack, unpack
from bilora_diffusion.image.pipeline import load_pipeline, select_layers
from bilora_diffusion.image.sampling import bare_sampler, decode, embed, embed_negative, generate
from tests.export.export_models import add_adapters
from tests.image.image_folders import difference
from tests.image.test_flow_families import noise_of
from tests.image.tiny import make_pipeline

SIDE = 64
STEPS = 2
GUIDANCE = 3.0
PROMPTS = ["a TOK icon of a rabbit", "an icon"]
SEEDS = [3, 4]
GUIDED_KINDS = [
    kind for kind in FAMILIES if family_class(kind, kind).unconditional is not Unconditional.NONE
]


def adapted_pipeline(kind, spec=None, layers="all-linear") -> Any:
    """Return a pipeline with two random adapters on its denoiser; only the primary is active."""
    pipeline = load_pipeline("mini", dtype=torch.float32) if kind == SDXL else make_pipeline(kind)
    model = family_of(pipeline).model(pipeline)
    targets = select_layers([layers], family_of(pipeline), model)
    add_adapters(model, spec or AdapterSpec(rank=2, alpha=1, target_modules=targets))
    for parameter in adapters.parameters(model, PRIMARY):
        parameter.data.mul_(0.3)
    adapters.activate(model, [PRIMARY])
    return pipeline


@pytest.fixture(scope="module")
def sdxl():
    return adapted_pipeline(SDXL, layers="all")


@pytest.fixture
def pipeline(request, kind):
    """Return an adapted pipeline of this kind."""
    return request.getfixturevalue("sdxl") if kind == SDXL else adapted_pipeline(kind)


def images_of(pipeline, source, **options):
    settings = {"size": SIDE, "steps": STEPS, "guidance_scale": GUIDANCE, **options}
    return generate(pipeline, PROMPTS, SEEDS, guidance_from=source, **settings)


def adapted_encoders(pipeline):
    """Return the text encoders of a pipeline that have adapters."""
    encoders = [getattr(pipeline, name, None) for name in family_of(pipeline).encoders]
    return [encoder for encoder in encoders if encoder is not None and adapters.layers(encoder)]


def with_norms_of(values, reference):
    """Rescale the values to the norms of the reference along the last axis."""
    return values * reference.norm(dim=-1, keepdim=True) / values.norm(dim=-1, keepdim=True)


@torch.no_grad()
def sample_by_hand(pipeline, strength=0.0):
    """Sample images; PEFT turns off or rescales the adapters in the unconditional predictions."""
    family = family_of(pipeline)
    kind = type(pipeline).__name__
    model = family.model(pipeline)
    sampler = bare_sampler(family, pipeline)
    scheduler = sampler.scheduler
    conditional = embed(pipeline, PROMPTS)
    with ExitStack() as stack:
        for encoder in adapted_encoders(pipeline):
            stack.enter_context(rescale_adapter_scale(encoder, strength))
        unconditional = embed_negative(pipeline, len(PROMPTS))
    # This call sets the scheduler's noise levels; its output is not used.
    sampler(
        **family.sampling(conditional, unconditional, 0.0),
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        output_type="latent",
    )
    if kind == SDXL:
        time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(PROMPTS)).float()
        conditional["time_ids"] = unconditional["time_ids"] = time_ids

    def predict(noisy, level):
        c = family.predict(model, noisy, level, conditional)
        # These are PEFT's own switch and scale, independent of the code under test.
        if strength == 0:
            for _, layer in adapters.layers(model):
                layer.enable_adapters(False)
            u = family.predict(model, noisy, level, unconditional)
            for _, layer in adapters.layers(model):
                layer.enable_adapters(True)
        else:
            with rescale_adapter_scale(model, strength):
                u = family.predict(model, noisy, level, unconditional)
        prediction = u + (GUIDANCE + 1 - family.unguided_scale) * (c - u)
        if kind == "QwenImagePipeline":  # each token keeps the norm of c
            tokens = with_norms_of(pack(prediction), pack(c))
            return unpack(tokens, *noisy.shape[2:])
        if kind == "Lumina2Pipeline":  # each row of latents keeps the norm of c
            return with_norms_of(prediction, c)
        return prediction

    x = noise_of(pipeline, SEEDS)
    if kind == SDXL:
        x = x * scheduler.init_noise_sigma
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            prediction = predict(scheduler.scale_model_input(x, t), t.expand(len(x)))
            x = scheduler.step(prediction, t, x, return_dict=False)[0]
    else:
        for level, next_level in pairwise(scheduler.sigmas):
            x = x + (next_level - level) * predict(x, level.expand(len(x)))
    return decode(pipeline, x, PROMPTS)


@pytest.mark.parametrize("kind", GUIDED_KINDS)
def test_images_equal_those_of_a_loop_that_changes_the_adapters_in_the_unconditional_half(pipeline):
    images = images_of(pipeline, "base")
    assert difference(images, sample_by_hand(pipeline)) <= 1
    # Guidance from the adapter gives other images.
    assert difference(images, images_of(pipeline, "adapter")) > 4
    half_images = images_of(pipeline, 0.5)
    assert difference(half_images, sample_by_hand(pipeline, 0.5)) <= 1
    assert difference(half_images, images) > 0
    assert difference(images_of(pipeline, 0.0), images) == 0
    assert difference(images_of(pipeline, 1.0), images_of(pipeline, "adapter")) == 0


def test_an_image_with_guidance_from_the_adapter_equals_diffusers_bit_for_bit(sdxl):
    """One image is compared, since `decode` takes one at a time and the pipeline all of them."""
    sdxl.set_progress_bar_config(disable=True)
    expected_images = sdxl(
        PROMPTS[0],
        generator=torch.Generator().manual_seed(SEEDS[0]),
        height=SIDE,
        width=SIDE,
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
    ).images
    images = generate(sdxl, PROMPTS[:1], SEEDS[:1], size=SIDE, steps=STEPS, guidance_scale=GUIDANCE)
    assert difference(images, expected_images) == 0


@pytest.mark.parametrize("kind", [SDXL, "QwenImagePipeline", "ZImagePipeline"])
def test_dora_is_scaled_as_by_peft(kind):
    pipeline = adapted_pipeline(
        kind, AdapterSpec(rank=2, use_dora=True, target_modules=("to_q", "to_v"))
    )
    batch_sizes = []
    if kind == SDXL:
        pipeline.unet.conv_in.register_forward_hook(
            lambda module, inputs, output: batch_sizes.append(len(output))
        )
    images = images_of(pipeline, "base")
    if kind == SDXL:
        assert batch_sizes == [2] * 2 * STEPS  # two calls per step, each with 2 images
    assert difference(images, sample_by_hand(pipeline)) <= 1
    half_images = images_of(pipeline, 0.5)
    assert difference(half_images, sample_by_hand(pipeline, 0.5)) <= 1
    assert difference(half_images, images_of(pipeline, "adapter")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SDXL, "StableDiffusion3Pipeline"])
def test_the_strength_applies_to_trained_text_encoders_too(kind):
    pipeline = adapted_pipeline(kind)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        add_adapters(encoder, AdapterSpec(rank=2, target_modules=("q_proj", "v_proj")))
        for parameter in adapters.parameters(encoder, PRIMARY):
            parameter.data.mul_(0.3)
        adapters.activate(encoder, [PRIMARY])
    assert len(adapted_encoders(pipeline)) == 2
    for source, strength in (("base", 0.0), (0.5, 0.5), ("adapter", 1.0)):
        assert difference(images_of(pipeline, source), sample_by_hand(pipeline, strength)) <= 1


def test_the_samples_strength_scales_the_adapter_and_0_gives_the_base_model(sdxl):
    with adapters.off([layer for _, layer in adapters.layers(sdxl.unet)]):
        base_images = images_of(sdxl, "adapter")
        assert difference(images_of(sdxl, "base"), base_images) == 0
    with rescale_adapter_scale(sdxl.unet, 0.0):
        assert difference(images_of(sdxl, "adapter"), base_images) == 0
        assert difference(images_of(sdxl, "base"), base_images) == 0
    full_images = images_of(sdxl, "base")
    with rescale_adapter_scale(sdxl.unet, 0.5):
        half_images = images_of(sdxl, "base")
        assert difference(half_images, sample_by_hand(sdxl)) <= 1
        # The unconditional half's strength multiplies the sample's.
        assert difference(images_of(sdxl, 0.25), sample_by_hand(sdxl, 0.25)) <= 1
    assert difference(half_images, full_images) > 4


@pytest.mark.parametrize("kind", [SDXL, "QwenImagePipeline", "ZImagePipeline"])
def test_an_error_while_sampling_leaves_the_model_unchanged(pipeline):
    model = family_of(pipeline).model(pipeline)
    images_before = images_of(pipeline, "adapter")

    def stop(_):
        raise InterruptedError

    for source in ("base", 0.5):
        with pytest.raises(InterruptedError):
            images_of(pipeline, source, on_step=stop)
    # An instance attribute would hide the class's method.
    assert "forward" not in vars(model)
    for _, layer in adapters.layers(model):
        assert not layer.disable_adapters
        assert not layer.lora_A[PRIMARY]._forward_hooks
    assert difference(images_of(pipeline, "adapter"), images_before) == 0


def test_the_negative_prompt_is_embedded_at_the_strength_of_the_guidance():
    pipeline = load_pipeline("mini", dtype=torch.float32)
    expected = embed_negative(pipeline, 1, ["blurry"])
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        add_adapters(encoder, AdapterSpec(rank=2, target_modules=("q_proj", "v_proj")))
    embeddings = embed_negative(pipeline, 1, ["blurry"], guidance_from="base")
    adapted_embeddings = embed_negative(pipeline, 1, ["blurry"])
    for name, values in expected.items():
        assert torch.equal(embeddings[name], values)
        assert not torch.equal(adapted_embeddings[name], values)
    half_embeddings = embed_negative(pipeline, 1, ["blurry"], guidance_from=0.5)
    with ExitStack() as stack:
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            stack.enter_context(rescale_adapter_scale(encoder, 0.5))
        expected = embed_negative(pipeline, 1, ["blurry"])
    for name, values in expected.items():
        assert torch.equal(half_embeddings[name], values)


def test_a_strength_is_refused_for_merged_adapters():
    pipeline = adapted_pipeline(SDXL)
    for _, layer in adapters.layers(pipeline.unet):
        layer.merge()
    with pytest.raises(UserError, match="unmerge them first"):
        images_of(pipeline, 0.5)


def test_guidance_from_another_model_needs_an_unconditional_prediction(sdxl):
    with pytest.raises(UserError, match=r"guidance of 1: give a guidance above 1, or drop it"):
        images_of(sdxl, "base", guidance_scale=1.0)
    with pytest.raises(UserError, match=r"at strength 0.5 is refused, .*FLUX.1 .* of 3"):
        images_of(make_pipeline("FluxPipeline"), 0.5)
    klein = make_pipeline("Flux2KleinPipeline")
    klein.register_to_config(is_distilled=True)
    with pytest.raises(UserError, match=r"guidance of 3: drop it"):
        images_of(klein, "base")
