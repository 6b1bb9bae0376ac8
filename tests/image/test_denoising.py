"""Denoising losses, compared with formulas in float64, and the loss of a held prediction."""

from typing import Any

import pytest
import torch

from bilora_diffusion import adapters
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.image.loss import DreamBoothModule
from bilora_diffusion.image.noise_schedules import Denoising, min_snr_weights
from bilora_diffusion.image.pipeline import load_pipeline

CONFIG: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
INDEX = torch.tensor([3, 500, 998])


def alphas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    return latents, noise


def losses_of(denoising, instance=(True, True, True)):
    """Return the losses of a model that predicts tanh(x) (1 + t / 1000)."""
    latents, noise = batch()
    instance = torch.tensor(instance)
    inputs = {"latents": latents, "noise": noise, "level_index": INDEX, "is_instance": instance}
    noisy, timesteps = denoising.add_noise(inputs)
    prediction = torch.tanh(noisy) * (1 + timesteps.view(-1, 1, 1, 1).float() / 1000)
    return denoising.loss(prediction, inputs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("weighting", ["published", "diffusers"])
def test_the_standard_loss_equals_the_formula(prediction, gamma, weighting):
    latents, noise = batch()
    denoising = Denoising.from_config(
        {**CONFIG, "prediction_type": prediction}, snr_gamma=gamma, snr_weighting=weighting
    )
    is_instance = (True, True, False)  # the last one is a class image
    losses = losses_of(denoising, is_instance)
    for row, t in enumerate(INDEX.tolist()):
        alpha = alphas()[t]
        x, e = latents[row].double(), noise[row].double()
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * e
        target = e
        if prediction == "v_prediction":
            target = alpha.sqrt() * e - (1 - alpha).sqrt() * x
        expected = ((torch.tanh(noisy) * (1 + t / 1000) - target) ** 2).mean()
        if gamma is not None and is_instance[row]:  # class images are not weighted, as in diffusers
            snr = alpha / (1 - alpha)
            if prediction == "epsilon":
                expected = expected * min(snr, gamma) / snr
            elif weighting == "published":
                expected = expected * min(snr, gamma) / (snr + 1)
            else:
                expected = expected * (min(snr, gamma) / snr + 1)
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-4)


def test_min_snr_weights_fall_above_gamma_and_are_finite_at_zero_snr():
    """The weight is 1 up to gamma and falls above it.

    It is also finite at a last level of pure noise, as in models with zero terminal SNR (arXiv
    2305.08891), where diffusers' script divides by 0.
    """
    snr = torch.tensor([0.0, 0.1, 5.0, 50.0])
    assert torch.allclose(min_snr_weights(snr, 5.0, False), torch.tensor([1.0, 1.0, 1.0, 0.1]))
    assert min_snr_weights(snr, 5.0, True, False)[0] == 0
    assert min_snr_weights(snr, 5.0, True, True)[0] == 2


def test_the_edm_loss_is_the_weighted_error_of_the_denoised_image():
    latents, noise = batch()
    denoising = Denoising.from_config(CONFIG, edm=True)
    losses = losses_of(denoising)
    scheduler = denoising.scheduler
    for row, index in enumerate(INDEX.tolist()):
        sigma = scheduler.sigmas[index].double()
        t = scheduler.timesteps[index].double()
        x = latents[row].double()
        noisy = x + sigma * noise[row].double()
        prediction = torch.tanh(noisy / (sigma**2 + 1).sqrt()) * (1 + t / 1000)
        denoised = noisy - sigma * prediction
        expected = (((denoised - x) / sigma) ** 2).mean()
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-3)
    # The levels of this scheduler fall with their index.
    assert scheduler.sigmas[0] > scheduler.sigmas[999]
    assert scheduler.timesteps[0] > scheduler.timesteps[999]


def test_the_pipelines_scheduler_selects_native_edm():
    name = "EDMDPMSolverMultistepScheduler"
    config = {"_class_name": name, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    denoising = Denoising.from_config({**config, "prediction_type": "epsilon"})
    assert denoising.kind == "edm_native"
    assert torch.isfinite(losses_of(denoising)).all()


@pytest.mark.parametrize(
    ("config", "options", "part"),
    [
        (CONFIG, {"edm": True, "snr_gamma": 5.0}, "--snr_gamma 5"),
        ({**CONFIG, "prediction_type": "sample"}, {}, "sample"),
    ],
)
def test_unsupported_losses_are_refused(config, options, part):
    with pytest.raises(ValueError, match=part):
        Denoising.from_config(config, **options)


def test_a_held_prediction_is_compared_with_the_prediction_without_adapters():
    plain_unet = load_pipeline("mini", dtype=torch.float32).unet
    unet = load_pipeline("mini", dtype=torch.float32).unet
    both = (adapters.PRIMARY, adapters.AUXILIARY)
    for name in both:
        spec = adapters.AdapterSpec(rank=4, alpha=8, target_modules=("to_q", "to_v"))
        adapters.inject(unet, spec, name)
        for factors in adapters.factors(unet, name):
            torch.nn.init.normal_(factors.B, std=0.05)
    adapters.activate(unet, both)
    module = DreamBoothModule(StableDiffusionXL(), unet, [], Denoising(None))
    noisy = torch.randn(2, 8, 8, 8)
    levels = torch.tensor([10, 700])
    sequence = torch.randn(2, 32, 192)
    pooled = torch.randn(2, 96)
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    conditions = {"sequence": sequence, "pooled": pooled, "time_ids": time_ids}
    base_prediction = module.base_prediction(conditions, noisy, levels)
    changes = module.squared_change(conditions, noisy, levels, base_prediction)

    # The same change from direct calls of diffusers' UNet.
    added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        output = unet(noisy, levels, sequence, added_cond_kwargs=added).sample
        plain_output = plain_unet(noisy, levels, sequence, added_cond_kwargs=added).sample
    expected = (output - plain_output).square().flatten(1).mean(1)
    assert torch.allclose(changes, expected, rtol=1e-4)
    changes.sum().backward()
    for name in both:
        for parameter in adapters.parameters(unet, name):
            assert parameter.grad is not None
            assert parameter.grad.any()
