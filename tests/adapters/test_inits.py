"""inits: PiSSA and LoRA-GA against PEFT, whole decompositions and a literal reference; in use on
models, from a task's loss, through the API, and refused.
"""

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bilora_diffusion import BiLoRAConfig, adapters, attach
from bilora_diffusion.adapters import AUXILIARY, CHANGE_BASE, INITIAL, PRIMARY, AdapterSpec, inits
from bilora_diffusion.adapters.inits import lora_ga, pissa
from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.methods import Target, create
from bilora_diffusion.train import initialisation as gradients_module
from bilora_diffusion.train.initialisation import collecting, mean_gradients
from bilora_diffusion.train.task import MicroBatch
from tests.contract.models import CASES, tiny_mlp
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
    our_model = copy.deepcopy(model)
    spec: dict[str, Any] = {"lora_alpha": 5, "target_modules": ["0"], "init_lora_weights": "pissa"}
    inject_adapter_in_model(LoraConfig(r=3, fan_in_fan_out=transposed, **spec), model)
    start(our_model, AdapterSpec(rank=3, alpha=5, init="pissa", target_modules=("0",)))
    (theirs,), (ours,) = (adapters.factors(m, PRIMARY) for m in (model, our_model))
    assert_same_components(ours.A, theirs.A)
    assert_same_components(ours.B.T, theirs.B.T)
    left, right = (adapters.base_weight(adapters.layers(m)[0][1]) for m in (model, our_model))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", [pissa, lora_ga])
def test_of_a_large_weight_it_is_close_repeatable_and_quiet(init, monkeypatch):
    U, V = (torch.linalg.qr(random(60, 60, seed=s))[0] for s in (1, 2))
    weight = U * torch.logspace(0, -3, 60, dtype=torch.float64) @ V.T
    arguments, near = ((2.0,), 1e-5) if init is pissa else ((), 1e-3)
    exact = init(weight, 4, *arguments)
    monkeypatch.setattr("bilora_diffusion.adapters.inits.EXACT_UP_TO", 59)
    before = torch.random.get_rng_state()
    first, second, reseeded = (init(weight, 4, *arguments, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], reseeded[0])
    assert_same_components(first[0], exact[0], near)
    assert_same_components(first[1].T, exact[1].T, near)


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
    for (_, layer), factors, G, W in zip(
        layers, adapters.factors(model, PRIMARY), expected, (W1, W2), strict=True
    ):
        A0, B0 = reference.initial_factors(G, 2)
        assert_same_components(factors.A, A0, 1e-6)
        assert_same_components(factors.B.T, B0.T, 1e-6)
        torch.testing.assert_close(lora_ga(1e9 * G, 2), lora_ga(G, 2))
        literal = reference.initial_weight(W, factors.A, factors.B, alpha=3)
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
        tail_values = torch.linalg.svdvals(weight.flatten(1))[2:]
        torch.testing.assert_close((weight - change).norm(), tail_values.norm())
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
    residual = adapters.base_weight(layer).float()
    exact = weight.double() - cast(Any, layer).get_delta_weight(INITIAL).double()
    error = (residual - exact).abs() / exact.abs()
    half_ulp = torch.finfo(dtype).eps / 2
    assert float(error.max()) <= half_ulp * 1.001
    assert float(error.square().mean().sqrt()) < half_ulp / 2
    assert {p.dtype for p in adapters.parameters(model, INITIAL)} == {torch.float32}


TARGETS = ("first", "conv", "last")


def test_collecting_gives_the_gradients_of_the_model_as_it_came():
    case = CASES["unet"]
    base, model = case.make().train(), case.make().train()

    def backward(network):
        (case.output(network) - 1).square().mean().backward()

    backward(base)
    spec = AdapterSpec(rank=2, use_dora=True, init="lora-ga", target_modules=case.targets)
    adapters.inject(model, spec)
    inits.prepare(model, spec)
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        for parameter in adapters.parameters(model, PRIMARY):
            parameter.add_(0.1)  # does not act meanwhile
    with collecting(model) as gradients:
        backward(model)
        backward(model)
        assert all(p.grad is None for p in model.parameters())
    assert gradients.keys() == {path for path, _ in adapters.layers(model)}
    for path, value in gradients.items():
        expected = cast(Tensor, base.get_submodule(path).weight.grad)
        torch.testing.assert_close(value, 2 * expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="boom"), collecting(model):
        raise RuntimeError("boom")
    assert flags == [p.requires_grad for p in model.parameters()]
    assert adapters.active(model) == (PRIMARY,)
    backward(model)  # no hook is left: base weights have no gradient, adapters have
    assert adapters.parameters(model, PRIMARY)[0].grad is not None


class Toy:
    """A task whose samples are random vectors keyed by their slot."""

    num_samples = 5

    def __init__(self, scale=1.0, dtype=torch.float32):
        self.model = tiny_mlp().to(dtype)
        self.slot_requests: list[tuple[int, tuple[int, ...]]] = []
        self.scale, self.dtype = scale, dtype

    @property
    def module(self):
        return lambda inputs: self.model(inputs["x"]).float().square().mean(1) * self.scale

    def micro_batches(self, schedule, step_size):
        for step, slots in schedule:
            self.slot_requests.append((step * step_size, slots))
            names = tuple(str(slot) for slot in slots)
            yield MicroBatch(slots, names, names, {"x": self.rows(slots)})

    def rows(self, slots):
        vectors = [torch.randn(6, generator=torch.Generator().manual_seed(slot)) for slot in slots]
        return torch.stack(vectors).to(self.dtype)

    def targets(self):
        return [Target("toy", self.model, AdapterSpec(2, 3, 0, "lora-ga", False, TARGETS), 1e-2)]


