"""Every method, init and precision of the base through the script: what runs see and leave."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.methods import names
from bilora_diffusion.mini import pipeline_dir
from bilora_diffusion.run import runlog
from bilora_diffusion.run.checkpoint import ADAPTERS
from tests.scripts.runs import (
    column,
    difference,
    resumes_exactly,
    train,
    train_once,
    two_icons,
)

PROMPT = "a TOK icon of a rabbit"
DRAWN = {"validation_prompt": PROMPT, "num_validation_images": 1}
PISSA = {"init_lora_weights": "pissa", "use_dora": True, "lora_alpha": 6, "use_ema": True}
USUAL = ("lora-sam", "flat-lora")
GA = {"init_lora_weights": "lora-ga", "lora_ga_samples": 4}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.slow if name in USUAL else pytest.mark.matrix)
        for name in names()
    ],
)
def test_methods_see_the_same_and_resume_exactly(tmp_path, method):
    """What the contract suite has of each method holds for whole runs: data, first loss, resume."""
    shared = {"checkpointing_steps": 1, "train_batch_size": 1}
    plain = train_once(method="lora", **shared)
    run = train(tmp_path / method, method=method, **shared)
    assert column(run, "digest") == column(plain, "digest")
    if method != "flat-lora":  # adapters start as the base; the noise is Flat-LoRA's
        assert column(run, "loss")[0] == pytest.approx(column(plain, "loss")[0], abs=1e-6)
    resumes_exactly(run, 1, method=method, **shared)


@pytest.mark.slow
def test_class_images_see_no_samples_auxiliary(tmp_path):
    """Beside images of the class the auxiliaries move as without them, and a resume is exact."""
    shared = {"auxiliaries": "sample", "rho": 0.5, "checkpointing_steps": 1, "max_train_steps": 3}
    own = two_icons(tmp_path / "own")
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": own["validation_dataset"],
        "class_prompt": "an icon",
        "num_class_images": 2,
        "prior_loss_weight": 1e-9,
    }
    shared |= own | {"validation_dataset": "none", "train_batch_size": 2}
    plain = train(tmp_path / "plain", **shared)
    beside = train(tmp_path / "beside", **shared, **prior)
    assert difference(plain, beside) < 1e-5
    kept = [load_file(f / "checkpoints/step-3/adapters.safetensors") for f in (plain, beside)]
    moved = [key for key in kept[0] if "/auxiliary/" in key]
    assert len(moved) == 2
    for key in moved:
        torch.testing.assert_close(kept[0][key], kept[1][key], rtol=1e-3, atol=1e-5)
    resumes_exactly(beside, 2, **shared, **prior)


def test_full_fine_tuning_leaves_a_unet_that_loads(tmp_path):
    folder = train(tmp_path / "run", method="full", learning_rate=1e-5)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline_dir(), unet=unet)
    base = StableDiffusionXLPipeline.from_pretrained(pipeline_dir()).unet.float()
    moved = [
        (a - b).abs().max()
        for a, b in zip(pipeline.unet.parameters(), base.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 1e-4
    report = runlog.read_run(folder)["results"]["export"]["unet"]
    assert report == {"weights": 17317128, "readback_difference": 0.0}
    assert "subfolder='unet'" in (folder / "README.md").read_text()
    assert len({file.stat().st_mode for file in (folder / "unet").iterdir()}) == 1


@pytest.mark.slow
def test_a_schedule_does_not_go_on_beyond_its_length(tmp_path):
    """Flat-LoRA's noise depends on how long the run is, so a longer one is another run."""
    train(tmp_path / "run", method="flat-lora", checkpointing_steps=2)
    longer = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="num_steps was 2 and is 4"):
        train(tmp_path / "run", method="flat-lora", **longer)


def whole_pipeline() -> Any:
    return StableDiffusionXLPipeline.from_pretrained(pipeline_dir(), dtype=torch.float32)


@pytest.mark.slow
def test_the_file_on_the_unchanged_pipeline_draws_the_runs_image(tmp_path):
    folder = train(tmp_path / "run", **PISSA, **DRAWN, max_train_steps=4)
    (file,) = (folder / "validation" / "step-4").glob("*.png")
    pipeline = whole_pipeline()
    images = [np.asarray(Image.open(file), dtype=int)]
    (before,) = generate(pipeline, [PROMPT], [0], size=64)
    pipeline.load_lora_weights(str(folder))
    (after,) = generate(pipeline, [PROMPT], [0], size=64)
    images += [np.asarray(image, dtype=int) for image in (after, before)]
    assert np.abs(images[0] - images[1]).max() <= 2  # of 255, after 25 steps
    assert np.abs(images[0] - images[2]).max() > 10


@pytest.mark.slow
def test_methods_start_alike_and_see_the_data_of_other_inits(tmp_path):
    other_cut = {"method": "lora", "train_batch_size": 4, "gradient_accumulation_steps": 1}
    runs = [train_once(), train_once(checkpointing_steps=1, **GA)]
    runs += [train(tmp_path / "cut", checkpointing_steps=1, **GA, **other_cut)]
    digests = [column(run, "digest") for run in runs]
    assert digests[0] == digests[1] == digests[2]
    first = [column(run, "loss")[0] for run in runs]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)  # each starts as the base
    held = [load_file(run / "checkpoints" / "step-1" / ADAPTERS) for run in runs[1:]]
    initial = [key for key in held[0] if "/initial/" in key]
    assert initial
    for key in initial:  # the gradient was cut otherwise, so not to the bit
        torch.testing.assert_close(held[0][key], held[1][key], rtol=1e-3, atol=1e-3)
