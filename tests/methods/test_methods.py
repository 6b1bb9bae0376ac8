"""methods: the registry, the options, the groups, and where the methods start from."""

from typing import cast

import pytest
import torch

from bilora_diffusion.adapters import AUXILIARY, INITIAL, PRIMARY, AdapterSpec
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.methods import (
    Method,
    MethodOptions,
    Target,
    create,
    names,
    register,
    registry,
)
from tests.contract.harness import Run
from tests.contract.models import tiny_mlp

ADAPTING = [name for name in names() if not create(name).exports_weights]


@pytest.mark.parametrize("option", ["default", "pissa"])
def test_methods_start_from_the_same_primary_and_the_auxiliary_as_ever(option):
    def start(name, option=option):
        return Run(name, option, "clip").initialise().tensors()

    first = start("lora")
    assert any(f"/{INITIAL}/" in key for key in first) == (option == "pissa")
    for name in ADAPTING:
        tensors = start(name)
        assert {f"model/{a}" for a in create(name).adapters} <= {
            k.rpartition("/")[0] for k in tensors
        }
        assert all(torch.equal(tensors[key], value) for key, value in first.items())
    tensors, usual = start("bilora"), start("bilora", "default")
    for key in (key for key in tensors if f"/{AUXILIARY}/" in key):
        assert torch.equal(tensors[key], usual[key])
        assert "lora_B" in key or not torch.equal(
            tensors[key], tensors[key.replace(AUXILIARY, PRIMARY)]
        )


def test_registry(monkeypatch):
    assert {"lora", "bilora"} <= set(names())
    assert create("bilora").name == "bilora"
    with pytest.raises(UserError, match='did you mean "bilora"'):
        create("bi-lora")
    with pytest.raises(ValueError, match="registered already"):
        register("lora")(type("Other", (Method,), {}))
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register("other")(cast(type[Method], type("Other", (Method,), {})))
    assert names()[-1] == create("other").name == "other"


def test_the_groups_of_several_targets():
    def groups(**options):
        targets = [
            Target("unet", tiny_mlp(), AdapterSpec(target_modules=("first",)), 1e-3, 0.1),
            Target("text", tiny_mlp(), AdapterSpec(target_modules=("last",)), 1e-4, 0.2),
        ]
        parameter_groups = create("bilora", MethodOptions(**options)).setup(targets)
        return {group["name"]: group for group in parameter_groups}

    groups_by_name = groups()
    assert list(groups_by_name) == ["unet", "text", "unet.auxiliary", "text.auxiliary"]
    assert [g["lr"] for g in groups_by_name.values()] == [1e-3, 1e-4, 1e-3, 1e-4]
    assert [g["weight_decay"] for g in groups_by_name.values()] == [0.1, 0.2, 0.0, 0.0]
    assert [g.get("maximize", False) for g in groups_by_name.values()] == [False, False, True, True]
    rates = [g["lr"] for g in groups(auxiliary_learning_rate=4e-3).values()]
    assert rates == pytest.approx([1e-3, 1e-4, 4e-3, 4e-4])
