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


def tokenize(tokenizers: Sequence[Any], prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """Token ids, (n, tokens), one tensor per tokenizer, padded and cut to the model's length."""
    return tuple(
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in tokenizers
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


class PromptCache:
    """Embeddings of the prompts that frozen text encoders have seen, computed once each."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        self._encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        self._device = device
        self._known: dict[str, PromptEmbedding] = {}

    @torch.no_grad()
    def add(self, prompts: Sequence[str], batch: int = 16) -> None:
        """Embed those of ``prompts`` that are new; the encoders visit the device for it only."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if not new:
            return
        for encoder in self._encoders:
            encoder.to(self._device)
        for start in range(0, len(new), batch):
            part = new[start : start + batch]
            ids = [tokens.to(self._device) for tokens in tokenize(self._tokenizers, part)]
            sequence, pooled = encode(self._encoders, ids)
            for row, prompt in enumerate(part):
                self._known[prompt] = PromptEmbedding(
                    sequence[row : row + 1].cpu(), pooled[row : row + 1].cpu()
                )
        for encoder in self._encoders:
            encoder.to("cpu")

    def __call__(self, prompts: Sequence[str]) -> PromptEmbedding:
        """Embeddings of ``prompts`` on the CPU, in order."""
        self.add(prompts)
        rows = [self._known[prompt] for prompt in prompts]
        return PromptEmbedding(
            torch.cat([row.sequence for row in rows]), torch.cat([row.pooled for row in rows])
        )
