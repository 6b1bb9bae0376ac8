"""T-LoRA of `benchmarks/t_lora.py`, a method that a script registers."""

import runpy
from pathlib import Path

import pytest
import torch

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.methods import Target, create, registry
from tests.contract.models import UNET_TARGETS, tiny_sd3, tiny_unet

T_LORA = Path(__file__).resolve().parents[2] / "benchmarks" / "t_lora.py"


@pytest.mark.parametrize("build", [tiny_unet, tiny_sd3])
def test_t_lora_masks_the_last_ranks_of_the_noisiest_rows(monkeypatch, build):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    runpy.run_path(str(T_LORA))
    model, method = build(), create("t-lora")
    spec = AdapterSpec(rank=8, alpha=8, target_modules=UNET_TARGETS)
    method.setup([Target("model", model, spec, 1e-3)])
    latents, context = torch.randn(1, 4, 8, 8), {"encoder_hidden_states": torch.randn(1, 3, 8)}
    context |= {} if build is tiny_unet else {"pooled_projections": torch.randn(1, 8)}
    for timestep, acting in ((0, 8), (499, 6), (500, 6), (501, 5), (999, 4)):
        model.zero_grad()
        made = model(latents, timestep=torch.tensor([timestep]), **context).sample
        made.square().sum().backward()
        for name, layer in method.layers():
            gradient = adapters.weights(layer, PRIMARY)[1].grad
            columns = gradient.flatten(1).abs().sum(0) > 0
            if "conv" in name or "to_out" in name:  # where every hidden channel matters
                assert columns.tolist() == [True] * acting + [False] * (8 - acting), timestep
