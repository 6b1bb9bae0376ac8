"""The registry of methods, their parameter groups, and their initial adapters."""

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


def tensors_at_start(name, option):
    return Run(name, option, "clip").initialise().tensors()


@pytest.mark.parametrize("option", ["default", "pissa"])
def test_methods_start_from_the_same_primary(option):
    lora_tensors = tensors_at_start("lora", option)
    assert any(f"/{INITIAL}/" in key for key in lora_tensors) == (option == "pissa")
    for name in ADAPTING:
        tensors = tensors_at_start(name, option)
        for key, tensor in lora_tensors.items():
            assert torch.equal(tensors[key], tensor)
        for adapter in create(name).adapters:
            assert any(key.startswith(f"model/{adapter}/") for key in tensors)


def test_the_auxiliary_ignores_the_init_and_starts_from_its_own_values():
    default_tensors = tensors_at_start("bilora", "default")
    pissa_tensors = tensors_at_start("bilora", "pissa")
    for key, tensor in default_tensors.items():
        if f"/{AUXILIARY}/" in key:
            assert torch.equal(pissa_tensors[key], tensor)
            primary = default_tensors[key.replace(AUXILIARY, PRIMARY)]
            assert torch.equal(primary, tensor) == ("lora_B" in key)  # both are zero


def test_methods_are_registered_and_created_by_name(monkeypatch):
    assert create("bilora").name == "bilora"
    with pytest.raises(UserError, match='did you mean "bilora"'):
        create("bi-lora")
    with pytest.raises(ValueError, match="already registered"):
        register("lora")(Method)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @register("other")
    class NewMethod(Method):
        pass

    assert names()[-1] == create("other").name == "other"


@pytest.mark.parametrize(
    ("options", "auxiliary_rates"),
    [({}, [1e-3, 1e-4]), ({"auxiliary_learning_rate": 4e-3}, [4e-3, 4e-4])],
)
def test_every_target_has_a_group_for_each_of_its_adapters(options, auxiliary_rates):
    """Auxiliary rates keep the ratio of the targets' rates; auxiliaries ascend without decay."""
    targets = [
        Target("unet", tiny_mlp(), AdapterSpec(target_modules=("first",)), 1e-3, 0.1),
        Target("text", tiny_mlp(), AdapterSpec(target_modules=("last",)), 1e-4, 0.2),
    ]
    groups = create("bilora", MethodOptions(**options)).setup(targets)
    columns: dict[str, list] = {"name": [], "lr": [], "weight_decay": [], "maximize": []}
    for group in groups:
        for key, column in columns.items():
            column.append(group.get(key, False))
    assert columns["name"] == ["unet", "text", "unet.auxiliary", "text.auxiliary"]
    assert columns["lr"] == pytest.approx([1e-3, 1e-4, *auxiliary_rates])
    assert columns["weight_decay"] == [0.1, 0.2, 0.0, 0.0]
    assert columns["maximize"] == [False, False, True, True]
