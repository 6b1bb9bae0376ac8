"""Lumina 2."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from .parts import autoencoder


def pipeline(**options: Any) -> Lumina2Pipeline:
    """Two layers and a refiner each of text and noise."""
    words = tokenizer()
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (300, 16, 16),
        "cap_feat_dim": 16,
    }
    encoder = Gemma2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(**(config | options)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(),
        text_encoder=Gemma2Model(encoder).eval(),
        tokenizer=words,
    )


def tokenizer() -> Any:
    """Of single characters; like Gemma's, it begins every text with a token, and has no length."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    letters = string.ascii_letters + string.digits + string.punctuation
    vocab = {word: number for number, word in enumerate((*special, "▁", *letters))}
    words = GemmaTokenizer(vocab=vocab, add_bos_token=True)
    assert words("").input_ids == [words.bos_token_id]
    return words
