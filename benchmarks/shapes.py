"""Shapes that a step is measured on: random model, inputs, loss, and training's adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from random_models import TEXT_LENGTH, llama_7b, sdxl, t5_base
from torch import Tensor, nn
from torch.nn import functional

from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.mini import pipeline_dir

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNet: Any = UNet2DConditionModel
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One workload.

    Args:
        note: what it is, for the report; "{batch}" stands for the number of samples.
        build: makes the model; called under any default device.
        inputs: (model, samples, dtype, device, generator) -> tensors of one batch.
        loss: (model, inputs) -> scalar.
        lr: learning rate, so that the adapters grow as they do in training.
        batch, dtype, steps: samples of a step, precision of the base and rounds by default.
    """

    note: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]
    loss: Callable[[Any, Inputs], Tensor]
    spec: AdapterSpec
    lr: float
    batch: int
    dtype: str
    steps: int
    warmup: int


def _unet_inputs(
    pixels: int, length: int, model: Any, batch: int, dtype: Any, device: Any, generator: Any
) -> Inputs:
    """Latents, prompt embeddings and size conditioning for images of ``pixels`` x ``pixels``."""
    config = model.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device=device, dtype=dtype)

    latents = (batch, config.in_channels, pixels // 8, pixels // 8)
    sizes = torch.tensor([pixels, pixels, 0, 0, pixels, pixels]).expand(batch, 6)
    return {
        "sample": normal(*latents),
        "noise": normal(*latents),
        "timestep": torch.randint(1000, (batch,), generator=generator).to(device),
        "encoder_hidden_states": normal(batch, length, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": normal(batch, pooled),
            "time_ids": sizes.to(device=device, dtype=dtype),
        },
    }


def _unet_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Mean squared error of the predicted noise."""
    arguments = {name: value for name, value in inputs.items() if name != "noise"}
    predicted = model(**arguments, return_dict=False)[0]
    return functional.mse_loss(predicted.float(), inputs["noise"].float())


def _text_inputs(
    source: int, target: int | None, model: Any, batch: int, _: Any, device: Any, generator: Any
) -> Inputs:
    """Sequences without padding, all of them targets unless these have a length of their own."""

    def tokens(length: int) -> Tensor:
        size = (batch, length)
        return torch.randint(2, model.config.vocab_size, size, generator=generator).to(device)

    ids = tokens(source)
    labels = ids if target is None else tokens(target)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


MINI = Shape(
    note="UNet of the miniature, rank 4 on attention, batch {batch} of 64 px",
    build=lambda: UNet.from_config(UNet.load_config(pipeline_dir(), subfolder="unet")),
    inputs=partial(_unet_inputs, 64, 32),
    loss=_unet_loss,
    spec=AdapterSpec(rank=4, alpha=8, target_modules=ATTENTION),
    lr=2e-4,
    batch=4,
    dtype="fp32",
    steps=200,
    warmup=5,
)
T5 = Shape(
    note="T5-base, rank 8 on every linear layer, batch {batch} of 128 + 8 tokens",
    build=t5_base,
    inputs=partial(_text_inputs, 128, 8),  # the paper allows 256
    loss=lambda model, inputs: model(**inputs).loss,  # mean cross entropy of the targets
    spec=AdapterSpec(rank=8, alpha=16),
    lr=5e-4,
    batch=8,
    dtype="fp32",
    steps=40,
    warmup=3,
)
LLAMA = replace(
    T5,
    note="2 layers of Llama 2 7B, rank 8 on every linear layer, batch {batch} of 256 tokens",
    # between a vocabulary that weighs little
    build=lambda: llama_7b(num_hidden_layers=2, vocab_size=2048),
    inputs=partial(_text_inputs, 256, None),  # the paper allows 1,024 (256 for Llama 3.1)
    batch=2,
    steps=12,
    warmup=2,
)
SDXL = replace(
    MINI,
    note="UNet of SDXL base 1.0, rank 4 on attention, batch {batch} of 128 px",
    build=partial(sdxl, "unet"),
    inputs=partial(_unet_inputs, 128, TEXT_LENGTH),
    batch=1,
    dtype="bf16",
    steps=10,
    warmup=1,
)
SHAPES = {"mini": MINI, "t5-base": T5, "llama-7b-layer": LLAMA, "sdxl-unet": SDXL}
