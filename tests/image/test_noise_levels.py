"""The training shift of noise levels, compared with its sources, and `--timestep_range`."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.image.loss import grid_level_indices
from bilora_diffusion.image.noise_schedules import noise_schedule
from bilora_diffusion.run import checkpoint
from tests.image.test_noise_options import (
    FLUX,
    LEVELS,
    SAMPLING,
    SD3,
    assert_distribution,
    configuration,
    diffusion_schedule,
    flow_pipeline,
    flow_schedule,
    sampled_shares,
)
from tests.image.tiny import shared
from tests.scripts.runs import column, train

KLEIN, Z_IMAGE, QWEN = "Flux2KleinPipeline", "ZImagePipeline", "QwenImagePipeline"
KREA, LUMINA = "Krea2Pipeline", "Lumina2Pipeline"
# Options of FlowMatchEulerDiscreteScheduler in the published models, except for the number of
# levels.
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    SD3: {"shift": 3.0},
    FLUX: DYNAMIC,
    KLEIN: DYNAMIC,
    Z_IMAGE: {"shift": 6.0},
    QWEN: {
        "use_dynamic_shifting": True,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    KREA: {"use_dynamic_shifting": True, "max_image_seq_len": 6400},
    LUMINA: {"shift": 6.0},
}
SIDES = (512, 1024, 1536)


def published_schedule(kind: str, words: str, side: int) -> Any:
    """Return a run's noise schedule at a resolution that is too large for the tiny model itself."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(PUBLISHED[kind])
    tiny = flow_pipeline(kind)
    pipeline = SimpleNamespace(
        scheduler=scheduler, transformer=tiny.transformer, config=tiny.config
    )
    cfg = replace(configuration(shared(kind), words), resolution=side)
    return noise_schedule(cfg, family_of(tiny), pipeline)


def even_levels() -> torch.Tensor:
    """Return evenly spaced levels from 1 down to 1 / 1000, (LEVELS,)."""
    return 1 - torch.arange(LEVELS, dtype=torch.float64) / LEVELS


def shifted(t: torch.Tensor, s: float) -> torch.Tensor:
    return s * t / (1 + (s - 1) * t)


def lin_function(tokens: int, x1: int = 256, y1: float = 0.5, x2: int = 4096, y2: float = 1.15):
    """Compute BFL's get_lin_function, which FLUX.1, musubi-tuner, Lumina 2 and Krea 2 use."""
    m = (y2 - y1) / (x2 - x1)
    return m * tokens + y1 - m * x1