def gradient_of(task, micro_batch=2):
    create("lora").setup(task.targets())
    cfg: Any = SimpleNamespace(lora_ga_samples=7, train_batch_size=micro_batch, seed=0)
    device, models = torch.device("cpu"), {"toy": task.model}
    return mean_gradients(cast(Any, task), models, cfg, device)["toy"]


def test_the_tasks_mean_gradient_depends_on_the_samples_alone():
    tasks, plain = [Toy(), Toy()], Toy()
    by_ones, by_threes = (gradient_of(t, micro_batch=m) for t, m in zip(tasks, (1, 3), strict=True))
    plain.module({"x": plain.rows(range(7))}).mean().backward()
    for path, value in by_ones.items():
        torch.testing.assert_close(value, by_threes[path])
        torch.testing.assert_close(value, plain.model.get_submodule(path).weight.grad)
    first, _ = tasks[1].slot_requests[0]
    assert first % Toy.num_samples == 0  # a whole number of epochs
    assert first > 10**9  # which no run reaches
    assert [s for _, slots in tasks[1].slot_requests for s in slots] == list(range(7))


def test_fp16_gradients_are_scaled_and_scaled_back(monkeypatch):
    exact = gradient_of(Toy())
    for scale in (1.0, 1e4):  # the second overflows at first
        half = gradient_of(Toy(scale=scale, dtype=torch.float16))
        for path, value in half.items():
            torch.testing.assert_close(value / scale, exact[path], rtol=0.05, atol=2e-3)
    with pytest.raises(TrainingError, match="not finite for 0, 1"):  # the loss of these samples
        gradient_of(Toy(scale=float("nan")))
    monkeypatch.setattr(gradients_module, "FP16_SCALES", (2.0**20,))
    with pytest.raises(TrainingError, match=r"toy\..* is not finite.*bf16"):
        gradient_of(Toy(scale=1e4, dtype=torch.float16))


def test_lora_ga_through_the_api_needs_a_gradient_and_leaves_other_layers_alone():
    model, usual = tiny_mlp(), tiny_mlp()
    torch.manual_seed(1)
    bilora = attach(model, BiLoRAConfig(rank=2, init="lora-ga", target_modules=TARGETS))
    torch.manual_seed(1)
    attach(usual, BiLoRAConfig(rank=2, target_modules=TARGETS))
    first = cast(Any, model).first
    nothing = lambda: None  # noqa: E731
    broken = lambda: (first(torch.ones(4, 6)) * torch.nan).sum().backward()  # noqa: E731
    pissa_bilora = attach(tiny_mlp(), BiLoRAConfig(rank=2, init="pissa"))
    for refuse, word in (
        (lambda: bilora.param_groups(lr=1e-3), "call initialise"),
        (lambda: bilora.initialise(nothing), "no layer got one"),
        (lambda: bilora.initialise(broken), "gradient of first is not finite"),
        (lambda: pissa_bilora.initialise(nothing), "needs no gradient"),
    ):
        with pytest.raises((UserError, TrainingError), match=word):
            refuse()
    bilora.initialise(lambda: first(torch.randn(4, 6)).square().sum().backward())
    for factors, plain in zip(*(adapters.factors(m, PRIMARY) for m in (model, usual)), strict=True):
        assert torch.equal(factors.A, plain.A) == (factors.name != "first")
        assert bool(factors.B.any()) == (factors.name == "first")
    assert bilora.param_groups(lr=1e-3)
    with pytest.raises(UserError, match="already"):
        bilora.initialise(lambda: None)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cast(Any, model[1]).weight = model[0].weight
    return model


def quantized():
    model = nn.Sequential(nn.Linear(8, 8))
    quantize(model, torch.float32)
    return model


def brought():
    """A model with an adapter of its own."""
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))


def test_what_an_init_can_not_start_is_refused():
    for make, init, rank, word in (
        (tiny_mlp, "lora-ga", 3, r"last is 5 x 8.*needs 6 on each"),
        (tied, "pissa", 2, "weight of 0 is shared"),
        (quantized, "pissa", 2, "weight of 0 is quantized"),
        (brought, "pissa", 2, 'init "pissa" would replace'),
    ):
        targets = TARGETS if make is tiny_mlp else ("0",)
        with pytest.raises(UserError, match=word):
            attach(make(), BiLoRAConfig(rank=rank, alpha=8, init=init, target_modules=targets))


def test_the_initial_adapter_never_acts():
    model = tiny_mlp()
    attach(model, BiLoRAConfig(rank=2, init="pissa", target_modules=TARGETS))
    with pytest.raises(UserError, match="counted twice"):
        adapters.activate(model, (PRIMARY, INITIAL))
    with pytest.raises(UserError, match="counted twice"), adapters.only(model, (INITIAL,)):
        pass
    assert adapters.active(model) == (PRIMARY, AUXILIARY)
