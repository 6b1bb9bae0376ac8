"""adapters: the shape of an adapter, and which layers it goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.errors import UserError
from tests.contract.models import tiny_clip, tiny_mlp, tiny_t5, tiny_unet


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding_mode="circular")
        self.table = nn.Embedding(5, 8)
        self.plain = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"init": "gausian"}, 'did you mean "gaussian"'),
        ({"target_modules": "to_q("}, "regular expression"),
        ({"target_modules": ("attention.out_proj",)}, "MultiheadAttention"),
        *(({"target_modules": (name,)}, name) for name in ("grouped", "dilated", "circular")),
        ({"target_modules": ("table",)}, "Embedding"),
        ({"target_modules": ("to_q",)}, "matches no layer of Odd"),
    ],
)
def test_what_is_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        adapters.inject(Odd(), AdapterSpec(**values))


@pytest.mark.parametrize(
    ("make", "targets", "expected"),
    [
        (Odd, "all-linear", {"plain"}),
        (tiny_mlp, "all-linear", {"first", "last"}),
        (tiny_mlp, ("last",), {"last"}),
        (tiny_mlp, "fir.*", {"first"}),
        (tiny_unet, ("to_q", "to_out.0"), {"to_q", "to_out.0"}),
        (tiny_unet, ("conv1", "to_k"), {"conv1", "to_k"}),
    ],
)
def test_targets(make: Any, targets: str | tuple[str, ...], expected: set[str]) -> None:
    names = list(adapters.target_layers(make(), AdapterSpec(target_modules=targets)))
    ends = {end for end in expected for name in names if f".{name}".endswith(f".{end}")}
    assert ends == expected
    assert all(f".{name}".endswith(tuple(f".{end}" for end in expected)) for name in names)


def test_all_linear_leaves_the_output_head_out_as_peft_does() -> None:
    for model in (tiny_t5(), tiny_clip()):
        config = LoraConfig(target_modules="all-linear", task_type=None)
        peft = get_peft_model(copy.deepcopy(model), config)
        theirs = {n.removeprefix("base_model.model.") for n, _ in adapters.layers(peft)}
        found = set(adapters.target_layers(model, AdapterSpec()))
        assert found == theirs
        assert not any("lm_head" in name for name in found)
        adapters.inject(model, AdapterSpec())
        with pytest.raises(UserError, match='already has an adapter "default"'):
            adapters.inject(model, AdapterSpec())