def bfl_levels(t: torch.Tensor, mu: float) -> torch.Tensor:
    """Compute BFL's time_shift with sigma 1."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


def klein_levels(t: torch.Tensor, side: int) -> torch.Tensor:
    """Compute musubi-tuner's flux2_shift; a packed latent of FLUX.2 covers 16 x 16 pixels."""
    shift = math.exp(lin_function((side // 16) * (side // 16)))
    return (t * shift) / (1 + (shift - 1) * t)


def klein_sampling_levels(t: torch.Tensor, side: int) -> torch.Tensor:
    """Compute the levels of BFL's flux2 (compute_empirical_mu) in 50 steps."""
    tokens = (side // 16) ** 2
    at_200 = 0.00016927 * tokens + 0.45666666
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return bfl_levels(t, at_200 if tokens > 4300 else slope * 50 + at_200 - 200 * slope)


def lumina_levels(t: torch.Tensor, side: int) -> torch.Tensor:
    """Compute Lumina-Image-2.0's Transport.time_shift, where 0 is noise and 1 the image."""
    mu = lin_function((side // 16) ** 2)
    time = 1 - t
    time = 1 - time
    time = math.exp(mu) / (math.exp(mu) + (1 / time - 1))
    time = 1 - time
    return 1 - time


def qwen_levels(t: torch.Tensor, side: int) -> torch.Tensor:
    """Compute the levels of diffusers' scheduler: shifted, then stretched to end at 0.02."""
    levels = bfl_levels(t, lin_function((side // 16) ** 2, x2=8192, y2=0.9))
    return 1 - (1 - levels) / ((1 - levels[-1]) / (1 - 0.02))


def krea_levels(t: torch.Tensor, side: int) -> torch.Tensor:
    """Compute `timesteps` of krea-2's sampling.py; it interpolates mu from 256 to 1280 pixels."""
    x1, x2 = (256 // 16) ** 2, (1280 // 16) ** 2
    slope = (1.15 - 0.5) / (x2 - x1)
    return bfl_levels(t, slope * (side // 16) ** 2 + (0.5 - slope * x1))


# Functions of evenly spaced levels and the side in pixels: the levels in training (SOURCES) and in
# sampling (SAMPLING_SOURCES).
SOURCES: dict[str, Any] = {
    SD3: lambda t, _: shifted(t, 3),
    FLUX: lambda t, side: bfl_levels(t, lin_function((side // 16) ** 2)),
    KLEIN: klein_levels,
    Z_IMAGE: lambda t, _: shifted(t, 6),
    QWEN: qwen_levels,
    KREA: krea_levels,
    LUMINA: lumina_levels,
}
SAMPLING_SOURCES: dict[str, Any] = {
    **SOURCES,
    KLEIN: klein_sampling_levels,
    LUMINA: lambda t, _: shifted(t, 6),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", SOURCES)
def test_noise_levels_have_the_shift_of_the_models_authors_by_default(kind, side):
    t = even_levels()
    for words, expected in (
        ("", SOURCES[kind](t, side)),
        ("--timestep_shift model", SOURCES[kind](t, side)),
        ("--timestep_shift pipeline", SAMPLING_SOURCES[kind](t, side)),
        ("--timestep_shift none", t),
        ("--timestep_shift 1", t),
        ("--timestep_shift 2.5", shifted(t, 2.5)),
        ("--timestep_shift 0.5", shifted(t, 0.5)),
    ):
        levels = published_schedule(kind, words, side).sigmas
        torch.testing.assert_close(levels.double(), expected, rtol=2e-5, atol=0, msg=words)


def test_flux_2_and_lumina_2_are_trained_with_a_smaller_shift_than_they_sample_with():
    """At 1024 pixels the shift is exp(1.15) instead of 7.56 and 6 (see docs/models.md)."""
    for kind, sampling_shift in ((KLEIN, 7.56), (LUMINA, 6.0)):
        for words, shift in (("", 3.158), ("--timestep_shift pipeline", sampling_shift)):
            middle = float(published_schedule(kind, words, 1024).sigmas[LEVELS // 2])
            # At t = 1 / 2, s t / (1 + (s - 1) t) is s / (1 + s).
            assert middle / (1 - middle) == pytest.approx(shift, rel=1e-3)


RANGES = [(0.0, 0.8), (0.25, 1.0), (0.3, 0.55)]


def truncated(quantile: Any, low: float, high: float) -> Any:
    """Return the quantile function of a distribution that is truncated to [low, high]."""
    p = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    places = quantile(p)
    lowest = float((places < low).double().mean())
    highest = float((places <= high).double().mean())
    return lambda p: quantile(lowest + p * (highest - lowest))


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize(("kind", "words", "quantile", "arguments"), SAMPLING)
def test_a_range_of_a_flow_models_levels_keeps_their_distribution(
    kind, words, quantile, arguments, low, high
):
    schedule = flow_schedule(kind, f"{words} --timestep_shift 2 --timestep_range {low} {high}")
    shares = sampled_shares(schedule)
    numbers = (shares * LEVELS).long()
    levels = schedule.sigmas[numbers].double()
    assert levels.min() >= low
    assert levels.max() <= high
    # The place of a level s is 1 - t, with t = s / (2 - s) for a shift of 2.
    places = [1 - level / (2 - level) for level in (high, low)]
    assert_distribution(shares, truncated(quantile, *places))


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("words", ["", "--snr_gamma 5", "--do_edm_style_training"])
def test_a_range_of_a_diffusion_models_timesteps_keeps_them_uniform(words, low, high):
    schedule = diffusion_schedule(f"{words} --timestep_range {low} {high}")
    numbers = (sampled_shares(schedule) * LEVELS).long()
    latents = torch.zeros(len(numbers), 4, 1, 1)
    inputs = {"latents": latents, "noise": latents, "level_index": numbers}
    _, timesteps = schedule.add_noise(inputs)
    assert torch.equal(schedule.logged_level(numbers), timesteps.long())
    shares = timesteps.double() / LEVELS
    assert shares.min() >= low
    assert shares.max() <= high
    assert_distribution(shares, lambda p: low + p * (high - low))


@pytest.mark.parametrize("words", ["", "--weighting_scheme mode", "--logit_mean 1"])
def test_levels_within_a_range_equal_those_of_the_run_without_it(words):
    """Runs with and without a range are therefore paired, and a range of 0 to 1 changes nothing."""
    everywhere = flow_schedule(SD3, words)
    explicit = flow_schedule(SD3, f"{words} --timestep_range 0 1")
    bounded = flow_schedule(SD3, f"{words} --timestep_range 0.3 0.9")
    for seed in range(50):
        index, explicit_index, bounded_index = (
            schedule.sample_level_index(torch.Generator().manual_seed(seed))
            for schedule in (everywhere, explicit, bounded)
        )
        assert torch.equal(index, explicit_index)
        if 0.3 <= everywhere.sigmas[index] <= 0.9:
            assert torch.equal(index, bounded_index)


def test_the_held_out_grid_covers_all_levels_for_any_range():
    for words in ("", "--timestep_range 0.3 0.5"):
        schedule = flow_schedule(SD3, words)
        assert schedule.num_timesteps == LEVELS
        assert schedule.sigmas[grid_level_indices(LEVELS)[0]] > 0.9


INVALID_RANGES = {
    **dict.fromkeys(["0.8 0.2", "0.5 0.5", "0.5", "0.0 0.5 1.0"], "give two numbers from 0 to 1"),
    "-0.1 0.8": "is -0.1: give 0 or more",
    "0 1.5": "is 1.5: give at most 1, since 1 is the full noise",
    "nan 1": "is nan: give a finite number",
    "low high": '"low": give a number',
}


@pytest.mark.parametrize("numbers", INVALID_RANGES)
def test_an_invalid_range_is_refused(numbers, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"timestep_range: [{', '.join(numbers.split())}]\n", encoding="utf-8")
    for words in (f"--timestep_range {numbers}", f"--config {recipe}"):
        with pytest.raises(UserError, match=f"timestep_range .*{INVALID_RANGES[numbers]}"):
            configuration("mini", words)


def test_an_invalid_shift_is_refused():
    with pytest.raises(UserError, match=r"--timestep_shift is 0\.0: give a number above 0"):
        configuration("mini", "--timestep_shift 0")
    with pytest.raises(UserError, match='"flux": give a number or model or pipeline or none'):
        configuration("mini", "--timestep_shift flux")


def test_a_range_with_almost_no_samples_is_refused():
    for words in ("--timestep_range 0 0.001", "--logit_mean 12 --timestep_range 0.7 0.9"):
        with pytest.raises(UserError, match=r"--timestep_range .* has fewer than 1 in 10,000"):
            flow_schedule(SD3, words)
    with pytest.raises(UserError, match=r"--timestep_range 0.5005 0.5008 has fewer"):
        diffusion_schedule("--timestep_range 0.5005 0.5008")
    # A single level of the 1000 is enough.
    schedule = diffusion_schedule("--timestep_range 0.5 0.5005")
    assert int(schedule.sample_level_index(torch.Generator().manual_seed(0))) == 500


def test_a_range_is_refused_for_a_model_with_native_edm():
    pipeline = SimpleNamespace(scheduler=EDMEulerScheduler(num_train_timesteps=LEVELS))
    cfg = configuration("mini", "--timestep_range 0.2 0.8")
    with pytest.raises(UserError, match="an EDMEulerScheduler, whose noise levels are not"):
        noise_schedule(cfg, StableDiffusionXL(), pipeline)


def noise_levels(folder: Path, **values: Any) -> torch.Tensor:
    """Train for 6 steps of one image each; return the logged noise levels, from 0 to 1."""
    run = train(folder, train_batch_size=1, max_train_steps=6, resolution=64, **values)
    return torch.tensor(column(run, "noise_level_mean"), dtype=torch.float64) / LEVELS


@pytest.mark.slow
def test_shift_and_range_take_effect_in_training(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("timestep_shift: 4\ntimestep_range: [0.2, 0.7]\n", encoding="utf-8")
    klein = {"pretrained_model_name_or_path": shared(KLEIN)}
    even = noise_levels(tmp_path / "even", **klein, timestep_shift="none")
    levels = noise_levels(tmp_path / "model", **klein)
    # 64 pixels are 16 tokens.
    expected = shifted(even, math.exp(lin_function(16)))
    torch.testing.assert_close(levels, expected, rtol=1e-4, atol=0)

    levels = noise_levels(tmp_path / "recipe", **klein, config=recipe)
    expected = shifted(even, 4)
    is_kept = (expected >= 0.2) & (expected <= 0.7)
    assert is_kept.any()
    assert not is_kept.all()
    torch.testing.assert_close(levels[is_kept], expected[is_kept], rtol=1e-4, atol=0)
    assert 0.2 <= levels.min() < levels.max() <= 0.7

    recipe.write_text("timestep_range: [0.1, 0.3]\n", encoding="utf-8")
    timesteps = noise_levels(tmp_path / "sdxl", config=recipe)
    assert 0.1 <= timesteps.min() < timesteps.max() <= 0.3


@pytest.mark.slow
def test_a_checkpoint_of_a_run_with_other_noise_levels_is_refused(tmp_path):
    """The default of an earlier version was "pipeline", which trained FLUX.2 with another shift."""
    values = {"pretrained_model_name_or_path": shared(KLEIN), "resolution": 64}
    run = train(tmp_path / "run", **values, checkpointing_steps=1)
    saved = checkpoint.load(run / "checkpoints" / "step-1")
    saved.extra["config"]["timestep_shift"] = "pipeline"
    checkpoint.save(run, saved)
    sentence = 'timestep_shift was "pipeline" and is "model"'
    with pytest.raises(UserError, match=sentence):
        train(run, **values, resume_from_checkpoint="step-1", overwrite_output_dir=True)
    del saved.extra["config"]["timestep_range"]
    checkpoint.save(run, saved)
    with pytest.raises(UserError, match=sentence):
        train(run, **values, resume_from_checkpoint="step-1", overwrite_output_dir=True)
