"""PiSSA and LoRA-GA, compared with PEFT, exact decompositions and a literal reference.

Further tests use them on models, with a task's loss and through the API, and check refusals.
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


def falling_spectrum(size, lowest):
    """Return a square matrix whose singular values fall from 1 to 10^lowest, all different."""
    left_vectors = torch.linalg.qr(random(size, size, seed=1)).Q
    right_vectors = torch.linalg.qr(random(size, size, seed=2)).Q
    values = torch.logspace(0, lowest, size, dtype=torch.float64)
    return left_vectors * values @ right_vectors.T


def assert_same_components(rows, expected, tolerance=1e-5):
    """Check equality up to each row's sign, which a singular value decomposition does not fix."""
    signs = (rows * expected).sum(1).sign()
    torch.testing.assert_close(signs[:, None] * rows, expected, rtol=tolerance, atol=tolerance)


def weight_of(model, index=0):
    """Return the weight of one layer of a `Sequential` without adapters."""
    return cast(Any, model)[index].weight.detach()


def base_weight_of(model, index=0):
    """Return the base weight of one adapted layer of a `Sequential`."""
    return adapters.base_weight(cast(Any, model)[index]).detach()


def delta_of(layer, name=INITIAL):
    """Return s B A in the weight's shape."""
    return layer.get_delta_weight(name).detach()


def start(model, spec, gradients=None):
    """Apply an init as a new run does, but without a method."""
    adapters.inject(model, spec)
    inits.prepare(model, spec)
    inits.compute(model, spec, gradients)
    adapters.start_from_initial(model)


@pytest.mark.parametrize("transposed", [False, True])
def test_pissa_equals_pefts_up_to_signs(transposed):
    torch.manual_seed(0)
    peft_model = nn.Sequential(Conv1D(12, 9) if transposed else nn.Linear(9, 12))
    model = copy.deepcopy(peft_model)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["0"],
        init_lora_weights="pissa",
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, peft_model)
    start(model, AdapterSpec(rank=3, alpha=5, init="pissa", target_modules=("0",)))
    (peft_factors,) = adapters.factors(peft_model, PRIMARY)
    (factors,) = adapters.factors(model, PRIMARY)
    assert_same_components(factors.A, peft_factors.A)
    assert_same_components(factors.B.T, peft_factors.B.T)
    residual, peft_residual = base_weight_of(model), base_weight_of(peft_model)
    torch.testing.assert_close(residual, peft_residual, rtol=1e-5, atol=1e-6)


def pissa_of_rank_4(weight, **options):
    return pissa(weight, 4, 2.0, **options)


def lora_ga_of_rank_4(gradient, **options):
    return lora_ga(gradient, 4, **options)


INITS = {pissa_of_rank_4: 1e-5, lora_ga_of_rank_4: 1e-3}
"""Init -> largest allowed error of its randomized decomposition."""


@pytest.mark.parametrize("init", INITS)
def test_randomized_decompositions_are_close_repeatable_and_keep_the_global_rng_state(
    init, monkeypatch
):
    weight = falling_spectrum(60, lowest=-3)
    exact_A, exact_B = init(weight)
    monkeypatch.setattr("bilora_diffusion.adapters.inits.EXACT_UP_TO", 59)
    global_state = torch.random.get_rng_state()
    A, B = init(weight, seed=3)
    repeated_A, repeated_B = init(weight, seed=3)
    reseeded_A, _ = init(weight, seed=4)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert torch.equal(A, repeated_A)
    assert torch.equal(B, repeated_B)
    assert not torch.equal(A, reseeded_A)
    assert_same_components(A, exact_A, INITS[init])
    assert_same_components(B.T, exact_B.T, INITS[init])


@pytest.mark.parametrize("init", INITS)
def test_rounding_of_the_input_flips_no_sign(init):
    matrix = falling_spectrum(12, lowest=-4)
    exact = init(matrix)
    for seed in range(20):
        noisy = init(matrix + 1e-9 * random(12, 12, seed=seed))
        torch.testing.assert_close(noisy, exact, rtol=1e-5, atol=1e-5)


