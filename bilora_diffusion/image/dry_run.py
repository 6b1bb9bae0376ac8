"""Memory of a dry run of images beside what is trained: models, pictures, activations."""

from typing import Any

import torch
from torch import nn

from ..adapters.quantize import held_bytes
from ..train.dry_run import BEFORE, NUMBER, STEP, Moments
from . import buckets
from .config import DreamBoothConfig
from .latents import AT_ONCE

HELD = {
    "StableDiffusionXLPipeline": (0, 46, 7, 540),  # all of a UNet is one block
    "StableDiffusion3Pipeline": (154, 1, 25, 21),
    "FluxPipeline": (512, 1, 27, 14.6),
    "Flux2KleinPipeline": (512, 1, 100, 24),
    "ZImagePipeline": (64, 1, 37, 29),
    "QwenImagePipeline": (64, 1, 26, 17),
    "Krea2Pipeline": (64, 1.2, 29, 22),
    "Lumina2Pipeline": (64, 3.3, 45, 35),
}
"""By the class of the pipeline: a prompt's tokens; then numbers for each token (or place of SDXL's
latents) and unit of width that each block keeps with gradient checkpointing, that one holds
beside, and that each keeps without.
"""
ENCODED, DECODED = 20, 24
"""Bytes of an autoencoder in fp32 for each pixel and channel of its outermost layer."""


def moments(task: Any, device: torch.device) -> Moments:
    """Memory of a task whose models are empty; on a CPU all are there from the start."""
    cfg, family, pipeline = task.cfg, task.family, task.pipeline
    few = {*task.models, *(family.encoders if family.flow else ())}
    sizes = {
        name: held_bytes(model, cfg.quantize if name in few else "none")
        for name in family.parts
        if isinstance(model := getattr(pipeline, name, None), nn.Module)
    }
    on_cpu, visitors = device.type == "cpu", set(family.encoders) - set(task.models)
    stay = sizes.keys() - (visitors if family.flow or not on_cpu else set())
    resting = {"vae"} if cfg.offload and not on_cpu else set()

    def weights(names: Any) -> dict[str, int]:
        return {f"weights: {name}": size for name, size in sizes.items() if name in names}

    cut = buckets.sizes(cfg.resolution, cfg.aspect_ratio_buckets)
    pixels, config = max(h * w for h, w in cut), pipeline.vae.config
    encoded = ENCODED * max(pixels, min(AT_ONCE, cfg.train_batch_size * pixels))
    drawn = DECODED * max((s["width"] * s["height"] for s in cfg.samples), default=0)
    channels = config.get("base_dim") or config["block_out_channels"][0]
    denoiser, places = task.models[family.denoiser], pixels // family.patch**2
    return {
        BEFORE: weights(sizes if on_cpu else visitors | {"vae"} - resting),
        "encoding or drawing": {**weights(stay), "pictures": channels * max(encoded, drawn)},
        STEP: {**weights(stay - resting), "activations": _held(family, denoiser, places, cfg)},
    }


def _held(family: Any, denoiser: Any, places: int, cfg: DreamBoothConfig) -> int:
    config, (text, kept, more, block) = denoiser.config, HELD[family.pipeline]
    blocks = sum(len(m) for m in denoiser.children() if isinstance(m, nn.ModuleList))
    width = config.get("dim") or config.get("hidden_size")
    if not family.flow:
        width, blocks = config["block_out_channels"][0], 1
    width = width or config["num_attention_heads"] * config["attention_head_dim"]
    each = blocks * kept + more if cfg.gradient_checkpointing else blocks * block
    return int(cfg.train_batch_size * (places + text) * width * NUMBER[cfg.mixed_precision] * each)
