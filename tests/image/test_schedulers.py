"""`--sampling_scheduler`: images equal those of diffusers, and invalid values are refused."""

from typing import Any

import diffusers
import pytest
import torch

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.families import FAMILIES, SDXL
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.image.schedulers import possible_schedulers
from tests.image.image_folders import difference
from tests.image.tiny import make_pipeline

PROMPTS = ["a TOK icon of a rabbit", "an icon"]
SIZE = {"height": 64, "width": 64}
SCHEDULERS = possible_schedulers("EulerDiscreteScheduler")
FLOW_MODELS = [kind for kind in FAMILIES if kind != SDXL]
TRAILING = "EulerDiscreteScheduler:timestep_spacing=trailing"


def with_slow(names, fast):
    """Return test parameters, all marked as slow except for the names in `fast`."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return load_pipeline("mini", dtype=torch.float32)


@pytest.mark.parametrize("name", with_slow(SCHEDULERS, fast=("LCMScheduler", "TCDScheduler")))
def test_images_equal_those_of_diffusers_with_the_same_scheduler(name, sdxl):
    usual = sdxl.scheduler
    options: Any = {"size": 64, "steps": 4, "guidance_scale": 1.0}
    (image,) = generate(
        sdxl, PROMPTS[:1], [3], scheduler=f"{name}:prediction_type=epsilon", **options
    )
    try:
        sdxl.scheduler = getattr(diffusers, name).from_config(usual.config)
        (expected,) = sdxl(
            PROMPTS[0],
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(3),
            **SIZE,
        ).images
    finally:
        sdxl.scheduler = usual
    assert difference([image], [expected]) <= 1
    (usual_image,) = generate(sdxl, PROMPTS[:1], [3], **options)
    assert name == type(usual).__name__ or difference([image], [usual_image]) > 1


def test_trailing_steps_change_the_images_and_leave_the_pipelines_scheduler_unchanged(sdxl):
    options: Any = {"size": 64, "steps": 4}
    trailing = generate(sdxl, PROMPTS[:1], [3], scheduler=TRAILING, **options)
    assert difference(trailing, generate(sdxl, PROMPTS[:1], [3], **options)) > 4
    # The pipeline's scheduler is unchanged.
    assert sdxl.scheduler.config.timestep_spacing != "trailing"


@pytest.mark.parametrize("kind", with_slow(FLOW_MODELS, fast=("ZImagePipeline",)))
def test_flow_models_sample_with_another_shift_or_with_noise_from_each_images_seed(kind):
    pipeline: Any = make_pipeline(kind)
    options: Any = {"size": 64, "steps": 2}
    usual = generate(pipeline, PROMPTS[:1], [3], **options)
    fixed = "FlowMatchEulerDiscreteScheduler:use_dynamic_shifting=false,shift="
    shifted = generate(pipeline, PROMPTS[:1], [3], scheduler=f"{fixed}9", **options)
    assert difference(usual, shifted) > 0
    # Each step of these samplers adds noise, which depends only on the image's seed.
    stochastic = "FlowMatchEulerDiscreteScheduler:stochastic_sampling=true"
    for scheduler in ("FlowMatchLCMScheduler", stochastic):
        both = generate(pipeline, PROMPTS, [3, 4], scheduler=scheduler, **options)
        torch.manual_seed(0)
        second = generate(pipeline, PROMPTS[1:], [4], scheduler=scheduler, **options)
        assert difference(both[1:], second) <= 1
        assert difference(both[:1], usual) > 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("LCM", r'is "LCM".*: use one of LCMScheduler, '),
        ("EulerDiscretScheduler", r'did you mean "EulerDiscreteScheduler"'),
        ("FlowMatchEulerDiscreteScheduler", "use one of LCMScheduler"),
        ("DPMSolverSDEScheduler", "use one of LCMScheduler"),
        (TRAILING.replace("spacing", "spacin"), r'did you mean "timestep_spacing"'),
        (TRAILING.replace("trailing", "trail"), r"can't be used with 25 steps \(trail is not"),
        ("LCMScheduler:original_inference_steps=10", "can't be used with 25 steps"),
        ("LCMScheduler:original_inference_steps", r"write KEY=VALUE"),
        ("LCMScheduler:beta_schedule=steep", "can't be used"),
    ],
)
def test_unusable_schedulers_are_refused_before_training(value, message):
    with pytest.raises(UserError, match=message):
        resolve(["--dataset", "mini", "--output_dir", "out", "--sampling_scheduler", value])


def test_a_flow_model_needs_a_flow_matching_scheduler():
    argv = ["--dataset", "mini", "--pretrained_model_name_or_path", "mini-flow"]
    argv += ["--output_dir", "out", "--sampling_scheduler"]
    with pytest.raises(UserError, match=r"use one of FlowMatchEulerDiscreteScheduler, FlowMatchL"):
        resolve([*argv, "LCMScheduler"])
    flow = resolve([*argv, "FlowMatchEulerDiscreteScheduler:shift=3"])
    assert flow.sampler_settings["sampling_scheduler"].endswith("shift=3")
