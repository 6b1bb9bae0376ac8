"""Noise levels, targets and weights of command lines, compared with formulas in float64."""

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.image.noise_schedules import noise_schedule
from tests.image.test_denoising import CONFIG, alphas
from tests.image.tiny import make_pipeline, shared

SD3, FLUX = "StableDiffusion3Pipeline", "FluxPipeline"
LEVELS = 1000
# Indices of the levels whose weights are compared; flow matching's lowest level is 1 / 1000.
INDEX = torch.tensor([2, 150, 500, 998])
SAMPLES = 2000
# Tolerance of the share of samples below a quantile: 3.6 standard deviations at the median
SHARE_TOLERANCE = 0.04


def configuration(model: object, words: str) -> Any:
    """Return the configuration of a command line with these words."""
    argv = ["--pretrained_model_name_or_path", str(model), "--dataset", "mini"]
    argv += ["--validation_dataset", "none", "--num_validation_images", "0"]
    argv += ["--resolution", "64", "--train_batch_size", "1", *words.split()]
    return resolve(argv)


def diffusion_schedule(words: str, prediction: str = "epsilon") -> Any:
    """Return the noise schedule of a run on an SDXL model that predicts noise or velocity."""
    scheduler = EulerDiscreteScheduler.from_config({**CONFIG, "prediction_type": prediction})
    pipeline = SimpleNamespace(scheduler=scheduler)
    return noise_schedule(configuration("mini", words), StableDiffusionXL(), pipeline)


@cache
def flow_pipeline(kind: str) -> Any:
    return make_pipeline(kind)


def flow_schedule(kind: str, words: str) -> Any:
    """Return the noise schedule of a run on a tiny flow-matching model."""
    pipeline = flow_pipeline(kind)
    return noise_schedule(configuration(shared(kind), words), family_of(pipeline), pipeline)


def make_inputs() -> dict[str, Any]:
    """Return a batch's latents and noise, (n, c, h, w) in float64, and its level indices, (n,)."""
    count = len(INDEX)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=generator, dtype=torch.float64)
    is_instance = torch.ones(count, dtype=torch.bool)
    return {
        "latents": latents,
        "noise": noise,
        "level_index": INDEX,
        "is_instance": is_instance,
    }


def sampled_shares(schedule: Any) -> torch.Tensor:
    """Return the places of sampled levels among all levels, from 0 at pure noise to 1, (n,)."""
    random = torch.Generator().manual_seed(0)
    numbers = [int(schedule.sample_level_index(random)) for _ in range(SAMPLES)]
    assert min(numbers) >= 0
    assert max(numbers) < LEVELS
    return (torch.tensor(numbers, dtype=torch.float64) + 0.5) / LEVELS


def assert_distribution(shares: torch.Tensor, quantile: Any) -> None:
    """Check that a share of about p of the samples is below the quantile of p."""
    for p in torch.linspace(0.05, 0.95, 19, dtype=torch.float64):
        share = (shares < quantile(p)).double().mean()
        assert float(share) == pytest.approx(float(p), abs=SHARE_TOLERANCE)


def uniform(p: torch.Tensor) -> torch.Tensor:
    return p


def logit_normal(mean: float, std: float) -> Any:
    """Return the quantile function of 1 / (1 + exp(-x)), x normal (arXiv 2403.03206, Sec. 3.1)."""
    return lambda p: torch.sigmoid(mean + std * torch.special.ndtri(p))


def mode(scale: float) -> Any:
    """Return the quantile function of f(u), u uniform (arXiv 2403.03206, Eq. 20).

    f falls as u rises, so the quantile of p is f(1 - p).
    """

    def quantile(p: torch.Tensor) -> torch.Tensor:
        u = 1 - p
        return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    return quantile


# Model, command line, quantile function of the sampled levels, arguments of diffusers' function
SAMPLING = [
    (SD3, "", logit_normal(0, 1), ("logit_normal", 1, 0.0, 1.0)),
    (FLUX, "", uniform, ("none", 1)),
    (SD3, "--weighting_scheme none", uniform, ("none", 1)),
    (SD3, "--weighting_scheme sigma_sqrt", uniform, ("sigma_sqrt", 1)),
    (SD3, "--weighting_scheme cosmap", uniform, ("cosmap", 1)),
    (FLUX, "--weighting_scheme logit_normal", logit_normal(0, 1), ("logit_normal", 1, 0.0, 1.0)),
    (SD3, "--logit_mean 0.7", logit_normal(0.7, 1), ("logit_normal", 1, 0.7, 1.0)),
    (SD3, "--logit_std 0.4", logit_normal(0, 0.4), ("logit_normal", 1, 0.0, 0.4)),
    (SD3, "--weighting_scheme mode", mode(1.29), ("mode", 1, None, None, 1.29)),
    (
        SD3,
        "--weighting_scheme mode --mode_scale -0.5",
        mode(-0.5),
        ("mode", 1, None, None, -0.5),
    ),
]


@pytest.mark.parametrize(("kind", "words", "quantile", "arguments"), SAMPLING)
def test_noise_levels_of_a_flow_model_are_sampled_by_the_scheme(kind, words, quantile, arguments):
    schedule = flow_schedule(kind, words)
    assert_distribution(sampled_shares(schedule), quantile)
    random = torch.Generator().manual_seed(1)
    expected_random = torch.Generator().manual_seed(1)
    for _ in range(20):
        share = compute_density_for_timestep_sampling(*arguments, generator=expected_random)
        assert int(schedule.sample_level_index(random)) == int(share * LEVELS)


