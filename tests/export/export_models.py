"""Small models with a primary and an auxiliary, and their exported files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.export import FILE_NAME, save_diffusers, training_facts

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_TARGETS = (*ATTENTION, "conv1", "linear_1", "conv_in", "ff.net.2")


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def make_text_encoder(projection: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=8,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def add_adapters(model: nn.Module, spec: AdapterSpec, seed: int = 0) -> nn.Module:
    """A primary and an auxiliary whose values are all random."""
    adapters.inject(model, spec, PRIMARY)
    adapters.inject(model, AdapterSpec(rank=3, target_modules=spec.target_modules), AUXILIARY)
    adapters.activate(model, (PRIMARY, AUXILIARY))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in (PRIMARY, AUXILIARY):
            for parameter in adapters.parameters(model, name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def all_models(**options) -> dict[str, nn.Module]:
    return {
        "unet": add_adapters(make_unet(), AdapterSpec(target_modules=UNET_TARGETS, **options), 1),
        "text_encoder": add_adapters(make_text_encoder(), AdapterSpec(**options), 2),
        "text_encoder_2": add_adapters(make_text_encoder(True), AdapterSpec(**options), 3),
    }


def export_all(folder: Path, models: dict[str, nn.Module]) -> Path:
    """Both formats, with the metadata of a training run."""
    facts = training_facts(
        method="bilora", rho=0.05, date="2026-01-31", resolution=64, prediction_type="epsilon"
    )
    save_diffusers(folder, models, base_model="some/base", kohya=True, extra_metadata=facts)
    return folder


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as content:
        return content.metadata()


def alter(folder: Path, target: Path, change) -> None:
    """Copy the diffusers file of `folder` to `target` with its tensors or metadata changed."""
    tensors, metadata = load_file(folder / FILE_NAME), read_metadata(folder / FILE_NAME)
    change(tensors, metadata)
    target.mkdir(exist_ok=True)
    save_file(tensors, target / FILE_NAME, metadata)
