"""`examples/minimal.py` gives the library's weights after 20 steps, and an equivalent file."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from bilora_diffusion import BiLoRAConfig, adapters, attach
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from examples import minimal

STEPS = 20
TOLERANCE = 1e-6
RATES: dict[str, float] = {"lr": 5e-3, "auxiliary_lr": 3e-3, "weight_decay": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.Tanh())
    return nn.Sequential(body, nn.Linear(7, 4)).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        # Large inputs cause gradients that are clipped.
        inputs = 20 * torch.randn(5, 6, dtype=torch.float64, generator=generator)
        yield inputs, torch.randint(4, (5,), generator=generator)


def factors_of_library(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the library's factors under their names in `minimal.BiLoRALinear`."""
    factors = {}
    for adapter, number in ((PRIMARY, 1), (AUXILIARY, 2)):
        for layer in adapters.factors_of(adapters.layers(model, adapter), adapter):
            factors[f"{layer.name}.A{number}"] = layer.A
            factors[f"{layer.name}.B{number}"] = layer.B
    return factors


def train_library(model: nn.Module, initial: dict[str, torch.Tensor], rho: float) -> Any:
    """Train with `attach` from the initial factors and return the handle."""
    config = BiLoRAConfig(
        rank=3,
        alpha=6,
        rho=rho,
        auxiliary_learning_rate=RATES["auxiliary_lr"],
        target_modules=r"0\.0|0\.2|1",
    )
    bilora = attach(model, config)
    factors = factors_of_library(model)
    assert factors.keys() == initial.keys()
    with torch.no_grad():
        for name, factor in factors.items():
            factor.copy_(initial[name])
    groups = bilora.param_groups(lr=RATES["lr"], weight_decay=RATES["weight_decay"])
    optimizer = torch.optim.AdamW(groups)
    bilora.bind(optimizer)
    is_clipped = False
    for inputs, labels in batches():
        F.cross_entropy(model(inputs), labels).backward()
        is_clipped |= bool(nn.utils.clip_grad_norm_(bilora.clip_parameters(), 1.0) > 1)
        optimizer.step()
        optimizer.zero_grad()
    assert is_clipped
    return bilora


@pytest.mark.parametrize("rho", [0.01, 0.05, 100.0])  # the last is too large to have an effect
def test_the_minimal_file_trains_and_saves_the_same_adapter_as_the_library(rho, tmp_path):
    base = network()
    minimal_model, library_model = copy.deepcopy(base), copy.deepcopy(base)
    layers = minimal.add_adapters(minimal_model, rank=3, alpha=6)
    names = ("A1", "B1", "A2", "B2")
    factors = {f"{path}.{name}": getattr(layers[path], name) for path in layers for name in names}
    initial = {name: factor.detach().clone() for name, factor in factors.items()}

    minimal.train(minimal_model, layers, batches(), rho, **RATES)
    bilora = train_library(library_model, initial, rho)

    for name, factor in factors_of_library(library_model).items():
        assert not torch.equal(factors[name], initial[name]), name
        assert (factors[name] - factor).abs().max() < TOLERANCE, name
    norm = minimal.auxiliary_norm(layers)
    assert abs(norm - bilora.auxiliary_norm()) < TOLERANCE
    assert norm == pytest.approx(rho) if rho < 1 else 0.05 < norm < rho

    # PEFT loads both files, and their outputs are those of the primary alone.
    minimal.save(layers, tmp_path / "minimal")
    bilora.save_pretrained(tmp_path / "library")
    inputs, _ = next(batches())
    outputs = [minimal_model.eval()(inputs)]
    for folder in ("minimal", "library"):
        loaded_model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / folder))
        outputs.append(loaded_model(inputs))
    for output in outputs[1:]:
        assert (output - outputs[0]).abs().max() < TOLERANCE
    assert (outputs[0] - base(inputs)).abs().max() > 0.01
    assert (outputs[0] - minimal_model.train()(inputs)).abs().max() > TOLERANCE


def test_radius_zero_is_lora():
    """The auxiliary stays zero, so its rate has no effect."""
    trained = []
    for auxiliary_lr in (1e-2, 0.0):
        model = network()
        layers = minimal.add_adapters(model, rank=3, alpha=6)
        minimal.train(model, layers, batches(), rho=0.0, lr=5e-3, auxiliary_lr=auxiliary_lr)
        assert minimal.auxiliary_norm(layers) == 0
        trained.append(layers["1"].B1)
    assert torch.equal(*trained)


def test_the_minimal_file_runs(capsys, monkeypatch):
    monkeypatch.setattr(minimal, "SEEDS", range(2))
    minimal.main()
    base, lora, *bilora, _ = capsys.readouterr().out.splitlines()
    assert float(base[18:].split()[0]) < float(lora[18:].split()[0])
    assert len(bilora) == len(minimal.RADII) - 1
    assert all("minus LoRA" in line for line in bilora)
