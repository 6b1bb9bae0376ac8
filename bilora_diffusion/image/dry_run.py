"""Memory of a dry run of images beside what is trained: models, pictures, activations."""

from typing import Any

import torch
from torch import nn

from ..adapters.quantize import held_bytes
from ..train.dry_run import BEFORE, NUMBER, STEP, Moments
from . import buckets
from .config import DreamBoothConfig
from .latents import AT_ONCE

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
    drawn = DECODED * max((sample.width * sample.height for sample in cfg.samples), default=0)
    channels = config.get("base_dim") or config["block_out_channels"][0]
    denoiser, places = task.models[family.denoiser], pixels // family.patch**2
    return {
        BEFORE: weights(sizes if on_cpu else visitors | {"vae"} - resting),
        "encoding or drawing": {**weights(stay), "pictures": channels * max(encoded, drawn)},
        STEP: {**weights(stay - resting), "activations": _held(family, denoiser, places, cfg)},
    }


def _held(family: Any, denoiser: Any, places: int, cfg: DreamBoothConfig) -> int:
    """Bytes of the activations of a micro-batch, by the family's coefficients."""
    config, numbers = denoiser.config, family.activations
    if family.flow:
        lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
        blocks = sum(len(blocks) for blocks in lists)
        width = config.get("dim") or config.get("hidden_size")
        width = width or config["num_attention_heads"] * config["attention_head_dim"]
    else:  # a UNet, whose coefficients are of the whole
        width, blocks = config["block_out_channels"][0], 1
    per_token = blocks * numbers.block
    if cfg.gradient_checkpointing:
        per_token = blocks * numbers.checkpointed + numbers.recomputed
    tokens = cfg.train_batch_size * (places + numbers.prompt_tokens)
    return int(tokens * width * NUMBER[cfg.mixed_precision] * per_token)