def test_noise_levels_of_a_diffusion_model_are_sampled_uniformly():
    assert_distribution(sampled_shares(diffusion_schedule("")), uniform)


def flow_weight(scheme: str, s: torch.Tensor) -> torch.Tensor:
    """Return the weight of the velocity's squared error at levels s, (n,)."""
    if scheme == "sigma_sqrt":
        return s**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * s + 2 * s**2))
    return torch.ones_like(s)


@pytest.mark.parametrize("precondition", ["", "--precondition_outputs"])
@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_a_flow_models_loss_has_the_weight_of_the_scheme(scheme, precondition):
    schedule = flow_schedule(SD3, f"--weighting_scheme {scheme} {precondition}")
    inputs = make_inputs()
    latents, noise = inputs["latents"], inputs["noise"]
    # The tiny SD3 has a shift of 3; (n,)
    even = 1 - INDEX.double() / LEVELS
    s = 3 * even / (1 + 2 * even)
    noisy, levels = schedule.add_noise(inputs)
    torch.testing.assert_close(levels.double(), s, rtol=1e-6, atol=0)
    level_map = s.view(-1, 1, 1, 1)
    torch.testing.assert_close(
        noisy.double(), (1 - level_map) * latents + level_map * noise, rtol=1e-6, atol=1e-6
    )

    weights = flow_weight(scheme, s)
    diffusers_weights = compute_loss_weighting_for_sd3(scheme, s)
    torch.testing.assert_close(diffusers_weights.double(), weights, rtol=1e-6, atol=0)
    if precondition:
        # The error of the clean image x_s - s v is s times the error of v.
        weights = weights * s**2
    # A velocity that is off by 1 everywhere has a squared error of 1.
    losses = schedule.loss(noise - latents + 1, inputs)
    torch.testing.assert_close(losses.double(), weights, rtol=1e-5, atol=0)


def velocity_weight(snr: torch.Tensor, gamma: float, weighting: str) -> torch.Tensor:
    """Return the velocity's min-SNR weight at ratios (n,), as published or as in diffusers."""
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if weighting == "published" else capped / snr + 1


@pytest.mark.parametrize(
    ("words", "gamma", "weighting"),
    [
        ("", None, "published"),
        ("--snr_gamma 5", 5.0, "published"),
        ("--snr_gamma 0.5", 0.5, "published"),
        ("--snr_gamma 0.5 --snr_weighting diffusers", 0.5, "diffusers"),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_diffusion_models_loss_has_the_min_snr_weight(words, gamma, weighting, prediction):
    schedule = diffusion_schedule(words, prediction)
    inputs = make_inputs()
    latents, noise = inputs["latents"], inputs["noise"]
    alpha = alphas()[INDEX]  # alpha_bar, (n,)
    alpha_map = alpha.view(-1, 1, 1, 1)
    noisy, timesteps = schedule.add_noise(inputs)
    assert torch.equal(timesteps, INDEX)
    expected_noisy = alpha_map.sqrt() * latents + (1 - alpha_map).sqrt() * noise
    torch.testing.assert_close(noisy, expected_noisy, rtol=1e-4, atol=1e-4)

    snr = alpha / (1 - alpha)
    scheduler = DDPMScheduler.from_config(CONFIG)
    torch.testing.assert_close(compute_snr(scheduler, INDEX).double(), snr, rtol=1e-3, atol=0)
    target = noise
    if prediction == "v_prediction":
        target = alpha_map.sqrt() * noise - (1 - alpha_map).sqrt() * latents
    if gamma is None:
        weights = torch.ones_like(snr)
    elif prediction == "epsilon":
        weights = snr.clamp(max=gamma) / snr
    else:
        weights = velocity_weight(snr, gamma, weighting)
    losses = schedule.loss(target + 1, inputs)
    torch.testing.assert_close(losses.double(), weights, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_edm_formulation_equals_that_of_karras_et_al(prediction):
    """Inputs, timesteps and the clean image's weighted error follow arXiv 2206.00364, Section 5."""
    schedule = diffusion_schedule("--do_edm_style_training", prediction)
    inputs = make_inputs()
    latents, noise = inputs["latents"], inputs["noise"]
    # Level 0 is the noisiest.
    t = LEVELS - 1 - INDEX
    alpha = alphas()[t]
    sigma = ((1 - alpha) / alpha).sqrt().view(-1, 1, 1, 1)
    model_input, timesteps = schedule.add_noise(inputs)
    torch.testing.assert_close(timesteps.long(), t)
    # c_in (x0 + sigma e), with c_in = 1 / sqrt(sigma^2 + 1)
    noisy = latents + sigma * noise
    c_in = 1 / (sigma**2 + 1).sqrt()
    torch.testing.assert_close(model_input.double(), c_in * noisy, rtol=1e-4, atol=1e-4)

    prediction_values = torch.tanh(noisy)
    # The clean image is c_skip x + c_out F.
    if prediction == "epsilon":
        c_skip, c_out = torch.ones_like(sigma), -sigma
    else:
        c_skip, c_out = 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1).sqrt()
    denoised = c_skip * noisy + c_out * prediction_values
    expected = (sigma**-2 * (denoised - latents) ** 2).mean(dim=(1, 2, 3))
    losses = schedule.loss(prediction_values, inputs)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-3, atol=0)
