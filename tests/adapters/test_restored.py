"""A model that lent itself to a run is afterwards as it came, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.methods import Target, create


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head.to(x.dtype)(self.body.to(x.dtype)(x))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ("head",), "target_modules": ("body.0", "body.2")},
        {"init": "pissa"},
    ],
)
@pytest.mark.parametrize("method", ["lora", "bilora"])
def test_a_model_is_afterwards_as_it_came(method: str, values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    spec = AdapterSpec(rank=2, alpha=4, **{"target_modules": "all-linear", **values})
    for _ in range(2):
        with adapters.restored(model, spec):
            groups = create(method).setup([Target("m", model, spec, 0.1)])
            for group in groups:
                for parameter in group["params"]:
                    parameter.data += 1
            for _, layer in adapters.layers(model, "initial" if spec.changes_base else "default"):
                assert layer is not None
                adapters.base_weight(layer).data *= 2 if spec.changes_base else 1
        assert [type(module) for module in model.modules()] == kinds
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert after[name].dtype == value.dtype
            assert torch.equal(after[name], value)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not hasattr(model, "peft_config")
