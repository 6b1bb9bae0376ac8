"""methods: the registry, the options, the groups, and where the methods start from."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AdapterSpec
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import (
    Method,
    MethodOptions,
    Target,
    base,
    create,
    default_rho,
    names,
    option_names,
    reads,
    register,
)
from bilora_diffusion.methods.bilora import BiLoRA
from bilora_diffusion.methods.options import falling, rising
from tests.contract.models import CASES, tiny_mlp


def test_all_methods_start_from_the_same_primary_and_the_auxiliary_is_seeded() -> None:
    def start(name: str) -> dict[str, Tensor]:
        models = {"unet": CASES["unet"].make(), "text": CASES["clip"].make()}
        targets = [
            Target("unet", models["unet"], AdapterSpec(target_modules=CASES["unet"].targets), 1e-4),
            Target("text", models["text"], AdapterSpec(init="gaussian"), 1e-5),
        ]
        method = create(name)
        torch.manual_seed(7)
        method.setup(targets)
        return {
            f"{key}/{adapter}/{k}": value
            for key, model in models.items()
            for adapter in method.adapters
            for k, value in adapters.state_dict(model, adapter).items()
        }

    starts = [start(name) for name in ("lora", "bilora", "bilora")]
    for other in starts[1:]:
        assert starts[0].keys() < other.keys()
        assert all(torch.equal(starts[0][key], other[key]) for key in starts[0])
    assert all(torch.equal(starts[1][key], starts[2][key]) for key in starts[1])
    one, two = (
        starts[1][f"text/{a}/encoder.layers.0.mlp.fc1.lora_A.weight"] for a in BiLoRA.adapters
    )
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"rho": 0.0}, "rho is 0.0"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"rho_norm": "scale"}, 'did you mean "scaled"'),
        ({"auxiliary_rank": 0}, "auxiliary_rank is 0"),
        ({"auxiliary_alpha": -1.0}, "auxiliary_alpha is -1.0"),
        ({"auxiliary_learning_rate": -0.1}, "auxiliary_learning_rate is -0.1"),
        ({"ball": "globe"}, 'did you mean "global"'),
        ({"auxiliary_direction": "up"}, "use one of ascent, descent"),
        ({"auxiliary_update": "powers"}, 'did you mean "power"'),
        ({"rho_schedule": "cosin"}, 'did you mean "cosine"'),
        ({"bar_schedule": "none"}, "use one of constant, linear, cosine"),
        ({"bar_alpha": -1.0}, "bar_alpha is -1.0"),
    ],
)
def test_options_refuse(values: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        MethodOptions(**values)


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"lora", "bilora"} <= set(names())
    assert create("bilora").name == "bilora"
    with pytest.raises(UserError, match='did you mean "bilora"'):
        create("bi-lora")
    with pytest.raises(ValueError, match="registered already"):
        register("lora")(type("Other", (Method,), {}))
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    register("other")(cast(type[Method], type("Other", (Method,), {})))
    assert names()[-1] == create("other").name == "other"


def test_the_registry_tells_what_a_method_reads() -> None:
    fields = {field.name for field in dataclasses.fields(MethodOptions)}
    assert option_names() <= fields
    assert reads("lora") == frozenset()
    assert "rho" in reads("bilora") & reads("lora-sam") & reads("flat-lora")
    assert default_rho("bilora") == 0.05
    assert default_rho("flat-lora") == 0.1
    assert default_rho("lora") is None
    assert default_rho("nothing") is None


def test_schedules() -> None:
    options = MethodOptions(num_steps=4)
    assert [options.progress(step) for step in (1, 2, 4, 9)] == [0.25, 0.5, 1, 1]
    assert [rising("linear", t) for t in (0, 0.25, 1)] == [0, 0.25, 1]
    assert [rising("cosine", t) for t in (0, 0.5, 1)] == pytest.approx([0, 0.5, 1])
    assert rising("constant", 0.1) == falling("constant", 0.1) == 1
    assert falling("linear", 0.25) == 0.75


def test_the_groups_of_several_targets() -> None:
    def groups(**options: Any) -> dict[str, dict[str, Any]]:
        targets = [
            Target("unet", tiny_mlp(), AdapterSpec(target_modules=("first",)), 1e-3, 0.1),
            Target("text", tiny_mlp(), AdapterSpec(target_modules=("last",)), 1e-4, 0.2),
        ]
        found = create("bilora", MethodOptions(**options)).setup(targets)
        return {group["name"]: group for group in found}

    found = groups()
    assert list(found) == ["unet", "text", "unet.auxiliary", "text.auxiliary"]
    assert [g["lr"] for g in found.values()] == [1e-3, 1e-4, 1e-3, 1e-4]
    assert [g["weight_decay"] for g in found.values()] == [0.1, 0.2, 0.0, 0.0]
    assert [g.get("maximize", False) for g in found.values()] == [False, False, True, True]
    rates = [g["lr"] for g in groups(auxiliary_learning_rate=4e-3).values()]
    assert rates == pytest.approx([1e-3, 1e-4, 4e-3, 4e-4])
