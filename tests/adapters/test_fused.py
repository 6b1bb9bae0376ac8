"""The fused forward, compared with PEFT's own, which still handles all other states."""

import copy
import pickle
from dataclasses import replace
from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilora_diffusion import adapters
from bilora_diffusion.adapters import ASSISTANT, AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.adapters.fused import FusedLinear, fuse, unfuse, unfused

BOTH = (PRIMARY, AUXILIARY)
# Largest allowed error of a result, relative to its norm: a few roundings in its dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def adapted_model(base, ranks=(3, 2), alphas=(6, 3), active=BOTH, **options):
    """Wrap `base` as layer "0" with two random adapters; the options apply to the primary."""
    model = nn.Sequential(base)
    for name, rank, alpha in zip(BOTH, ranks, alphas, strict=True):
        spec = AdapterSpec(rank=rank, alpha=alpha, target_modules=("0",))
        if name == PRIMARY:
            spec = replace(spec, **options)
        adapters.inject(model, spec, name)
        for parameter in adapters.parameters(model, name):
            nn.init.normal_(parameter, std=0.3)
    adapters.activate(model, active)
    return model


def results(model, x, autocast=None, forward=None):
    """Return the output and the gradients of x and all factors, for a loss linear in the output."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = (forward or model)(x)
    # The loss is in float64 so that rounding in its sum does not affect the gradients.
    direction = torch.linspace(-1, 1, output.numel()).view(output.shape)
    model.zero_grad()
    (output.double() * direction).sum().backward()
    tensors = {"output": output.detach(), "x": cast(Tensor, x.grad)}
    for name in adapters.active(model):
        for key, parameter in adapters.named_parameters(model, name).items():
            if parameter.grad is not None:
                tensors[f"{name}.{key}"] = parameter.grad.clone()
    return tensors


def assert_same(fused, peft, tolerance):
    assert fused.keys() == peft.keys()
    for key, value in peft.items():
        assert fused[key].dtype == value.dtype, key
        error = (fused[key].double() - value.double()).norm() / value.double().norm()
        assert float(error) < tolerance, f"{key}: {float(error)}"


each_layer = pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(12, 7), (50, 12)), (nn.Conv2d(12, 7, 3), (2, 12, 6, 5))],
    ids=["linear", "convolution"],
)
INPUTS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
AUTOCAST = st.sampled_from([torch.bfloat16, torch.float16])


@settings(max_examples=80)
@given(
    dtypes=st.sampled_from([(d, d, None) for d in (torch.float64, torch.float32, torch.bfloat16)])
    | st.tuples(INPUTS, INPUTS, AUTOCAST),
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    alphas=st.sampled_from([(4.0, 4.0), (1.0, 7.0), (16.0, 0.5)]),
    shape=st.sampled_from([(12,), (5, 12), (2, 3, 12), (2, 1, 3, 12)]),
    kernel=st.none() | st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), ((3, 1), 1, (0, 2))]),
    bias=st.booleans(),
    active=st.sampled_from([BOTH, BOTH[::-1], (PRIMARY,), (AUXILIARY,)]),
    transposed=st.booleans(),
)
def test_the_fused_forward_equals_pefts(
    dtypes, ranks, alphas, shape, kernel, bias, active, transposed
):
    """`dtypes` are those of the weights, x and autocast; `kernel` is (size, stride, padding)."""
    torch.manual_seed(0)
    weight_dtype, x_dtype, autocast = dtypes
    layer: nn.Module = nn.Linear(12, 7, bias=bias)
    if kernel is not None:
        layer = nn.Conv2d(12, 7, *kernel, bias=bias)
        shape = (2, 12, 6, 5)
    model = adapted_model(layer.to(weight_dtype), ranks, alphas, active)
    peft_class = type(model[0])
    # x must be drawn after the weights. With other values, the terms of a rank-1 gradient can
    # cancel to a twentieth of their size, and bf16's rounding then exceeds the tolerance, even in
    # PEFT's forward.
    x = torch.randn(shape, dtype=x_dtype)
    if transposed and kernel is not None:
        x = x.to(memory_format=torch.channels_last)
    elif transposed and x.dim() > 1:
        x = x.transpose(0, -2)
    expected = results(model, x, autocast)
    assert fuse(model) == 1
    # The fused forward must not fall back to PEFT's.
    with mock.patch.object(peft_class, "forward", side_effect=AssertionError):
        actual = results(model, x, autocast)
    assert_same(actual, expected, TOLERANCE[torch.bfloat16 if autocast else x_dtype])


@each_layer
def test_x_is_not_copied_to_fp32(layer, shape):
    model = adapted_model(copy.deepcopy(layer).to(torch.bfloat16))
    x = torch.randn(shape, dtype=torch.bfloat16)
    shapes_in_fp32 = []
    addresses = []

    def record(tensor):
        if tensor.dtype == torch.float32:
            shapes_in_fp32.append(tensor.shape)
        addresses.append(tensor.data_ptr())
        return tensor

    fuse(model)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(x)
    assert x.shape not in shapes_in_fp32
    assert x.data_ptr() in addresses


@each_layer
@pytest.mark.parametrize("active", [(*BOTH, ASSISTANT), (ASSISTANT,)])
def test_a_frozen_adapter_joins_the_product_without_gradients(layer, shape, active):
    torch.manual_seed(0)
    model = adapted_model(layer, active=(PRIMARY,))
    adapters.inject(model, AdapterSpec(rank=5, alpha=2, target_modules=("0",)), ASSISTANT)
    for parameter in adapters.parameters(model, ASSISTANT):
        nn.init.normal_(parameter, std=0.3)
    adapters.activate(model, active)
    x = torch.randn(shape)
    peft = results(model, x)
    fuse(model)
    with mock.patch.object(lora.Linear, "forward"), mock.patch.object(lora.Conv2d, "forward"):
        fused = results(model, x)
    assert_same(fused, peft, TOLERANCE[torch.float32])
    assert len(fused) == 2 + 2 * (len(active) - 1)  # output, x, and the trained factors


def use_dropout(model):
    model[0].lora_dropout.update({PRIMARY: nn.Dropout(1e-9)})


def evaluate_primary(model):
    adapters.activate(model.eval(), (PRIMARY,))


def hook_A(model):
    model[0].lora_A[PRIMARY].register_forward_hook(lambda module, args, output: output * 2)


def disable(model):
    model[0].enable_adapters(False)


def merge(model):
    model[0].merge(adapter_names=[PRIMARY])


def use_dora(model):
    model[0] = adapted_model(nn.Linear(12, 7), use_dora=True)[0]
    fuse(model)


STATES = [
    use_dropout,
    evaluate_primary,
    hook_A,
    disable,
    merge,
    use_dora,
    nn.Module.half,
]


@pytest.mark.parametrize("change_state", STATES)
def test_pefts_own_forward_handles_all_other_states(change_state):
    torch.manual_seed(0)
    model = adapted_model(nn.Linear(12, 7))
    fuse(model)
    change_state(model)
    x = torch.randn(5, 12, dtype=next(model.parameters()).dtype)
    with unfused(model):
        expected = model(x)
    with mock.patch.object(lora.Linear, "forward", autospec=True) as forward:
        # PEFT's forward is called once, and the layer returns its output.
        forward.side_effect = lambda *_: expected.clone()
        assert torch.equal(model(x), expected)
    assert forward.call_count == 1


def double_output(base):
    base.register_forward_hook(lambda module, args, output: 2 * output)


def double_input(base):
    base.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def replace_forward(base):
    """Replace a layer's forward, as accelerate does for a layer that it offloads."""
    forward = base.forward
    base.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change_base", [double_output, double_input, replace_forward])
