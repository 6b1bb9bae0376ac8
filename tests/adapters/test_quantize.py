"""Weights are stored in 4 bits, and adapters on them act as on the rounded float weights."""

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec, is_quantized
from bilora_diffusion.adapters.fused import fuse, unfused
from bilora_diffusion.adapters.quantize import UNQUANTIZED_MODULES, quantize, round_to_nf4
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve
from tests.adapters.test_fused import BOTH, TOLERANCE, assert_same, results
from tests.contract.harness import Run
from tests.contract.models import tiny_t5, tiny_unet

INPUTS, OUTPUTS = 96, 80  # a row is one and a half blocks of 64 weights


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, OUTPUTS).to(dtype))


def four_bit_model(dtype=torch.float32):
    model = linear(dtype)
    quantize(model, dtype)
    return model


def rounded_model(dtype=torch.float32):
    """Return the model with ordinary weights that have the values of the 4-bit weights."""
    model = linear(dtype)
    model[0].weight.data = dequantize_module_weight(four_bit_model(dtype)[0])
    return model


def adapt(model, dora=False, filled=True):
    """Add both adapters to layer "0", with the same values in each call."""
    torch.manual_seed(1)
    for name in BOTH:
        spec = AdapterSpec(rank=3, target_modules=("0",), use_dora=dora and name == PRIMARY)
        adapters.inject(model, spec, name)
        for factors in adapters.factors(model, name):
            if filled:
                nn.init.normal_(factors.A, std=0.3)
                nn.init.normal_(factors.B, std=0.3)
    adapters.activate(model, BOTH)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_takes_half_a_byte_and_has_an_error_of_9_percent(dtype):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(512, 640), nn.LayerNorm(640)).to(dtype)
    # NF4's levels are quantiles of the normal distribution.
    nn.init.normal_(model[0].weight)
    weight, bias = copy.deepcopy(model[0]).parameters()
    assert quantize(model, dtype) == 1
    layer = model[0]
    state = layer.weight.quant_state
    # 4 bits per weight, 8 per 64 weights, and 32 per 256 * 64; the two code tables don't count
    parts = (layer.weight, state.absmax, state.offset, state.state2.absmax)
    bits = 8 * sum(part.nbytes for part in parts)
    assert bits / (512 * 640) == pytest.approx(4.127, abs=2e-3)
    rounded_weight: Any = dequantize_module_weight(layer)
    assert rounded_weight.dtype == dtype
    relative_error = float((rounded_weight - weight).norm() / weight.norm())
    assert 0.085 < relative_error < 0.1  # for normally distributed weights
    assert torch.equal(rounded_weight, round_to_nf4(weight.detach()))
    assert torch.equal(layer.bias, bias)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize(
    ("make", "names"), [(tiny_t5, {"wo", "lm_head"}), (tiny_unet, set(UNQUANTIZED_MODULES))]
)
def test_some_layers_of_a_model_stay_in_full_precision(make, names):
    model = make()
    quantize(model, torch.float32)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert is_quantized(module) == names.isdisjoint(path.split(".")), path


def test_a_shared_layer_is_quantized_once_and_a_skipped_layer_is_not_quantized():
    layer = linear()[0]
    model: Any = nn.ModuleDict({"a": layer, "b": linear(), "c": nn.MultiheadAttention(8, 2)})
    model["d"] = nn.Sequential(layer)
    assert quantize(model, torch.float32, skip=("b.0",)) == 1
    assert model["a"] is model["d"][0]
    assert not is_quantized(model["b"][0])
    x = torch.randn(2, INPUTS)
    assert torch.equal(copy.deepcopy(model["d"])(x), model["d"](x))


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("active", [BOTH[::-1], (PRIMARY,)], ids="-".join)
def test_adapters_on_4_bit_weights_act_as_on_rounded_weights_fused_or_not(
    active, dora, dtype, autocast
):
    model = adapt(four_bit_model(dtype), dora)
    plain = adapt(rounded_model(dtype), dora)
    for network in (model, plain):
        adapters.activate(network, active)
        assert fuse(network) == 1
    x = torch.randn(2, 5, INPUTS, dtype=dtype)
    tolerance = TOLERANCE[autocast or dtype]
    assert_same(results(model, x, autocast), results(plain, x, autocast), tolerance)
    with unfused(model), unfused(plain):
        expected = results(plain, x, autocast)
        actual = results(model, x, autocast)
    # Under autocast, PEFT's 4-bit layers return the output in another precision.
    actual["output"] = actual["output"].to(expected["output"].dtype)
    assert_same(actual, expected, tolerance)


@pytest.mark.parametrize("autocast", [False, True])
def test_dora_starts_with_exactly_the_base_output(autocast, monkeypatch):
    # PEFT reads the state of CUDA's autocast; here it reads the CPU's.
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": is_enabled(kind))
    model: Any = adapt(four_bit_model(torch.bfloat16), dora=True, filled=False)
    fuse(model)
    x = torch.randn(5, INPUTS, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(model(x), model[0].base_layer(x))


def train(checkpointing=False, evaluated=False):
    """Return the losses of three Bi-LoRA steps on 4-bit weights."""
    run: Any = Run("bilora", "nf4", "llm")
    if checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for _ in range(3):
        losses += run.train(1)
        if evaluated:
            with torch.no_grad(), run.method.evaluating():
                run.case.output(run.model.eval())
            run.model.train()
    return losses


def test_checkpointing_and_evaluations_do_not_change_the_losses(monkeypatch):
    losses = train()
    assert losses[2] < losses[1] < losses[0]
    assert train(checkpointing=True) == losses
    # On a CPU with AVX512-BF16, which is simulated here, bitsandbytes repacks the weights in an
    # evaluation unless this is prevented. Gradients can't pass through repacked weights.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert train(evaluated=True) == losses


def test_an_error_names_bitsandbytes_if_it_is_missing(monkeypatch):
    find_spec = importlib.util.find_spec

    def find_others(name, *arguments):
        return None if name == "bitsandbytes" else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install.*bitsandbytes"):
        resolve(["--dataset", "mini", "--quantize", "nf4"])
    with pytest.raises(UserError, match=r"pip install.*bitsandbytes"):
        four_bit_model()