def test_lora_ga_equals_the_reference_from_the_loss_to_the_residual():
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
        for rows in torch.arange(6).chunk(3):  # in three passes
            ((model(x[rows]) - y[rows]).square().sum() / 6).backward()
    G1, G2 = reference.mean_gradients(W1, W2, x, y)
    torch.testing.assert_close(gradients, {"0": G1, "2": G2})
    inits.compute(model, spec, gradients)
    adapters.start_from_initial(model)
    first, second = adapters.factors(model, PRIMARY)
    for factors, index, W, G in ((first, 0, W1, G1), (second, 2, W2, G2)):
        A0, B0 = reference.initial_factors(G, 2)
        assert_same_components(factors.A, A0, 1e-6)
        assert_same_components(factors.B.T, B0.T, 1e-6)
        residual = reference.initial_weight(W, factors.A, factors.B, alpha=3)
        torch.testing.assert_close(base_weight_of(model, index), residual)
        # The scale of the loss does not matter.
        torch.testing.assert_close(lora_ga(1e9 * G, 2), lora_ga(G, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", CHANGE_BASE)
def test_a_convolution_is_decomposed_as_a_matrix_of_its_kernels(layout, use_dora, init):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    model.to(memory_format=layout)
    x = torch.randn(2, 3, 6, 6)
    weight = weight_of(model).clone()
    base_output = model(x)
    gradient = torch.randn(8, 3, 3, 3)
    spec = AdapterSpec(rank=2, alpha=3, init=init, use_dora=use_dora, target_modules=("0",))
    start(model, spec, {"0": gradient})
    torch.testing.assert_close(model(x), base_output, rtol=1e-5, atol=1e-5)
    delta = delta_of(model[0])
    torch.testing.assert_close(base_weight_of(model) + delta, weight)
    if init == "pissa":
        # Eckart-Young: the best rank-2 approximation's residual has the other singular values.
        other_values = torch.linalg.svdvals(weight.flatten(1))[2:]
        torch.testing.assert_close((weight - delta).norm(), other_values.norm())
    else:
        right_vectors = torch.linalg.svd(gradient.flatten(1), full_matrices=False).Vh[:2]
        A = model[0].lora_A[INITIAL].weight.detach().flatten(1)
        assert_same_components(A / A.norm(dim=1, keepdim=True), right_vectors, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_weight_is_rounded_only_once(dtype):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    weight = weight_of(model).double()
    start(model, AdapterSpec(rank=4, init="pissa", target_modules=("0",)))
    exact_residual = weight - delta_of(model[0]).double()
    error = (base_weight_of(model) - exact_residual).abs() / exact_residual.abs()
    half_ulp = torch.finfo(dtype).eps / 2
    assert float(error.max()) <= half_ulp * 1.001
    assert float(error.square().mean().sqrt()) < half_ulp / 2
    assert {parameter.dtype for parameter in adapters.parameters(model, INITIAL)} == {torch.float32}


TARGETS = ("first", "conv", "last")


def test_collecting_returns_the_base_models_gradients_and_restores_the_model():
    case = CASES["unet"]
    base, model = case.make().train(), case.make().train()

    def backward(network):
        (case.output(network) - 1).square().mean().backward()

    def flags():
        return [parameter.requires_grad for parameter in model.parameters()]

    backward(base)
    spec = AdapterSpec(rank=2, use_dora=True, init="lora-ga", target_modules=case.targets)
    adapters.inject(model, spec)
    inits.prepare(model, spec)
    flags_before = flags()
    for parameter in adapters.parameters(model, PRIMARY):
        parameter.data.add_(0.1)  # must have no effect while gradients are collected
    with collecting(model) as gradients:
        backward(model)
        backward(model)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert gradients.keys() == {path for path, _ in adapters.layers(model)}
    for path, gradient in gradients.items():
        expected = cast(Tensor, base.get_submodule(path).weight.grad)
        torch.testing.assert_close(gradient, 2 * expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="boom"), collecting(model):
        raise RuntimeError("boom")
    assert flags() == flags_before
    assert adapters.active(model) == (PRIMARY,)
    backward(model)  # no hook is left, so the adapters have gradients
    assert adapters.parameters(model, PRIMARY)[0].grad is not None


class Toy:
    """A task whose samples are random vectors, seeded by their slots."""

    num_samples = 5

    def __init__(self, scale=1.0, dtype=torch.float32):
        self.model = tiny_mlp().to(dtype)
        self.first_positions: list[int] = []
        self.requested_slots: list[int] = []
        self.scale = scale
        self.dtype = dtype

    @property
    def module(self):
        return lambda inputs: self.model(inputs["x"]).float().square().mean(1) * self.scale

    def micro_batches(self, schedule, step_size):
        for step, slots in schedule:
            self.first_positions.append(step * step_size)
            self.requested_slots += slots
            names = tuple(map(str, slots))
            yield MicroBatch(slots, names, names, {"x": self.rows(slots)})

    def rows(self, slots):
        return torch.stack([random(6, seed=slot) for slot in slots]).to(self.dtype)

    def targets(self):
        return [Target("toy", self.model, AdapterSpec(2, 3, 0, "lora-ga", False, TARGETS), 1e-2)]


def gradient_of(task, micro_batch=2):
    create("lora").setup(task.targets())
    cfg: Any = SimpleNamespace(lora_ga_samples=7, train_batch_size=micro_batch, seed=0)
    device, models = torch.device("cpu"), {"toy": task.model}
    return mean_gradients(cast(Any, task), models, cfg, device)["toy"]


def test_the_tasks_mean_gradient_depends_only_on_the_samples():
    plain = Toy()
    plain.module({"x": plain.rows(range(7))}).mean().backward()
    for micro_batch in (1, 3):
        task = Toy()
        for path, gradient in gradient_of(task, micro_batch).items():
            expected = plain.model.get_submodule(path).weight.grad
            torch.testing.assert_close(gradient, expected)
        assert task.requested_slots == list(range(7))
        first_position = task.first_positions[0]
        assert first_position % Toy.num_samples == 0  # a whole number of epochs
        assert first_position > 10**9  # further than any run gets


def test_fp16_gradients_are_scaled_and_unscaled(monkeypatch):
    exact = gradient_of(Toy())
    for scale in (1.0, 1e4):  # the second one overflows at the first scale that is tried
        gradients = gradient_of(Toy(scale=scale, dtype=torch.float16))
        for path, gradient in gradients.items():
            torch.testing.assert_close(gradient / scale, exact[path], rtol=0.05, atol=2e-3)
    # The message names the samples of the batch.
    with pytest.raises(TrainingError, match="not finite for 0, 1"):
        gradient_of(Toy(scale=float("nan")))
    monkeypatch.setattr(gradients_module, "FP16_SCALES", (2.0**20,))
    with pytest.raises(TrainingError, match=r"toy\..* is not finite.*bf16"):
        gradient_of(Toy(scale=1e4, dtype=torch.float16))


def test_lora_ga_through_the_api_needs_a_gradient_and_leaves_other_layers_alone():
    model: Any = tiny_mlp()
    plain_model = tiny_mlp()
    torch.manual_seed(1)
    bilora = attach(model, BiLoRAConfig(rank=2, init="lora-ga", target_modules=TARGETS))
    torch.manual_seed(1)
    attach(plain_model, BiLoRAConfig(rank=2, target_modules=TARGETS))

    def no_backward():
        pass

    def backward_of_nan():
        (model.first(torch.ones(4, 6)) * torch.nan).sum().backward()

    with pytest.raises(UserError, match="call initialise"):
        bilora.param_groups(lr=1e-3)
    with pytest.raises(UserError, match="no layer got one"):
        bilora.initialise(no_backward)
    with pytest.raises(TrainingError, match="gradient of first is not finite"):
        bilora.initialise(backward_of_nan)
    pissa_bilora = attach(tiny_mlp(), BiLoRAConfig(rank=2, init="pissa"))
    with pytest.raises(UserError, match="needs no gradient"):
        pissa_bilora.initialise(no_backward)

    bilora.initialise(lambda: model.first(torch.randn(4, 6)).square().sum().backward())
    pairs = zip(
        adapters.factors(model, PRIMARY), adapters.factors(plain_model, PRIMARY), strict=True
    )
    for factors, plain_factors in pairs:
        assert torch.equal(factors.A, plain_factors.A) == (factors.name != "first")
        assert bool(factors.B.any()) == (factors.name == "first")
    assert bilora.param_groups(lr=1e-3)
    with pytest.raises(UserError, match="already"):
        bilora.initialise(no_backward)


def tied_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cast(Any, model[1]).weight = model[0].weight
    return model


def quantized_model():
    model = nn.Sequential(nn.Linear(8, 8))
    quantize(model, torch.float32)
    return model


def adapted_model():
    return get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize(
    ("make", "values", "words"),
    [
        (
            tiny_mlp,
            {"rank": 3, "init": "lora-ga", "target_modules": TARGETS},
            r"last is 5 x 8.*at least 6 on each",
        ),
        (tied_model, {}, "weight of 0 is shared"),
        (quantized_model, {}, "weight of 0 is quantized"),
        (adapted_model, {}, 'init "pissa" would replace'),
    ],
)
def test_models_that_an_init_does_not_support_are_refused(make, values, words):
    options = {"rank": 2, "alpha": 8, "init": "pissa", "target_modules": ("0",)} | values
    with pytest.raises(UserError, match=words):
        attach(make(), BiLoRAConfig(**options))


def test_the_initial_adapter_can_not_be_activated():
    model = tiny_mlp()
    attach(model, BiLoRAConfig(rank=2, init="pissa", target_modules=TARGETS))
    with pytest.raises(UserError, match="counted twice"):
        adapters.activate(model, (PRIMARY, INITIAL))
    with pytest.raises(UserError, match="counted twice"), adapters.only(model, (INITIAL,)):
        pass
    assert adapters.active(model) == (PRIMARY, AUXILIARY)
