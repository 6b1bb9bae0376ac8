"""The denoising losses against formulas in float64; the loss of a class that is kept."""

from typing import Any

import pytest
import torch

from bilora_diffusion import adapters
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.image.loss import PRIOR, DreamBoothModule
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


def inputs(instance=None):
    latents, noise = batch()
    instance = torch.ones(3, dtype=torch.bool) if instance is None else instance
    return {"latents": latents, "noise": noise, "level_index": INDEX, "is_instance": instance}


def predict(noisy, timesteps):
    return torch.tanh(noisy) * (1 + timesteps.view(-1, 1, 1, 1).float() / 1000)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("weighting", ["published", "diffusers"])
def test_standard_loss_is_the_formula(prediction, gamma, weighting):
    latents, noise = batch()
    denoising = Denoising.from_config(
        {**CONFIG, "prediction_type": prediction}, snr_gamma=gamma, snr_weighting=weighting
    )
    weighted = torch.tensor([True, True, False])
    loss = denoising.loss(predict(*denoising.add_noise(inputs())), inputs(weighted))
    for row, t in enumerate(INDEX.tolist()):
        a = alphas()[t]
        x, e = latents[row].double(), noise[row].double()
        noisy = a.sqrt() * x + (1 - a).sqrt() * e
        target = e if prediction == "epsilon" else a.sqrt() * e - (1 - a).sqrt() * x
        expected = ((torch.tanh(noisy) * (1 + t / 1000) - target) ** 2).mean()
        if gamma is not None and weighted[row]:  # class images have no weight, as in diffusers
            snr = a / (1 - a)
            if prediction == "epsilon":
                expected = expected * min(snr, gamma) / snr
            elif weighting == "published":
                expected = expected * min(snr, gamma) / (snr + 1)
            else:
                expected = expected * (min(snr, gamma) / snr + 1)
        assert loss[row].item() == pytest.approx(expected.item(), rel=1e-4)
    ratios = denoising.snr(INDEX)
    if prediction == "epsilon":
        torch.testing.assert_close(
            ratios, (alphas() / (1 - alphas()))[INDEX].float(), rtol=1e-3, atol=0
        )
    else:
        assert ratios is None


def test_min_snr_weights():
    """One below gamma, falling above; and at a last level of pure noise, as models of zero terminal
    signal have (arXiv 2305.08891), where diffusers' script divides by 0.
    """
    snr = torch.tensor([0.0, 0.1, 5.0, 50.0])
    assert torch.allclose(min_snr_weights(snr, 5.0, False), torch.tensor([1.0, 1.0, 1.0, 0.1]))
    for floored, expected in ((False, 0.0), (True, 2.0)):
        assert min_snr_weights(snr, 5.0, True, floored)[0] == expected


def test_edm_loss_is_the_weighted_error_of_the_denoised_image():
    latents, noise = batch()
    denoising = Denoising.from_config(CONFIG, edm=True)
    loss = denoising.loss(predict(*denoising.add_noise(inputs())), inputs())
    for row, index in enumerate(INDEX.tolist()):
        sigma = denoising.scheduler.sigmas[index].double()
        t = denoising.scheduler.timesteps[index].double()
        noisy = latents[row].double() + sigma * noise[row].double()
        prediction = torch.tanh(noisy / (sigma**2 + 1).sqrt()) * (1 + t / 1000)
        expected = (((noisy - sigma * prediction - latents[row].double()) / sigma) ** 2).mean()
        assert loss[row].item() == pytest.approx(expected.item(), rel=1e-3)
    scheduler = denoising.scheduler  # whose levels fall with their index
    ratios = denoising.snr(INDEX)
    assert ratios is not None
    torch.testing.assert_close(ratios, scheduler.sigmas[INDEX] ** -2)
    assert scheduler.sigmas[0] > scheduler.sigmas[999]
    assert scheduler.timesteps[0] > scheduler.timesteps[999]


def test_native_edm_is_chosen_by_the_pipeline():
    name = "EDMDPMSolverMultistepScheduler"
    config = {"_class_name": name, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    denoising = Denoising.from_config({**config, "prediction_type": "epsilon"})
    loss = denoising.loss(predict(*denoising.add_noise(inputs())), inputs())
    assert denoising.kind == "edm_native"
    assert denoising.snr(INDEX) is None, "it does not predict noise"
    assert torch.isfinite(loss).all()


@pytest.mark.parametrize(
    ("config", "options", "part"),
    [
        (CONFIG, {"edm": True, "snr_gamma": 5.0}, "--snr_gamma 5"),
        ({**CONFIG, "prediction_type": "sample"}, {}, "sample"),
    ],
)
def test_what_no_loss_is_for_is_refused(config, options, part):
    with pytest.raises(ValueError, match=part):
        Denoising.from_config(config, **options)


CLASS = "an icon of a rabbit"


def test_the_departure_is_that_from_the_model_without_adapters():
    pipeline, plain = (load_pipeline("mini", dtype=torch.float32).unet for _ in range(2))
    spec = adapters.AdapterSpec(rank=4, alpha=8, target_modules=("to_q", "to_v"))
    adapters.inject(pipeline, spec)
    adapters.inject(pipeline, spec, adapters.AUXILIARY)
    adapters.activate(pipeline, (adapters.PRIMARY, adapters.AUXILIARY))
    for name in (adapters.PRIMARY, adapters.AUXILIARY):
        for factors in adapters.factors(pipeline, name):
            torch.nn.init.normal_(factors.B, std=0.05)
    module = DreamBoothModule(StableDiffusionXL(), pipeline, [], Denoising(None))
    noisy, levels = torch.randn(2, 8, 8, 8), torch.tensor([10, 700])
    conditions = {"sequence": torch.randn(2, 32, 192), "pooled": torch.randn(2, 96)}
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    departures = module.departures({PRIOR: conditions, "time_ids": sizes}, PRIOR, noisy, levels)
    added = {"added_cond_kwargs": {"text_embeds": conditions["pooled"], "time_ids": sizes}}
    with torch.no_grad():
        adapted_output, plain_output = (
            unet(noisy, levels, conditions["sequence"], **added).sample
            for unet in (pipeline, plain)
        )
    assert torch.allclose(
        departures, (adapted_output - plain_output).square().flatten(1).mean(1), rtol=1e-4
    )
    departures.sum().backward()
    for name in (adapters.PRIMARY, adapters.AUXILIARY):
        gradients = [p.grad for p in adapters.parameters(pipeline, name)]
        assert all(g is not None and bool(g.any()) for g in gradients)
