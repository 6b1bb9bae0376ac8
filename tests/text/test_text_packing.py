"""Packed rows: no token sees a neighbour, and each has the loss that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from bilora_diffusion.errors import UserError
from bilora_diffusion.text.encode import Encoded, best_fit, pack, require_packable
from bilora_diffusion.text.examples import Example, from_turns
from bilora_diffusion.text.module import collate
from tests.text.text_builders import encoded
from tests.text.text_tokenizers import chat_tokenizer

TALK = from_turns(
    [("user", "what"), ("assistant", "red"), ("user", "and this"), ("assistant", "green")], "row"
)
EXAMPLES = [
    Example("what is the colour of this apple", "it is red and that one green"),
    Example("say hello", "hello there", where="row 2"),
    TALK,
    Example("one", "two"),
    Example("three four", "five"),
]
VOCABULARY = len(chat_tokenizer())
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA: dict[str, Any] = {"intermediate_size": 32, "num_key_value_heads": 2, **SIZES}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(vocab_size=VOCABULARY, **LLAMA),
    "mistral": MistralConfig(vocab_size=VOCABULARY, sliding_window=16, **LLAMA),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **GPT2),
    "jamba": JambaConfig(
        vocab_size=50,
        use_mamba_kernels=False,
        mamba_d_state=4,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        **LLAMA,
    ),
    "mamba": MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1),
}


def rows() -> Encoded:
    return encoded(EXAMPLES, chat_tokenizer(), max_length=64)


def model(kind: str, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention)
    if kind in ("llama", "mistral", "gpt2"):
        for weight in network.parameters():  # large, so that what a token sees and where matters
            torch.nn.init.normal_(weight, std=0.3)
    return network.eval()


def token_losses(network: Any, batch: dict[str, Tensor]) -> list[float]:
    """The loss of each token that has one, row by row."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = network(**inputs, use_cache=False).logits.float()
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return losses[batch["labels"][:, 1:] != -100].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_each_tokens_loss_is_the_same_as_alone(kind: str, attention: str) -> None:
    single, network = rows(), model(kind, attention)
    packed = pack(single, 100)
    assert len(packed) < len(single)
    alone = [token_losses(network, collate([single.row(i)], "causal", 0)) for i in range(5)]
    batch = collate([packed.row(i) for i in range(len(packed))], "causal", 0)
    widths = {len(packed.row(i)["input_ids"]) for i in range(len(packed))}
    assert len(widths) > 1  # so one of them is padded
    together = token_losses(network, batch)
    order = [source for sources in packed.sources for source in sources]
    expected = [loss for source in order for loss in alone[source]]
    assert together == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # losses that could not differ prove nothing
    leaking = token_losses(network, batch | {"attention_mask": torch.ones_like(batch["labels"])})
    assert leaking != pytest.approx(expected, abs=1e-3)
    require_packable(network)


def test_a_packed_row_says_what_is_in_it() -> None:
    single = rows()
    packed = pack(single, 100)
    row, members = packed.row(0), packed.sources[0]
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    assert [row["labels"][start] for start in starts] == [-100] * len(starts)
    assert row["input_ids"] == [t for m in members for t in single.row(m)["input_ids"]]
    assert packed.name(0) == " and ".join(single.name(member) for member in members)
    assert sum(packed.lengths) == sum(single.lengths)
    assert sum(packed.target_tokens) == sum(single.target_tokens)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_each_example_is_packed_once_and_no_row_is_too_long(lengths: list[int]) -> None:
    packed = best_fit(lengths, 20)
    assert sorted(example for row in packed for example in row) == list(range(len(lengths)))
    sizes = [sum(lengths[example] for example in row) for row in packed]
    assert all(0 < size <= 20 for size in sizes)
    # Two rows that fit into one are never left apart, so at most one is not more than half full.
    assert sum(size <= 10 for size in sizes) <= 1


def test_examples_go_where_they_leave_the_least_room() -> None:
    assert best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("jamba", "lets a token see the example before its own"),
        ("mamba", "takes no position_ids"),
        ("llama", "--attn_implementation sdpa"),
    ],
)
def test_models_that_mix_examples_are_refused(kind: str, reason: str) -> None:
    network = model(kind)
    if kind == "llama":
        network.config._attn_implementation = "flash_attention_2"  # which takes no mask
    with pytest.raises(UserError, match=reason):
        require_packable(network)
