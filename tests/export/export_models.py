"""Helpers that add adapters to small models and write LoRA files."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.core.lora_names import FILE_NAME
from bilora_diffusion.export.writer import save_diffusers
from tests.contract.models import tiny_clip, tiny_unet

FACTS = {"modelspec.date": "2026-01-31", "bilora.method": "bilora", "bilora.rho": "0.05"}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_TARGETS = (*ATTENTION, "conv1", "linear_1", "conv_in", "ff.net.2")


def make_unet() -> nn.Module:
    return tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def plain_models() -> dict[str, nn.Module]:
    return {
        "unet": make_unet(),
        "text_encoder": tiny_clip(),
        "text_encoder_2": tiny_clip(projection=True),
    }


def add_adapters(model: nn.Module, spec: AdapterSpec, seed: int = 0) -> nn.Module:
    """Add a primary and an auxiliary with random values."""
    adapters.inject(model, spec, PRIMARY)
    adapters.inject(model, AdapterSpec(rank=3, target_modules=spec.target_modules), AUXILIARY)
    adapters.activate(model, (PRIMARY, AUXILIARY))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in (PRIMARY, AUXILIARY):
            for parameter in adapters.parameters(model, name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def all_models(**options: Any) -> dict[str, nn.Module]:
    """Return the plain models with adapters, whose random values differ from model to model."""
    models = plain_models()
    for seed, (name, model) in enumerate(models.items(), start=1):
        spec = AdapterSpec(**options)
        if name == "unet":
            spec = AdapterSpec(target_modules=UNET_TARGETS, **options)
        add_adapters(model, spec, seed)
    return models


def export_all(folder: Path, models: dict[str, nn.Module]) -> Path:
    """Export the models in both formats, with the metadata of a training run."""
    save_diffusers(folder, models, base_model="some/base", kohya=True, extra_metadata=FACTS)
    return folder


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as content:
        return content.metadata()


def equal(path: Path, other_path: Path) -> bool:
    """Return whether two files have the same tensors."""
    left, right = load_file(path), load_file(other_path)
    if left.keys() != right.keys():
        return False
    return all(torch.equal(tensor, right[key]) for key, tensor in left.items())


def rewrite(
    source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, str]], Any]
) -> Path:
    """Copy a LoRA file with its tensors or metadata changed."""
    tensors, metadata = load_file(source), dict(read_metadata(source))
    change(tensors, metadata)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata)
    return target


TARGETS = {
    "unet": ("to_q", "to_v"),
    "text_encoder": ("q_proj", "v_proj"),
    "text_encoder_2": ("q_proj", "v_proj"),
}


def write_lora(
    folder: Path,
    pipeline: Any,
    *,
    size: float = 0.3,
    components: tuple[str, ...] = ("unet",),
    kohya: bool = False,
) -> Path:
    """Export random adapters of rank 2 for models of a pipeline; return the path of the file.

    Args:
        size: standard deviation of B's values; that of A's values is 0.1.
    """
    models = {name: copy.deepcopy(getattr(pipeline, name)) for name in components}
    generator = torch.Generator().manual_seed(0)
    for name, model in models.items():
        adapters.inject(model, AdapterSpec(rank=2, alpha=4, target_modules=TARGETS[name]), PRIMARY)
        with torch.no_grad():
            for key, parameter in adapters.named_parameters(model, PRIMARY).items():
                scale = size if "lora_B" in key else 0.1
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    facts = {"bilora.method": "lora", "modelspec.date": "2026-01-31"}
    save_diffusers(folder, models, base_model="mini", kohya=kohya, extra_metadata=facts)
    return folder / FILE_NAME
