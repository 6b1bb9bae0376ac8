"""Prompt embeddings of SDXL: two text encoders, the second one's pooled output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class PromptEmbedding(NamedTuple):
    """What the UNet is conditioned on.

    ``sequence`` is (n, tokens, width of both encoders), ``pooled`` is (n, projection width).
    """

    sequence: Tensor
    pooled: Tensor


def tokenize(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """Token ids, (n, tokens) of either tokenizer, padded and cut to the model's length."""
    return tuple(
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )


def encode(encoders: Sequence[nn.Module], ids: Sequence[Tensor]) -> PromptEmbedding:
    """Embed token ids as ``StableDiffusionXLPipeline.encode_prompt`` does.

    The penultimate hidden states of both encoders side by side, and the projected pooled output
    of the second.
    """
    states, pooled = [], None
    for encoder, tokens in zip(encoders, ids, strict=True):
        output = encoder(tokens, output_hidden_states=True)
        pooled = output[0]
        states.append(output.hidden_states[-2])
    assert pooled is not None
    return PromptEmbedding(torch.cat(states, dim=-1), pooled)


@torch.no_grad()
def embed(pipeline: Any, prompts: Sequence[str]) -> PromptEmbedding:
    """Embed prompts with the pipeline's own text encoders as and where they are now."""
    device = next(pipeline.text_encoder.parameters()).device
    ids = [tokens.to(device) for tokens in tokenize(pipeline, prompts)]
    return encode((pipeline.text_encoder, pipeline.text_encoder_2), ids)


def embed_negative(pipeline: Any, count: int) -> PromptEmbedding:
    """Embeddings of ``count`` empty prompts with the pipeline's own text encoders."""
    return zeroed_if_told(pipeline, embed(pipeline, [""] * count))


def zeroed_if_told(pipeline: Any, empty: PromptEmbedding) -> PromptEmbedding:
    """Zeros in place of the empty prompt's embedding where the pipeline says so (SDXL base)."""
    if not pipeline.config.force_zeros_for_empty_prompt:
        return empty
    return PromptEmbedding(torch.zeros_like(empty.sequence), torch.zeros_like(empty.pooled))


class PromptCache:
    """Embeddings of the prompts that frozen text encoders have seen, computed once each."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline, self._device = pipeline, device
        self._known: dict[str, PromptEmbedding] = {}

    def add(self, prompts: Sequence[str], batch: int = 16) -> None:
        """Embed those of ``prompts`` that are new; the encoders visit the device for it only."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if not new:
            return
        encoders = (self._pipeline.text_encoder, self._pipeline.text_encoder_2)
        for encoder in encoders:
            encoder.to(self._device)
        for start in range(0, len(new), batch):
            part = new[start : start + batch]
            whole = embed(self._pipeline, part)
            for row, prompt in enumerate(part):
                one = (tensor[row : row + 1].cpu() for tensor in whole)
                self._known[prompt] = PromptEmbedding(*one)
        for encoder in encoders:
            encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> PromptEmbedding:
        """Embeddings of ``prompts`` on the CPU, in order."""
        self.add(prompts)
        rows = [self._known[prompt] for prompt in prompts]
        return PromptEmbedding(*(torch.cat(part) for part in zip(*rows, strict=True)))

    def with_negative(self, prompts: Sequence[str]) -> tuple[PromptEmbedding, PromptEmbedding]:
        """Embeddings of ``prompts`` and of as many empty ones, as ``sampling.generate`` takes."""
        return self(prompts), zeroed_if_told(self._pipeline, self([""] * len(prompts)))
