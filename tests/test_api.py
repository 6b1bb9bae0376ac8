"""`attach` on models of different kinds, and the LoRA that it trains and saves."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import bilora_diffusion
from bilora_diffusion import BiLoRAConfig, adapters, attach
from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.core.errors import UserError
from tests.contract.models import CASES, tiny_mlp


def test_the_package_is_imported_without_bitsandbytes():
    script = "import sys; sys.modules['bitsandbytes'] = None; import bilora_diffusion"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert sorted(bilora_diffusion.__all__) == ["BiLoRAConfig", "__version__", "attach"]


@pytest.mark.parametrize("kind", list(CASES))
def test_attach_trains_and_saves_a_plain_lora(kind, tmp_path):
    case = CASES[kind]
    model = case.make().train()
    fresh = copy.deepcopy(model)
    bilora = attach(model, BiLoRAConfig(rank=4, alpha=6, target_modules=case.targets, rho=0.02))
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=1e-2, weight_decay=0.01))
    bilora.bind(optimizer)
    assert bilora.auxiliary_norm() == 0
    for _ in range(3):
        (case.output(model) - 1).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(bilora.clip_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert 0 < bilora.auxiliary_norm() <= 0.02 * (1 + 1e-6)
    with torch.no_grad():
        perturbed = case.output(model)
        with bilora.evaluating():
            expected = case.output(model)
        assert not torch.equal(perturbed, expected)
        assert torch.equal(case.output(model), perturbed)
    bilora.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    saved = {key.removeprefix("base_model.model.") for key in tensors}
    assert saved == set(bilora.primary_state_dict())
    assert not any(AUXILIARY in key for key in saved)
    loaded_model = PeftModel.from_pretrained(fresh, str(tmp_path)).train()
    with torch.no_grad():
        assert torch.equal(case.output(loaded_model), expected)


def test_the_config_reaches_both_adapters():
    config = BiLoRAConfig(
        rank=5,
        alpha=7,
        auxiliary_rank=2,
        auxiliary_alpha=3,
        auxiliary_learning_rate=0.5,
        dropout=0.1,
        init="gaussian",
        use_dora=True,
        target_modules=["first"],  # type: ignore[arg-type]
    )
    model = tiny_mlp()
    bilora = attach(model, config)
    keys = ("r", "lora_alpha", "lora_dropout", "use_dora", "init_lora_weights")
    for name, expected in (
        (PRIMARY, [5, 7, 0.1, True, "gaussian"]),
        (AUXILIARY, [2, 3, 0.0, False, True]),
    ):
        assert [adapters.lora_config(model, name)[key] for key in keys] == expected
    assert adapters.active(model) == (PRIMARY, AUXILIARY)
    primary, auxiliary = bilora.param_groups(lr=0.1, weight_decay=0.3)
    assert (primary["lr"], primary["weight_decay"]) == (0.1, 0.3)
    assert (auxiliary["lr"], auxiliary["weight_decay"]) == (0.5, 0.0)
    assert len(primary["params"]) == 3  # A, B and DoRA's magnitude
    assert any("magnitude" in key for key in bilora.primary_state_dict())


def test_attach_refuses_a_model_without_matching_layers_and_a_second_call():
    with pytest.raises(UserError, match="matches no layer"):
        attach(nn.Sequential(nn.ReLU()))
    model = tiny_mlp()
    attach(model)
    with pytest.raises(UserError, match='already has an adapter "auxiliary"'):
        attach(model)


def test_a_peft_model_keeps_its_trained_primary(tmp_path):
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["first", "last"])
    model = get_peft_model(tiny_mlp(), config)
    with torch.no_grad():
        for parameter in adapters.parameters(model, PRIMARY):
            parameter.normal_()
    before = adapters.state_dict(model, PRIMARY)
    bilora = attach(model, BiLoRAConfig())
    after = bilora.primary_state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    optimizer = torch.optim.SGD(bilora.param_groups(lr=0.1))
    bilora.bind(optimizer)
    model(torch.randn(3, 6)).square().mean().backward()
    optimizer.step()
    assert bilora.auxiliary_norm() > 0
    bilora.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_mlp(), str(tmp_path))
