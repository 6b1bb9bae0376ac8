"""Exported files in the real pipeline: the miniature draws the same images from file and memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from bilora_diffusion import adapters, mini
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.export import FILE_NAME, inspect, kohya_file_name, save_diffusers, verify

MODELS = ("unet", "text_encoder", "text_encoder_2")
# Of pixels in [0, 1], where alpha / rank is 1.5 and rounding s * B to fp32 differs from PEFT's
# rounding of s * (B A x). Measured: 8e-6.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(mini.pipeline_dir(), dtype=torch.float32)


def copied(base: StableDiffusionXLPipeline) -> Any:
    """A pipeline of its own: loading LoRA changes the models in place."""
    parts = dict(base.components)
    parts |= {name: copy.deepcopy(parts[name]) for name in (*MODELS, "scheduler")}
    pipeline = StableDiffusionXLPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any) -> np.ndarray:
    """One image, (height, width, 3) in [0, 1], after two steps with guidance."""
    result = pipeline(
        "a 3D icon of a fox",
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    return result.images[0]


def targets(name: str, model: nn.Module, every_layer: bool) -> tuple[str, ...]:
    if every_layer:
        layers = model.named_modules()
        return tuple(path for path, m in layers if isinstance(m, nn.Linear | nn.Conv2d))
    last = "to_out.0" if name == "unet" else "out_proj"
    return (*("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj"), last)


@pytest.mark.parametrize(
    ("names", "alpha", "dora", "every_layer"),
    [
        (MODELS, 8, False, False),
        (MODELS, 6, False, False),
        (MODELS, 8, True, False),
        (("unet",), 8, False, False),
        (("unet",), 8, False, True),
    ],
)
def test_images_from_file_equal_those_from_memory(
    base: Any, tmp_path: Path, names: tuple[str, ...], alpha: int, dora: bool, every_layer: bool
) -> None:
    """For a primary beside an auxiliary on these models, all values random."""
    trained, loaded, noise = copied(base), copied(base), torch.Generator().manual_seed(1)
    models = {name: getattr(trained, name) for name in names}
    for name, model in models.items():
        places = targets(name, model, every_layer)
        spec = AdapterSpec(rank=4, alpha=alpha, use_dora=dora, target_modules=places)
        adapters.inject(model, spec, PRIMARY)
        adapters.inject(model, AdapterSpec(target_modules=places), AUXILIARY)
        adapters.activate(model, (PRIMARY, AUXILIARY))
        with torch.no_grad():
            for adapter in (PRIMARY, AUXILIARY):
                for parameter in adapters.parameters(model, adapter):
                    if parameter.dim() > 1:  # DoRA's magnitudes stay those of the weights
                        parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    save_diffusers(tmp_path, models, base_model="mini", kohya=True)
    layers = inspect(tmp_path / FILE_NAME).layers
    assert verify(tmp_path, models)["layers"] == sum(layers[name] for name in names)
    with adapters.only(nn.ModuleDict(models), [PRIMARY]):
        expected = draw(trained)
    assert np.abs(draw(base) - expected).max() > 0.05
    assert np.abs(draw(trained) - expected).max() > 0.01  # here the auxiliary acts too

    tolerance = 0 if alpha == 8 and not every_layer else TOLERANCE
    loaded.load_lora_weights(tmp_path)  # of the two files, diffusers takes its own
    assert np.abs(draw(loaded) - expected).max() <= tolerance
    if not dora:  # diffusers drops dora_scale from kohya files
        loaded.unload_lora_weights()
        loaded.load_lora_weights(tmp_path, weight_name=kohya_file_name(tmp_path))
        assert len(adapters.layers(loaded.unet)) == layers["unet"]
        assert np.abs(draw(loaded) - expected).max() <= tolerance
