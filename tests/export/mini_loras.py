"""LoRA files for the miniature with weights that are random or do nothing, without training."""

import copy
from pathlib import Path
from typing import Any

import torch

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.export.writer import save_diffusers
from bilora_diffusion.lora_names import FILE_NAME
from eval.sources import find
from eval.subjects import Subject
from tests.export.export_models import rewrite

__all__ = ["one", "rewrite", "write_lora"]

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
    """Export a LoRA of rank 2 for the pipeline's models; B is drawn with deviation ``size``."""
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


def one(argument: str | Path) -> Subject:
    """The subject that a single argument names."""
    return find(str(argument))
