"""Flow-matching models compared with diffusers' pipelines, and their losses with formulas."""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from bilora_diffusion.adapters import AdapterSpec, inject
from bilora_diffusion.adapters.access import layers
from bilora_diffusion.adapters.injection import base_of, target_layers
from bilora_diffusion.image.captions import PromptCache
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.families.base import (
    STEPS,
    Unconditional,
    autoencoder_width,
    latent_pixels,
)
from bilora_diffusion.image.families.tensors import join_rows
from bilora_diffusion.image.loss import GUIDANCE_SHARE, UNCONDITIONAL, DreamBoothModule
from bilora_diffusion.image.noise_schedules import FlowMatching
from bilora_diffusion.image.pipeline import select_layers
from bilora_diffusion.image.sampling import bare_sampler, embed_negative, generate
from tests.image.image_folders import difference
from tests.image.tiny import FILES, make_pipeline

SIDE = 64
PROMPT = "a TOK icon of a rabbit, in the style of TOK"
PROMPTS = [PROMPT, "an icon"]
LONG = ", ".join([PROMPT] * 8)
SD3 = "StableDiffusion3Pipeline"
SCHNELL = "FLUX.1 without an embedding of guidance"
each_kind = pytest.mark.parametrize("kind", FILES)


@cache
def pipeline_of(kind):
    if kind == SCHNELL:
        pipeline = make_pipeline("FluxPipeline", guidance_embeds=False)
    else:
        pipeline = make_pipeline(kind)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)
    return pipeline


def noise_of(pipeline, seeds):
    """Return noise, (n, c, h, w), as a pipeline draws it with one generator per image."""
    shape = latents_of(pipeline, 1).shape
    return torch.cat([torch.randn(shape, generator=generator(seed)) for seed in seeds])


