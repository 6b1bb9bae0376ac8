"""inits: PiSSA and LoRA-GA against PEFT, whole decompositions and a literal reference."""

import copy
import math
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bilora_diffusion import adapters, inits
from bilora_diffusion.adapters import CHANGE_BASE, INITIAL, PRIMARY, AdapterSpec
from bilora_diffusion.inits.lora_ga import lora_ga
from bilora_diffusion.inits.pissa import pissa
from bilora_diffusion.train.gradients import collecting
from tests.references import lora_ga as reference


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same_components(rows, expected, tolerance=1e-5):
    """Equal up to the sign of each row, which a singular value decomposition leaves open."""
    signs = (rows * expected).sum(1).sign()
    torch.testing.assert_close(signs[:, None] * rows, expected, rtol=tolerance, atol=tolerance)


def weight_of(model, index=0):
    """The weight of one layer of a sequence, without adapters."""
    return cast(Any, model)[index].weight.detach()


def start(model, spec, gradients=None):
    """Start from an init as a method and a fresh run do, without a method."""
    adapters.inject(model, spec)
    inits.prepare(model, spec)
    inits.compute(model, spec, gradients)
    adapters.start_from_initial(model)


@pytest.mark.parametrize("transposed", [False, True])
def test_pissa_is_pefts_up_to_signs(transposed):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 9) if transposed else nn.Linear(9, 12))
    own = copy.deepcopy(model)
    spec: dict[str, Any] = {"lora_alpha": 5, "target_modules": ["0"], "init_lora_weights": "pissa"}
    inject_adapter_in_model(LoraConfig(r=3, fan_in_fan_out=transposed, **spec), model)
    start(own, AdapterSpec(rank=3, alpha=5, init="pissa", target_modules=("0",)))
    (theirs,), (ours,) = (adapters.factors(m, PRIMARY) for m in (model, own))
    assert_same_components(ours.A, theirs.A)
    assert_same_components(ours.B.T, theirs.B.T)
    left, right = (adapters.base_weight(adapters.layers(m)[0][1]) for m in (model, own))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", [pissa, lora_ga])
