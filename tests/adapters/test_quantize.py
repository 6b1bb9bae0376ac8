"""quantize: weights that are really held in 4 bits, and adapters on them that act as on floats."""

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

INPUTS, OUTPUTS = 96, 80  # a row is one block of 64 and a half


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, OUTPUTS).to(dtype))


def four_bit(dtype=torch.float32):
    model = linear(dtype)
    quantize(model, dtype)
    return model


def rounded(dtype=torch.float32):
    """The model as 4 bits make it, with ordinary weights."""
    model = linear(dtype)
    model[0].weight.data = dequantize_module_weight(four_bit(dtype)[0])
    return model


def adapt(model, dora=False, filled=True):
    """Both adapters on layer "0", the same values each time."""
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
def test_a_weight_takes_half_a_byte_and_is_9_percent_off(dtype):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(512, 640), nn.LayerNorm(640)).to(dtype)
    # NF4's levels are the quantiles of normal values.
    nn.init.normal_(model[0].weight)
    weight, bias = copy.deepcopy(model[0]).parameters()
    assert quantize(model, dtype) == 1
    layer = model[0]
    state = layer.weight.quant_state
    # 4 bits, 8 for each 64 weights, 32 for each 256 of these; without the two code tables
    parts = (layer.weight, state.absmax, state.offset, state.state2.absmax)
    bits = 8 * sum(part.nbytes for part in parts)
    assert bits / (512 * 640) == pytest.approx(4.127, abs=2e-3)
    rounded_weight: Any = dequantize_module_weight(layer)
    assert rounded_weight.dtype == dtype
    relative_error = float((rounded_weight - weight).norm() / weight.norm())
    assert 0.085 < relative_error < 0.1  # of normal weights
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


def test_a_layer_in_two_places_is_quantized_once_and_skipped_ones_are_not():
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
def test_adapters_act_as_on_the_rounded_weight_fused_or_not(active, dora, dtype, autocast):
    model = adapt(four_bit(dtype), dora)
    plain = adapt(rounded(dtype), dora)
    for network in (model, plain):
        adapters.activate(network, active)
        assert fuse(network) == 1
    x = torch.randn(2, 5, INPUTS, dtype=dtype)
    tolerance = TOLERANCE[autocast or dtype]
    assert_same(results(model, x, autocast), results(plain, x, autocast), tolerance)
    with unfused(model), unfused(plain):
        expected = results(plain, x, autocast)
        actual = results(model, x, autocast)
    # PEFT's layers for 4 bits give the output in another precision under autocast.
    actual["output"] = actual["output"].to(expected["output"].dtype)
    assert_same(actual, expected, tolerance)


@pytest.mark.parametrize("autocast", [False, True])
def test_dora_starts_exactly_as_its_base(autocast, monkeypatch):
    # PEFT asks for CUDA's autocast; here it gets the CPU's.
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": is_enabled(kind))
    model: Any = adapt(four_bit(torch.bfloat16), dora=True, filled=False)
    fuse(model)
    x = torch.randn(5, INPUTS, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(model(x), model[0].base_layer(x))


def train(checkpointing=False, evaluated=False):
    """The losses of three steps of Bi-LoRA on 4-bit weights."""
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


def test_checkpointing_and_evaluations_change_nothing(monkeypatch):
    losses = train()
    assert losses[2] < losses[1] < losses[0]
    assert train(checkpointing=True) == losses
    # As on a CPU with AVX512-BF16, where bitsandbytes repacks the weights in an evaluation unless
    # it is kept from that. Repacked weights would pass no gradient on.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert train(evaluated=True) == losses


def test_without_bitsandbytes_it_is_named(monkeypatch):
    find_spec = importlib.util.find_spec

    def find_others(name, *arguments):
        return None if name == "bitsandbytes" else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install.*bitsandbytes"):
        resolve(["--dataset", "mini", "--quantize", "nf4"])
    with pytest.raises(UserError, match=r"pip install.*bitsandbytes"):
        four_bit()