def generator(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def latents_of(pipeline, count):
    """Return the latents of `count` random images, (n, c, h, w)."""
    pixels = torch.rand(count, 3, SIDE, SIDE, generator=generator(5)) * 2 - 1
    space = family_of(pipeline).latent_space(pipeline.vae)
    return space.encode(space.distribution(pipeline.vae, pixels)[0])


def module_of(pipeline, scheme):
    family = family_of(pipeline)
    mu = family.mu(pipeline, family.tokens(SIDE, SIDE))
    schedule = FlowMatching.from_config(dict(pipeline.scheduler.config), mu, scheme=scheme)
    return DreamBoothModule(family, pipeline.transformer, [], schedule)


def inputs_of(pipeline, conditional, count):
    return {
        "latents": latents_of(pipeline, count),
        "noise": noise_of(pipeline, list(range(count))),
        "level_index": torch.tensor([150, 420, 800])[:count],
        "is_instance": torch.ones(count, dtype=torch.bool),
        "time_ids": torch.zeros(count, 6),
        **conditional,
    }


@each_kind
def test_a_dropped_caption_gets_the_unconditional_embedding(kind):
    prompts = PromptCache(pipeline_of(kind), torch.device("cpu"))
    conditions = prompts.embed_captions(["", PROMPT])
    for name, values in embed_negative(pipeline_of(kind), 1).items():
        # The first row belongs to the dropped caption.
        torch.testing.assert_close(conditions[name][:1], values)


@pytest.mark.parametrize("kind", [*FILES, SCHNELL])
@torch.no_grad()
def test_the_pipeline_samples_with_euler_steps_along_the_prediction(kind):
    pipeline = pipeline_of(kind)
    family = family_of(pipeline)
    conditional = family.embed(pipeline, PROMPTS)
    # Some pipelines need this input, although they do not use it without guidance.
    unconditional = family.negative(pipeline, family.embed(pipeline, [""] * 2))
    # A model with guidance as an input gets the value from training.
    guidance = family.unguided_scale
    if family.unconditional is Unconditional.NONE:
        guidance = family.guidance_scale
    sampler = bare_sampler(family, pipeline)
    output = sampler(
        **family.sampling(conditional, unconditional, guidance),
        generator=[generator(3), generator(4)],
        output_type="latent",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
    )
    noise = noise_of(pipeline, [3, 4])
    x = noise
    for level, next_level in pairwise(sampler.scheduler.sigmas):
        # dx/ds is the velocity.
        velocity = family.predict(pipeline.transformer, x, level.expand(2), conditional)
        x = x + (next_level - level) * velocity
    expected = family.unpack_output(output.images, SIDE, SIDE)
    assert expected.shape == noise.shape
    # The steps must change the latents.
    assert (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@each_kind
@torch.no_grad()
def test_the_loss_equals_the_formula(kind):
    pipeline = pipeline_of(kind)
    family = family_of(pipeline)
    scheme = "none" if kind == SD3 else "sigma_sqrt"
    module: Any = module_of(pipeline, scheme)
    conditional = family.embed(pipeline, PROMPTS)
    inputs = inputs_of(pipeline, conditional, 2)
    losses = module(inputs)

    # x_s = (1 - s) x0 + s e; the model predicts the velocity e - x0.
    levels = module.noise_schedule.sigmas[inputs["level_index"]]
    s = levels.double().view(-1, 1, 1, 1)
    x0, e = inputs["latents"].double(), inputs["noise"].double()
    noisy = ((1 - s) * x0 + s * e).float()
    velocity = family.predict(pipeline.transformer, noisy, levels, conditional).double()
    weight = s**-2 if scheme == "sigma_sqrt" else 1.0
    expected = (weight * (velocity - (e - x0)) ** 2).mean(dim=(1, 2, 3))
    # The losses must be neither near zero nor equal.
    assert expected.min() > 0.1
    assert (expected[0] - expected[1]).abs() > 1e-3
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


@each_kind
def test_the_loss_with_a_guided_target_equals_the_formula(kind):
    """The second row keeps the plain target, and no gradient flows through the guided target."""
    pipeline = make_pipeline(kind)
    family, model = family_of(pipeline), pipeline.transformer
    module: Any = module_of(pipeline, "none")
    conditional = family.embed(pipeline, PROMPTS)
    unconditional = family.negative(pipeline, family.embed(pipeline, [""] * 2))
    inputs = inputs_of(pipeline, conditional, 2)
    levels = module.noise_schedule.sigmas[inputs["level_index"]]
    s = levels.view(-1, 1, 1, 1)
    noisy = (1 - s) * inputs["latents"] + s * inputs["noise"]
    with torch.no_grad():
        base_velocity = family.predict(model, noisy, levels, unconditional).double()

    inject(model, AdapterSpec(rank=2, target_modules=select_layers(["attention"], family, model)))
    adapted_layers: Any = layers(model)
    for number, (_, layer) in enumerate(adapted_layers):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5, generator=generator(number))
    velocity = family.predict(model, noisy, levels, conditional).double()
    share = torch.tensor([0.5, 0.0]).double().view(-1, 1, 1, 1)  # 1 - 1 / S for a scale S of 2
    target = (inputs["noise"] - inputs["latents"]).double()
    target = target + share * (velocity.detach() - base_velocity)
    expected = ((velocity - target) ** 2).mean(dim=(1, 2, 3))
    weights = [layer.lora_B["default"].weight for _, layer in adapted_layers]
    expected_gradients = torch.autograd.grad(expected.sum(), weights, allow_unused=True)

    inputs |= {GUIDANCE_SHARE: share.flatten().float(), UNCONDITIONAL: unconditional}
    losses = module(inputs)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(losses.sum(), weights, allow_unused=True)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        if expected_gradient is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)
    # The guided target must change the loss, so that a wrong base or share is noticed.
    plain = ((velocity - (inputs["noise"] - inputs["latents"])) ** 2).mean(dim=(1, 2, 3))
    assert abs(plain[0] - expected[0]) > 1e-3
    torch.testing.assert_close(plain[1], expected[1])


@each_kind
@torch.no_grad()
def test_the_loss_of_a_row_does_not_depend_on_the_other_rows(kind):
    pipeline = pipeline_of(kind)
    family = family_of(pipeline)
    module = module_of(pipeline, "none")
    prompts = [PROMPT, LONG, ""]
    conditions = [family.embed(pipeline, [prompt]) for prompt in prompts]
    inputs = inputs_of(pipeline, {}, 3)
    single_losses = []
    for row, conditional in enumerate(conditions):
        # The longest prompt pads the others only if they share a batch.
        single_inputs = {name: values[row : row + 1] for name, values in inputs.items()}
        single_losses.append(module(single_inputs | conditional))
    expected = torch.cat(single_losses)
    joined_losses = module(inputs | join_rows(conditions))
    torch.testing.assert_close(joined_losses, expected, rtol=1e-5, atol=1e-5)
    losses = module(inputs | family.embed(pipeline, prompts))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


UNREAD_LAYERS = {"attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"}
"""Layers of the last block whose results for the text are unused if the block outputs no text."""


