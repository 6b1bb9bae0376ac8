"""fused: one product for both adapters, equal to PEFT's forward, which serves all other states."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
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
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.adapters.fused import FusedLinear, fuse, held, unfuse, unfused
from tests.contract.models import CASES

BOTH = (PRIMARY, AUXILIARY)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def adapted(
    base: nn.Module,
    ranks: tuple[int, int] = (3, 2),
    alphas: tuple[float, float] = (6, 3),
    active: tuple[str, ...] = BOTH,
    **options: Any,
) -> nn.Sequential:
    """`base` with two filled adapters on layer "0"."""
    model = nn.Sequential(base)
    for name, rank, alpha in zip(BOTH, ranks, alphas, strict=True):
        spec = AdapterSpec(rank=rank, alpha=alpha, target_modules=("0",), **options)
        adapters.inject(model, spec, name)
        options = {}
        for parameter in adapters.parameters(model, name):
            nn.init.normal_(parameter, std=0.3)
    adapters.activate(model, active)
    return model


def results(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, and gradients of every factor and of x, for a fixed loss."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(x)
    direction = torch.linspace(-1, 1, output.numel()).view(output.shape)
    model.zero_grad()
    (output.double() * direction).sum().backward()
    found = {"output": output.detach(), "x": cast(Tensor, x.grad)}
    for name in adapters.active(model):
        for key, parameter in adapters.named_parameters(model, name).items():
            found[f"{name}.{key}"] = cast(Tensor, parameter.grad).clone()
    return found


def assert_same(fused: dict[str, Tensor], peft: dict[str, Tensor], tolerance: float) -> None:
    assert fused.keys() == peft.keys()
    for key, value in peft.items():
        assert fused[key].dtype == value.dtype, key
        error = (fused[key].double() - value.double()).norm() / value.double().norm()
        assert float(error) < tolerance, f"{key}: {float(error)}"


@pytest.fixture
def peft_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each call of PEFT's own forward."""
    calls: list[int] = []
    original = lora.Linear.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", counted)
    return calls


each_layer = pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(12, 7), (50, 12)), (nn.Conv2d(12, 7, 3), (2, 12, 6, 5))],
    ids=["linear", "convolution"],
)
WIDE = (torch.float64, torch.float32, torch.bfloat16)
NARROW = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=80)
@given(
    dtypes=st.sampled_from([(dtype, dtype, None) for dtype in WIDE])
    | st.tuples(st.sampled_from(NARROW), st.sampled_from(NARROW), st.sampled_from(NARROW[1:])),
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    alphas=st.sampled_from([(4.0, 4.0), (1.0, 7.0), (16.0, 0.5)]),
    shape=st.sampled_from([(12,), (5, 12), (2, 3, 12), (2, 1, 3, 12)]),
    kernel=st.none() | st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), ((3, 1), 1, (0, 2))]),
    bias=st.booleans(),
    active=st.sampled_from([BOTH, BOTH[::-1], (PRIMARY,), (AUXILIARY,)]),
    transposed=st.booleans(),
)
def test_same_as_peft(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    ranks: tuple[int, int],
    alphas: tuple[float, float],
    shape: tuple[int, ...],
    kernel: tuple[Any, ...] | None,
    bias: bool,
    active: tuple[str, ...],
    transposed: bool,
) -> None:
    """`dtypes` are of the weights, of x, and of autocast; `kernel` is that of a convolution, with
    stride and padding.
    """
    torch.manual_seed(0)
    base, own, autocast = dtypes
    layer: nn.Module = nn.Linear(12, 7, bias=bias)
    if kernel is not None:
        layer, shape = nn.Conv2d(12, 7, *kernel, bias=bias), (2, 12, 6, 5)
    model = adapted(layer.to(base), ranks, alphas, active)
    x = torch.randn(shape, dtype=own)
    if transposed and kernel is not None:
        x = x.to(memory_format=torch.channels_last)
    elif transposed and x.dim() > 1:
        x = x.transpose(0, -2)
    expected = results(model, x, autocast)
    assert fuse(model) == 1
    with mock.patch.object(type(model[0]).__mro__[2], "forward", side_effect=AssertionError):
        made = results(model, x, autocast)
    assert_same(made, expected, TOLERANCE[torch.bfloat16 if autocast else own])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_that_of_the_sum_of_the_weights(stride: int) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(5, 7, 3, stride, 1).double()
    model, x = adapted(base), torch.randn(2, 5, 6, 5, dtype=torch.float64)
    fuse(model)
    whole = base.weight.clone()
    for name in BOTH:
        (factors,) = adapters.factors(model, name)
        for out, row in enumerate(factors.B @ factors.A):
            whole[out] += factors.scale * row.view(5, 3, 3)
    expected = nn.functional.conv2d(x, whole, base.bias, stride, 1)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@each_layer
