"""Memory of a dry run of images beside what is trained: models, pictures, activations."""

from typing import Any

import torch
from torch import nn

from ..adapters.quantize import held_bytes
from ..train.dry_run import BEFORE, NUMBER_BYTES, STEP, PhaseMemory
from . import buckets
from .config import DreamBoothConfig
from .latents import AT_ONCE

ENCODED_BYTES, DECODED_BYTES = 20, 24
"""Bytes of an autoencoder in fp32 for each pixel and channel of its outermost layer."""


def memory_by_phase(task: Any, device: torch.device) -> PhaseMemory:
    """Memory of a task whose models are empty, in each phase of a run.

    On a CPU all models are in memory from the start. On a GPU text encoders that are not trained
    leave before the first step, and with ``--offload`` the autoencoder rests meanwhile.
    """
    cfg, family, pipeline = task.cfg, task.family, task.pipeline
    quantized = set(task.models)
    if family.flow:
        quantized |= set(family.encoders)
    sizes: dict[str, int] = {}
    for name in family.parts:
        model = getattr(pipeline, name, None)
        if isinstance(model, nn.Module):
            sizes[name] = held_bytes(model, cfg.quantize if name in quantized else "none")

    on_cpu = device.type == "cpu"
    frozen_encoders = set(family.encoders) - set(task.models)
    staying = set(sizes)
    if family.flow or not on_cpu:
        staying -= frozen_encoders
    resting = {"vae"} if cfg.offload and not on_cpu else set()
    before = set(sizes) if on_cpu else (frozen_encoders | {"vae"}) - resting

    def weights(names: set[str]) -> dict[str, int]:
        return {f"weights: {name}": size for name, size in sizes.items() if name in names}

    crops = buckets.sizes(cfg.resolution, cfg.aspect_ratio_buckets)
    pixels = max(height * width for height, width in crops)
    vae_config = pipeline.vae.config
    channels = vae_config.get("base_dim") or vae_config["block_out_channels"][0]
    encoded = ENCODED_BYTES * max(pixels, min(AT_ONCE, cfg.train_batch_size * pixels))
    sampled_pixels = [sample.width * sample.height for sample in cfg.samples]
    decoded = DECODED_BYTES * max(sampled_pixels, default=0)
    pictures = channels * max(encoded, decoded)

    places = pixels // family.patch**2
    activations = activation_bytes(family, task.models[family.denoiser], places, cfg)
    return {
        BEFORE: weights(before),
        "encoding or drawing": {**weights(staying), "pictures": pictures},
        STEP: {**weights(staying - resting), "activations": activations},
    }


def activation_bytes(family: Any, denoiser: Any, places: int, cfg: DreamBoothConfig) -> int:
    """Bytes that the denoiser's activations take in a step.

    Args:
        family: Kind of the base model.
        denoiser: Denoiser whose weights are empty.
        places: Places of the latents, or tokens of the image.
        cfg: Configuration of the run.
    """
    config, counts = denoiser.config, family.activations
    if family.flow:
        lists = [module for module in denoiser.children() if isinstance(module, nn.ModuleList)]
        blocks = sum(map(len, lists))
        heads, head_width = config.get("num_attention_heads"), config.get("attention_head_dim")
        width = config.get("dim") or config.get("hidden_size") or heads * head_width
    else:  # a UNet, whose coefficients are of the whole
        blocks, width = 1, config["block_out_channels"][0]
    if cfg.gradient_checkpointing:
        numbers = blocks * counts.checkpointed + counts.recomputed
    else:
        numbers = blocks * counts.block
    tokens = cfg.train_batch_size * (places + counts.prompt_tokens)
    return int(tokens * width * NUMBER_BYTES[cfg.mixed_precision] * numbers)