def test_hooks_and_another_forward_of_the_base_layer_are_called(change_base):
    torch.manual_seed(0)
    model = adapted_model(nn.Linear(12, 7))
    x = torch.randn(5, 12)
    unchanged = model(x)
    layer: Any = model[0]
    change_base(layer.get_base_layer())
    with unfused(model):
        expected = model(x)
    assert not torch.allclose(expected, unchanged)
    fuse(model)
    torch.testing.assert_close(model(x), expected)


def test_a_plain_auxiliary_is_added_outside_of_a_dora_primarys_norm():
    """The weight is m (W + D) / ||W + D|| + E, since the primary's D comes before E."""
    torch.manual_seed(0)
    model = adapted_model(nn.Linear(12, 7), use_dora=True)
    x = torch.randn(5, 12)
    fuse(model)
    auxiliary = adapters.factors(model, AUXILIARY)[0]
    with adapters.only(model, (PRIMARY,)):
        primary_output = model(x)
    expected = primary_output + auxiliary.scale * x @ auxiliary.A.T @ auxiliary.B.T
    torch.testing.assert_close(model(x), expected)


def test_unfuse_restores_pefts_class_and_copies_stay_fused():
    model = adapted_model(nn.Linear(12, 7))
    x = torch.randn(5, 12)
    assert fuse(model) == fuse(model) == 1
    for model_copy in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(model_copy[0]) is FusedLinear
        assert torch.equal(model_copy(x), model(x))
    with unfused(model):
        assert type(model[0]) is lora.Linear
    assert type(model[0]) is FusedLinear
    unfuse(model)
    assert type(model[0]) is lora.Linear


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: partial(checkpoint, model, use_reentrant=False),
        lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    ],
    ids=["checkpointed", "compiled without breaks"],
)
@each_layer
def test_checkpointing_and_compilation_do_not_change_the_results(wrap, autocast, layer, shape):
    torch.manual_seed(0)
    model, x = adapted_model(copy.deepcopy(layer)), torch.randn(shape)
    fuse(model)
    expected = results(model, x, autocast)
    actual = results(model, x, autocast, wrap(model))
    assert_same(actual, expected, TOLERANCE[torch.bfloat16] if autocast else 1e-6)