@each_kind
@pytest.mark.parametrize("word", ["attention", "all"])
def test_gradients_reach_every_target(word, kind):
    pipeline = make_pipeline(kind)
    model, family = pipeline.transformer, family_of(pipeline)
    spec = AdapterSpec(rank=2, target_modules=select_layers([word], family, model))
    targets = set(target_layers(model, spec))
    inject(model, spec)
    adapted_layers: Any = layers(model)
    assert {name for name, _ in adapted_layers} == targets
    random = generator(0)
    for _, layer in adapted_layers:
        # B starts at zero, which would leave A without a gradient.
        torch.nn.init.normal_(layer.lora_B["default"].weight, generator=random)
        base_of(layer).weight.requires_grad_(True)
    conditional = family.embed(pipeline, PROMPTS)
    module_of(pipeline, "none")(inputs_of(pipeline, conditional, 2)).mean().backward()

    def has_gradient(module):
        gradient = module.weight.grad
        return gradient is not None and bool(gradient.any())

    last_block = f"transformer_blocks.{len(getattr(model, 'transformer_blocks', [])) - 1}."
    for name, layer in adapted_layers:
        is_read = has_gradient(base_of(layer))
        assert is_read or name.removeprefix(last_block) in UNREAD_LAYERS, name
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            assert has_gradient(factor) == is_read, name


@each_kind
def test_the_widths_that_dry_run_reads_are_the_layers_widths(kind):
    """Only configurations are read, so `--dry_run` needs no weights of a model on the Hub."""
    pipeline = pipeline_of(kind)
    family = family_of(pipeline)
    widths = set()
    for name, layer in pipeline.transformer.named_modules():
        if name.endswith("to_q"):
            widths.add(layer.in_features)
    assert family.width(pipeline.transformer.config) in widths
    convolutions = [m for m in pipeline.vae.encoder.modules() if hasattr(m, "out_channels")]
    assert autoencoder_width(pipeline.vae.config) == convolutions[0].out_channels
    latents = latents_of(pipeline, 1)
    pixels = latent_pixels(pipeline.vae.config)
    assert latents[0].numel() * pixels**2 % SIDE**2 == 0
    assert family.patch % pixels == 0


@each_kind
@torch.no_grad()
def test_decoding_latents_is_the_inverse_of_encoding(kind):
    pipeline = pipeline_of(kind)
    space = family_of(pipeline).latent_space(pipeline.vae)
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=generator(0)) * 2 - 1
    latents, _ = space.distribution(pipeline.vae, pixels)
    encoded = space.encode(latents)
    assert encoded.shape == latents_of(pipeline, 2).shape
    # Encoding packs the latents, or scales and shifts them.
    assert (encoded.shape != latents.shape) or (encoded - latents).abs().max() > 1e-3
    torch.testing.assert_close(space.decode(encoded), latents, rtol=1e-5, atol=1e-6)


@each_kind
def test_images_equal_those_of_the_pipeline(kind):
    pipeline = pipeline_of(kind)
    family = family_of(pipeline)
    (image,) = generate(pipeline, [PROMPT], [7], size=SIDE, steps=2)
    guidance = {"guidance_scale": family.default_guidance}
    if kind == "QwenImagePipeline":
        # Qwen-Image has guidance only if there is a negative prompt.
        guidance = {"true_cfg_scale": family.default_guidance, "negative_prompt": ""}
    (expected_image,) = pipeline(
        prompt=PROMPT,
        generator=generator(7),
        num_inference_steps=2,
        height=SIDE,
        width=SIDE,
        max_sequence_length=family.max_sequence_length,
        **guidance,
    ).images
    assert difference([image], [expected_image]) <= 1
    assert np.asarray(expected_image).std() > 5  # not a blank image


@each_kind
def test_only_distilled_models_get_a_remark_and_are_sampled_without_guidance(kind):
    pipeline = make_pipeline(kind)
    family = family_of(pipeline)
    remark = family.remark
    assert remark("org/model", pipeline) is None
    assert family.usual_sampling(pipeline) == (STEPS, family.default_guidance)
    pipeline.register_to_config(_name_or_path="Turbo/org/Z-Image-Turbo")
    if kind == "FluxPipeline":
        pipeline = make_pipeline("FluxPipeline", guidance_embeds=False)
    elif "is_distilled" in pipeline.config:
        pipeline.register_to_config(is_distilled=True)
    elif kind != "ZImagePipeline":
        return
    assert '"org/model-Turbo"' in (remark("org/model-Turbo", pipeline) or "")
    assert family.usual_sampling(pipeline) == (family.few_steps, 0.0)
    assert family.few_steps < STEPS
    pipeline.set_progress_bar_config(disable=True)
    images = generate(pipeline, [PROMPT], [0], size=SIDE)
    settings = {"steps": family.few_steps, "guidance_scale": 0.0}
    assert difference(images, generate(pipeline, [PROMPT], [0], size=SIDE, **settings)) == 0
