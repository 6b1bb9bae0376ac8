"""Exports of a primary whose init changed the base weights fit the unchanged ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bilora_diffusion import BiLoRAConfig, attach
from bilora_diffusion.adapters import CHANGE_BASE
from bilora_diffusion.errors import TrainingError
from bilora_diffusion.export import FILE_NAME, inspect, save_diffusers, verify
from tests.contract.models import tiny_clip
from tests.export.export_models import ATTENTION, make_unet, rewrite


def unet_output(model: nn.Module) -> Tensor:
    latents = torch.linspace(-1, 1, 2 * 4 * 64).view(2, 4, 8, 8)
    context = torch.linspace(1, -1, 2 * 3 * 8).view(2, 3, 8)
    added = {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)}
    steps = torch.tensor([3, 700])
    return cast(Any, model)(latents, steps, context, added_cond_kwargs=added).sample


def text_output(model: nn.Module) -> Tensor:
    return cast(Any, model)(input_ids=torch.arange(1, 13).view(2, 6)).last_hidden_state


def train(model: nn.Module, output, steps: int = 3, **options: Any):
    """Some steps of Bi-LoRA through the API; returns its handle."""
    bilora = attach(model, BiLoRAConfig(rho=0.02, **options))

    def forward_backward() -> None:
        (output(model) - 1).square().mean().backward()

    if options["init"] == "lora-ga":
        bilora.initialise(forward_backward)
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=1e-2))
    bilora.bind(optimizer)
    for _ in range(steps):
        forward_backward()
        optimizer.step()
        optimizer.zero_grad()
    return bilora


@pytest.mark.parametrize(("init", "use_dora"), zip(CHANGE_BASE, (True, False), strict=True))
def test_a_diffusers_file_gives_the_same_outputs(init, use_dora, tmp_path: Path) -> None:
    unet, encoder = make_unet(), tiny_clip()
    plain = copy.deepcopy(unet)
    options: dict[str, Any] = {"rank": 2, "alpha": 3, "init": init, "use_dora": use_dora}
    targets = (*ATTENTION, "conv1")
    bilora = train(unet, unet_output, target_modules=targets, **options)
    train(encoder, text_output, **options)
    models = {"unet": unet, "text_encoder": encoder}
    save_diffusers(tmp_path, models, base_model="some/base", kohya=True)
    report = verify(tmp_path, models)
    assert report["max_relative_difference"] < 2e-7
    assert report["kohya_max_relative_difference"] < 2e-7
    contents = inspect(tmp_path / FILE_NAME)
    assert contents.ranks == contents.alphas == {"unet": (4,), "text_encoder": (4,)}
    assert not contents.evidence
    assert contents.metadata["ss_network_dim"] == contents.metadata["ss_network_alpha"] == "4"
    for name, value in (("rank", 2), ("alpha", 3)):
        original = json.loads(contents.metadata[f"bilora.original_{name}"])
        assert original == {"unet": value, "text_encoder": value}
    cast(Any, plain).load_lora_adapter(str(tmp_path), prefix="unet", weight_name=FILE_NAME)
    with torch.no_grad(), bilora.evaluating():
        torch.testing.assert_close(unet_output(plain), unet_output(unet), rtol=1e-5, atol=1e-5)

    def forget(tensors, metadata) -> None:
        for key, value in tensors.items():
            if "lora_B" in key:
                value[:, 2:] = 0  # what the init took out of the base

    rewrite(tmp_path / FILE_NAME, tmp_path / FILE_NAME, forget)
    with pytest.raises(TrainingError, match="differs"):
        verify(tmp_path, models)