def test_x_is_not_copied_to_fp32(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = adapted(copy.deepcopy(layer).to(torch.bfloat16))
    x = torch.randn(shape, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    fuse(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert not [t for t in kept if t.dtype == torch.float32 and t.shape == x.shape]
    assert [t for t in kept if t.data_ptr() == x.data_ptr()]


def _dropout(model: nn.Module) -> None:
    layer = cast(Any, adapters.layers(model)[0][1])
    layer.lora_dropout[PRIMARY] = nn.Dropout(1e-9)


def _one_in_eval(model: nn.Module) -> None:
    adapters.activate(model, (PRIMARY,))
    model.eval()


def _hook_on_a(model: nn.Module) -> None:
    layer = cast(Any, adapters.layers(model)[0][1])
    layer.lora_A[PRIMARY].register_forward_hook(lambda module, args, output: output * 2)


def _third(model: nn.Module) -> None:
    adapters.inject(model, AdapterSpec(target_modules=("0",)), "third")
    adapters.activate(model, (*BOTH, "third"))


def _disabled(model: nn.Module) -> None:
    adapters.layers(model)[0][1].enable_adapters(False)


def _merged(model: nn.Module) -> None:
    cast(Any, adapters.layers(model)[0][1]).merge(adapter_names=[PRIMARY])


def _dora(model: nn.Module) -> None:
    model[0] = adapted(nn.Linear(12, 7), use_dora=True)[0]  # pyright: ignore
    fuse(model)


def _half(model: nn.Module) -> None:
    model.half()


@pytest.mark.parametrize(
    "change",
    [_dropout, _one_in_eval, _hook_on_a, _third, _disabled, _merged, _dora, _half],
    ids=lambda f: f.__name__.strip("_"),
)
def test_other_states_are_left_to_peft(
    change: Callable[[nn.Module], None], peft_calls: list[int]
) -> None:
    torch.manual_seed(0)
    model, x = adapted(nn.Linear(12, 7)), torch.randn(5, 12)
    x = x.half() if change is _half else x
    fuse(model)
    change(model)
    with unfused(model):
        expected = model(x)
    peft_calls.clear()
    assert torch.equal(model(x), expected)
    assert peft_calls == [1]


def test_mixed_batches_are_left_to_peft() -> None:
    model, x = adapted(nn.Linear(12, 7)), torch.randn(2, 12)
    fuse(model)
    mixed = cast(Any, model[0])(x, adapter_names=[PRIMARY, AUXILIARY])
    for i, name in enumerate(BOTH):
        with adapters.only(model, (name,)):
            torch.testing.assert_close(mixed[i], model(x)[i])


def test_dora_primary_with_plain_auxiliary_adds_the_auxiliary_outside() -> None:
    """m (W + D) / ||W + D|| + E: the order of the adapters decides, and is [primary, auxiliary]."""
    torch.manual_seed(0)
    model, x = adapted(nn.Linear(12, 7), use_dora=True), torch.randn(5, 12)
    fuse(model)
    auxiliary = adapters.factors(model, AUXILIARY)[0]
    with adapters.only(model, (PRIMARY,)):
        primary = model(x)
    expected = primary + auxiliary.scale * x @ auxiliary.A.T @ auxiliary.B.T
    torch.testing.assert_close(model(x), expected)


def test_a_hook_on_the_base_layer_keeps_its_output() -> None:
    model, x = adapted(nn.Linear(12, 7)), torch.randn(5, 12)
    fuse(model)
    base = cast(Any, model[0]).base_layer
    seen: list[Tensor] = []
    base.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(x)
    assert torch.equal(seen[0], nn.functional.linear(x, base.weight, base.bias))
    assert not torch.equal(output, seen[0])


def test_unfuse_gives_pefts_class_back_and_copies_are_fused_too() -> None:
    model, x = adapted(nn.Linear(12, 7)), torch.randn(5, 12)
    assert fuse(model) == fuse(model) == 1
    assert isinstance(model[0], lora.Linear)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is FusedLinear
        assert torch.equal(twin(x), model(x))
    for kind in (FusedLinear, lora.Linear):
        assert type(model[0]) is kind
        with unfused(model):
            assert type(model[0]) is lora.Linear
        assert type(model[0]) is kind
        unfuse(model)
    convolution = nn.Sequential(nn.Conv1d(3, 4, 3))
    adapters.inject(convolution, AdapterSpec(target_modules=("0",)))
    assert fuse(convolution) == 0


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: Checkpointed(model, False),
        lambda model: Checkpointed(model, True),
        lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    ],
    ids=["checkpointed", "reentrant", "compiled without breaks"],
)
@each_layer
def test_checkpointed_or_compiled_it_is_the_same(
    wrap: Callable[[nn.Module], Any],
    autocast: torch.dtype | None,
    layer: nn.Module,
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    model, x = adapted(copy.deepcopy(layer)), torch.randn(shape)
    fuse(model)
    expected = results(model, x, autocast)
    made = {key.replace("inner.", ""): v for key, v in results(wrap(model), x, autocast).items()}
    assert_same(made, expected, TOLERANCE[torch.bfloat16] if autocast else 1e-6)


@pytest.mark.parametrize("kind", list(CASES))
def test_whole_models(kind: str) -> None:
    case = CASES[kind]
    model = case.make()
    for name in BOTH:
        adapters.inject(model, AdapterSpec(rank=2, target_modules=case.targets), name)
        for parameter in adapters.parameters(model, name):
            nn.init.normal_(parameter, std=0.1)
    adapters.activate(model, BOTH)
    expected = case.output(model)
    assert fuse(model) > 1
    torch.testing.assert_close(case.output(model), expected, rtol=1e-4, atol=1e-5)


def test_held_factors_are_put_side_by_side_once_and_anew_afterwards() -> None:
    torch.manual_seed(0)
    model, x = adapted(nn.Linear(12, 7)), torch.randn(5, 12)
    fuse(model)
    wrapped = Checkpointed(model, reentrant=False)
    expected = results(wrapped, x)
    puts = mock.Mock(side_effect=torch.cat)
    with held(), mock.patch.object(torch, "cat", puts):
        for _ in range(2):  # micro-batches, each with a forward that is made again
            assert_same(results(wrapped, x), expected, 1e-6)
        assert puts.call_count == 2  # A and B
    with torch.no_grad():
        for parameter in adapters.parameters(model, PRIMARY):
            parameter.mul_(2)
    with unfused(model):
        changed = model(x)
    assert not torch.allclose(changed, expected["output"])
    torch.testing.assert_close(model(x), changed)
    with held():
        torch.testing.assert_close(model(x), changed)
