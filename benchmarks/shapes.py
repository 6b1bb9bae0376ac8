"""What a step is measured on: a random model, its inputs, its loss, and training's adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from random_models import TEXT_LENGTH, llama_7b, materialize, sdxl_unet, t5_base
from torch import Tensor, nn
from torch.nn import functional

from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.errors import UserError, did_you_mean
from bilora_diffusion.mini import pipeline_dir

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
Inputs = dict[str, Any]


def require(flag: str, value: str, known: Iterable[str]) -> None:
    """Refuse an unknown value; ``flag`` comes with the verb, as in "--dtype is".

    Raises:
        UserError: it is none of them.
    """
    if value not in known:
        hint = did_you_mean(value, known)
        raise UserError(f"{flag} {value!r}{hint}; use one of {', '.join(known)}.")


@dataclass(frozen=True)
class Shape:
    """One workload.

    Args:
        note: what it is, for the report; "{batch}" stands for the number of samples.
        build: makes the model; called under any default device.
        inputs: (model, samples, dtype, device, generator) -> tensors of one batch.
        loss: (model, inputs) -> scalar.
        lr: learning rate, so that the adapters grow as they do in training.
        batch: samples of a step unless asked otherwise.
        dtype: precision of the base unless asked otherwise.
        steps, warmup: measured and unmeasured rounds unless asked otherwise.
    """

    note: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Any, int, torch.dtype, torch.device, torch.Generator], Inputs]
    loss: Callable[[Any, Inputs], Tensor]
    spec: AdapterSpec
    lr: float
    batch: int
    dtype: str
    steps: int
    warmup: int

    def make(self, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
        """The model with random weights, in training mode, frozen."""
        model = materialize(self.build, dtype=dtype, device=device, seed=seed)
        return model.train().requires_grad_(False)


def _unet_inputs(
    pixels: int, length: int
) -> Callable[[UNet2DConditionModel, int, torch.dtype, torch.device, torch.Generator], Inputs]:
    """Latents, prompt embeddings and size conditioning for images of ``pixels`` x ``pixels``."""

    def make(
        model: UNet2DConditionModel,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> Inputs:
        config: Any = model.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device=device, dtype=dtype)

        latents = (batch, config.in_channels, pixels // 8, pixels // 8)
        return {
            "sample": normal(*latents),
            "noise": normal(*latents),
            "timestep": torch.randint(1000, (batch,), generator=generator).to(device),
            "encoder_hidden_states": normal(batch, length, config.cross_attention_dim),
            "added_cond_kwargs": {
                "text_embeds": normal(batch, pooled),
                "time_ids": torch.tensor([pixels, pixels, 0, 0, pixels, pixels])
                .expand(batch, 6)
                .to(device=device, dtype=dtype),
            },
        }

    return make


def _unet_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Mean squared error of the predicted noise."""
    arguments = {name: value for name, value in inputs.items() if name != "noise"}
    predicted = model(**arguments, return_dict=False)[0]
    return functional.mse_loss(predicted.float(), inputs["noise"].float())


def _t5_inputs(
    model: Any, batch: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    """Sources of 128 tokens with targets of 8, none of them padding; the paper allows 256."""
    del dtype

    def tokens(*size: int) -> Tensor:
        return torch.randint(2, model.config.vocab_size, size, generator=generator).to(device)

    source, target = tokens(batch, 128), tokens(batch, 8)
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target}


def _llama_inputs(
    model: Any, batch: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    """Sequences of 256 tokens, all of them targets; the paper allows 1,024 (256 for Llama 3.1)."""
    del dtype
    tokens = torch.randint(model.config.vocab_size, (batch, 256), generator=generator).to(device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def _text_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Mean cross entropy of the target tokens."""
    return model(**inputs).loss


def _mini_unet() -> UNet2DConditionModel:
    config: Any = UNet2DConditionModel.load_config(pipeline_dir(), subfolder="unet")
    model = UNet2DConditionModel.from_config(config)
    assert isinstance(model, UNet2DConditionModel)
    return model


SHAPES = {
    "mini": Shape(
        note="UNet of the miniature, rank 4 on attention, batch {batch} of 64 px",
        build=_mini_unet,
        inputs=_unet_inputs(pixels=64, length=32),
        loss=_unet_loss,
        spec=AdapterSpec(rank=4, alpha=8, target_modules=ATTENTION),
        lr=2e-4,
        batch=4,
        dtype="fp32",
        steps=200,
        warmup=5,
    ),
    "t5-base": Shape(
        note="T5-base, rank 8 on every linear layer, batch {batch} of 128 + 8 tokens",
        build=t5_base,
        inputs=_t5_inputs,
        loss=_text_loss,
        spec=AdapterSpec(rank=8, alpha=16),
        lr=5e-4,
        batch=8,
        dtype="fp32",
        steps=40,
        warmup=3,
    ),
    "llama-7b-layer": Shape(
        note="Llama 2 7B, 2 of its 32 layers, rank 8 on every linear layer, batch {batch} of 256"
        " tokens",
        build=lambda: llama_7b("layers"),
        inputs=_llama_inputs,
        loss=_text_loss,
        spec=AdapterSpec(rank=8, alpha=16),
        lr=5e-4,
        batch=2,
        dtype="fp32",
        steps=12,
        warmup=2,
    ),
    "sdxl-unet": Shape(
        note="UNet of SDXL base 1.0, rank 4 on attention, batch {batch} of 128 px",
        build=sdxl_unet,
        inputs=_unet_inputs(pixels=128, length=TEXT_LENGTH),
        loss=_unet_loss,
        spec=AdapterSpec(rank=4, alpha=8, target_modules=ATTENTION),
        lr=2e-4,
        batch=1,
        dtype="bf16",
        steps=10,
        warmup=1,
    ),
}