def test_of_a_large_weight_it_is_close_repeatable_and_quiet(init, monkeypatch):
    U, V = (torch.linalg.qr(random(60, 60, seed=s))[0] for s in (1, 2))
    weight = U * torch.logspace(0, -3, 60, dtype=torch.float64) @ V.T
    rest, near = ((2.0,), 1e-5) if init is pissa else ((), 1e-3)
    exact = init(weight, 4, *rest)
    monkeypatch.setattr("bilora_diffusion.inits.pissa.EXACT_UP_TO", 59)
    before = torch.random.get_rng_state()
    first, second, other = (init(weight, 4, *rest, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert_same_components(first[0], exact[0], near)
    assert_same_components(first[1].T, exact[1].T, near)


@pytest.mark.parametrize(("shape", "rank"), [((16, 30), 1), ((30, 16), 8), ((20, 20), 4)])
def test_lora_ga_has_the_papers_components_and_size(shape, rank):
    U, V = (torch.linalg.qr(random(n, 16, seed=n))[0] for n in shape)
    gradient = U * torch.logspace(0, -4, 16, dtype=torch.float64) @ V.T
    A, B = lora_ga(gradient, rank)
    c = shape[0] ** 0.25 / math.sqrt(16)
    torch.testing.assert_close(A @ A.T, c**2 * torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(B.T @ B, c**2 * torch.eye(rank, dtype=torch.float64))
    # B spans other components of the columns than those that A spans of the rows.
    assert float((B.T @ gradient @ A.T).abs().max()) < 1e-6
    for scale in (1e-9, 1e9):
        torch.testing.assert_close(lora_ga(scale * gradient, rank), (A, B), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [lambda W: pissa(W, 3, 2.0), lambda W: lora_ga(W, 3)])
def test_rounding_of_the_input_turns_no_sign(make):
    U, V = (torch.linalg.qr(random(12, 12, seed=s))[0] for s in (1, 2))
    matrix = U * torch.logspace(0, -4, 12, dtype=torch.float64) @ V.T
    exact = make(matrix)
    for seed in range(20):
        noisy = make(matrix + 1e-9 * random(12, 12, seed=seed))
        torch.testing.assert_close(noisy, exact, rtol=1e-5, atol=1e-5)


def test_lora_ga_is_the_reference_from_the_loss_on():
    W1, W2 = random(10, 12, seed=1), random(9, 10, seed=2)
    x, y = random(6, 12, seed=3), random(6, 9, seed=4)
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 9, bias=False))
    model.double()
    with torch.no_grad():
        weight_of(model, 0).copy_(W1)
        weight_of(model, 2).copy_(W2)
    spec = AdapterSpec(rank=2, alpha=3, init="lora-ga", target_modules=("0", "2"))
    adapters.inject(model, spec)
    inits.prepare(model, spec)
    with collecting(model) as gradients:
        for i in range(0, 6, 2):  # cut into three passes
            ((model(x[i : i + 2]) - y[i : i + 2]).square().sum() / 6).backward()
    expected = reference.mean_gradients(W1, W2, x, y)
    for (_, gradient), literal in zip(sorted(gradients.items()), expected, strict=True):
        torch.testing.assert_close(gradient, literal)
    inits.compute(model, spec, gradients)
    adapters.start_from_initial(model)
    layers = adapters.layers(model)
    for (_, layer), own, G, W in zip(
        layers, adapters.factors(model, PRIMARY), expected, (W1, W2), strict=True
    ):
        A0, B0 = reference.initial_factors(G, 2)
        assert_same_components(own.A, A0, 1e-6)
        assert_same_components(own.B.T, B0.T, 1e-6)
        literal = reference.initial_weight(W, own.A, own.B, alpha=3)
        torch.testing.assert_close(adapters.base_weight(layer).detach(), literal)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", CHANGE_BASE)
def test_a_convolution_is_a_matrix_of_its_kernels(layout, use_dora, init):
    torch.manual_seed(0)
    model = cast(Any, nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))).to(memory_format=layout)
    x, weight = torch.randn(2, 3, 6, 6), weight_of(model).clone()
    before, gradient = model(x), torch.randn(8, 3, 3, 3)
    spec = AdapterSpec(rank=2, alpha=3, init=init, use_dora=use_dora, target_modules=("0",))
    start(model, spec, {"0": gradient})
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    (_, layer), *_ = adapters.layers(model)
    change = cast(Any, layer).get_delta_weight(INITIAL).detach()
    torch.testing.assert_close(adapters.base_weight(layer) + change, weight)
    if init == "pissa":
        rest = torch.linalg.svdvals(weight.flatten(1))[2:]
        torch.testing.assert_close((weight - change).norm(), rest.norm())
    else:
        V = torch.linalg.svd(gradient.flatten(1), full_matrices=False)[2][:2]
        A = layer.lora_A[INITIAL].weight.detach().flatten(1)  # pyright: ignore
        assert_same_components(A / A.norm(dim=1, keepdim=True), V, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_moves_by_one_rounding(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    weight = weight_of(model).float()
    start(model, AdapterSpec(rank=4, init="pissa", target_modules=("0",)))
    (_, layer), *_ = adapters.layers(model)
    rest = adapters.base_weight(layer).float()
    exact = weight.double() - cast(Any, layer).get_delta_weight(INITIAL).double()
    error = (rest - exact).abs() / exact.abs()
    half_ulp = torch.finfo(dtype).eps / 2
    assert float(error.max()) <= half_ulp * 1.001
    assert float(error.square().mean().sqrt()) < half_ulp / 2
    assert {p.dtype for p in adapters.parameters(model, INITIAL)} == {torch.float32}
