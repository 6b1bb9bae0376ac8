"""Keeping a class without images of it: what the adapters change of its prediction is a loss."""

from pathlib import Path

import pytest
import torch

from bilora_diffusion import adapters
from bilora_diffusion.image.denoising import Denoising, DreamBoothModule
from bilora_diffusion.image.families.sdxl import StableDiffusionXL
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.prompts import embed
from tests.scripts.runs import column, train, two_icons

CLASS = "an icon of a rabbit"


def measured(run: Path) -> float:
    """Departure of the miniature's prediction for the class by a run's adapter."""
    pipeline = load_pipeline("mini", dtype=torch.float32)
    pipeline.load_lora_weights(str(run), weight_name="pytorch_lora_weights.safetensors")
    module = DreamBoothModule(StableDiffusionXL(), pipeline.unet, [], Denoising(pipeline.scheduler))
    inputs = {
        "prior": embed(pipeline, [CLASS] * 8),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 8),
    }
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(8, 8, 8, 8, generator=random)
    with torch.no_grad():
        return float(module.departures(inputs, noisy, torch.arange(50, 850, 100)).mean())


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
    told = {"sequence": torch.randn(2, 32, 192), "pooled": torch.randn(2, 96)}
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    found = module.departures({"prior": told, "time_ids": sizes}, noisy, levels)
    known = {"added_cond_kwargs": {"text_embeds": told["pooled"], "time_ids": sizes}}
    with torch.no_grad():
        now, then = (
            unet(noisy, levels, told["sequence"], **known).sample for unet in (pipeline, plain)
        )
    assert torch.allclose(found, (now - then).square().flatten(1).mean(1), rtol=1e-4)
    found.sum().backward()
    for name in (adapters.PRIMARY, adapters.AUXILIARY):
        gradients = [p.grad for p in adapters.parameters(pipeline, name)]
        assert all(g is not None and bool(g.any()) for g in gradients)


@pytest.mark.slow
def test_the_class_stays_while_the_subject_is_learned(tmp_path):
    shared = {**two_icons(tmp_path / "icons"), "class_prompt": CLASS, "max_train_steps": 16}
    shared |= {"train_batch_size": 2, "validation_loss_steps": 16}
    free = train(tmp_path / "free", **shared)
    kept = train(tmp_path / "kept", **shared, prior_prediction_weight=3)
    assert column(free, "digest") == column(kept, "digest")
    first = [column(run, "loss")[0] for run in (free, kept)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # nothing is changed yet
    assert measured(kept) < measured(free) / 2
    losses = [column(run, "train_grid_loss") for run in (free, kept)]
    falls = [before - after for before, after in losses]
    assert falls[1] > 0.7 * falls[0] > 0
