"""Noise levels of each flow-matching model, and special cases of single families."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.families.base import Family
from bilora_diffusion.image.noise_schedules import FlowMatching
from bilora_diffusion.image.sampling import bare_sampler
from tests.image.tiny import FILES, make_pipeline
from tests.scripts.runs import train

SIDE = 64
STEPS = {"Flux2KleinPipeline": 50}
"""Number of steps, if not 10. FLUX.2's shift depends on it, and 50 is the pipeline's default."""
SD3, KREA, QWEN, LUMINA = (
    "StableDiffusion3Pipeline",
    "Krea2Pipeline",
    "QwenImagePipeline",
    "Lumina2Pipeline",
)


@torch.no_grad()
def sampled_levels(pipeline, kind):
    """Return the levels of a pipeline that samples in as many steps as its scheduler has levels."""
    family = family_of(pipeline)
    sampler = bare_sampler(family, pipeline)
    conditions = family.embed(pipeline, ["an icon"])
    steps = pipeline.scheduler.config.num_train_timesteps
    options = {}
    if kind == SD3:
        # Pass evenly spaced levels, as the other pipelines do. By default, SD3's pipeline starts
        # from its scheduler's lowest level, which is already shifted, and shifts it again.
        options["sigmas"] = [1 - step / steps for step in range(steps)]

    def stop(*_):
        # The levels are set before the first step.
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sampler(
            **family.sampling(conditions, family.negative(pipeline, conditions), 0.0),
            **options,
            height=SIDE,
            width=SIDE,
            num_inference_steps=steps,
            callback_on_step_end=stop,
        )
    return sampler.scheduler.sigmas[:-1]


LEVEL_CASES = [(kind, {}, False) for kind in FILES]
# A distilled Krea 2 has a shift of its own, which is the same at each resolution.
LEVEL_CASES.append((KREA, {}, True))
LEVEL_CASES.append((LUMINA, {"use_dynamic_shifting": True, "max_image_seq_len": 6400}, False))


@pytest.mark.parametrize(("kind", "scheduler_options", "is_distilled"), LEVEL_CASES)
def test_the_noise_levels_equal_the_pipelines(kind, scheduler_options, is_distilled):
    pipeline = make_pipeline(kind)
    if is_distilled:
        pipeline.register_to_config(is_distilled=True)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, num_train_timesteps=STEPS.get(kind, 10), **scheduler_options
    )
    pipeline.register_modules(scheduler=scheduler)
    family: Family = family_of(pipeline)
    mu = family.mu(pipeline, family.tokens(SIDE, SIDE))
    levels = FlowMatching.from_config(dict(scheduler.config), mu).sigmas
    evenly_spaced = torch.linspace(1, 1 / len(levels), len(levels))
    assert not torch.allclose(levels, evenly_spaced)
    torch.testing.assert_close(levels, sampled_levels(pipeline, kind))


def test_a_qwen_image_model_that_diffusers_can_not_run_is_refused(tmp_path):
    make_pipeline(QWEN, guidance_embeds=True).save_pretrained(tmp_path / "qwen")
    with pytest.raises(UserError, match="Qwen-Image has guidance_embeds"):
        train(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "qwen", resolution=64)


def test_prompts_longer_than_lumina_2s_number_of_positions_are_refused():
    pipeline = make_pipeline(LUMINA)
    family = family_of(pipeline)
    with pytest.raises(UserError, match=r"--max_sequence_length 300 .* give at most 299"):
        replace(family, max_sequence_length=300).embed(pipeline, ["an icon"])
    conditions = replace(family, max_sequence_length=299).embed(pipeline, ["an icon " * 99])
    (rows,) = conditions["sequence"]
    assert len(rows) == 299
    noisy, levels = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    assert torch.isfinite(family.predict(pipeline.transformer, noisy, levels, conditions)).all()


@torch.no_grad()
def test_lumina_2s_negative_prompt_has_no_system_prompt():
    pipeline = make_pipeline(LUMINA)
    family = family_of(pipeline)
    empty_prompt = family.embed(pipeline, [""])
    (negative,) = family.negative(pipeline, empty_prompt)["sequence"]
    _, _, expected, mask = pipeline.encode_prompt("an icon", negative_prompt="")
    torch.testing.assert_close(negative, expected[mask.bool()])
    assert len(negative) < len(empty_prompt["sequence"][0])


@pytest.mark.parametrize("scheme", ["none", "cosmap"])
def test_a_preconditioned_loss_is_the_error_of_the_clean_image(scheme):
    torch.manual_seed(0)
    x0, e = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    config = {"num_train_timesteps": 10, "shift": 3.0}
    index = torch.tensor([1, 5, 9])
    flow = FlowMatching.from_config(config, None, scheme=scheme, preconditioned=True)
    plain = FlowMatching.from_config(config, None, scheme=scheme)
    inputs = {"latents": x0, "noise": e, "level_index": index}
    model_input, _ = flow.add_noise(inputs)
    velocity = model_input.tanh()  # in place of the model's prediction
    loss = flow.loss(velocity, inputs)

    s = flow.sigmas[index].double().view(-1, 1, 1, 1)
    noisy = (1 - s) * x0 + s * e
    denoised = noisy - s * noisy.tanh()
    # The scheme's weight is the ratio of the plain loss and its unweighted error.
    plain_error = ((noisy.tanh() - (e - x0)) ** 2).mean((1, 2, 3))
    weight = plain.loss(velocity, inputs) / plain_error
    expected = weight * ((denoised - x0) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-7)
