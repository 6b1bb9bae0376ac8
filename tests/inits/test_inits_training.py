"""The inits in use: on models, under methods, from a task's loss, through the API, and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bilora_diffusion import BiLoRAConfig, adapters, attach, inits
from bilora_diffusion.adapters import AUXILIARY, INITIAL, PRIMARY, AdapterSpec
from bilora_diffusion.errors import TrainingError, UserError
from bilora_diffusion.methods import Target, create
from bilora_diffusion.train import gradients as gradients_module
from bilora_diffusion.train.gradients import collecting, initialise, mean_gradients
from bilora_diffusion.train.task import MicroBatch
from tests.contract.models import CASES, Case, tiny_mlp

TARGETS = ("first", "conv", "last")


def loss_of(case: Case, model: nn.Module) -> Callable[[], None]:
    return lambda: (case.output(model) - 1).square().mean().backward()


def test_collecting_gives_the_gradients_of_the_model_as_it_came() -> None:
    case = CASES["unet"]
    base, model = case.make().train(), case.make().train()
    loss_of(case, base)()
    spec = AdapterSpec(rank=2, use_dora=True, init="lora-ga", target_modules=case.targets)
    adapters.inject(model, spec)
    inits.prepare(model, spec)
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        for parameter in adapters.parameters(model, PRIMARY):
            parameter.add_(0.1)  # does not act meanwhile
    with collecting(model) as gradients:
        loss_of(case, model)()
        loss_of(case, model)()
        assert all(p.grad is None for p in model.parameters())
    assert gradients.keys() == {path for path, _ in adapters.layers(model)}
    for path, value in gradients.items():
        expected = cast(Tensor, base.get_submodule(path).weight.grad)
        torch.testing.assert_close(value, 2 * expected, rtol=1e-4, atol=1e-6)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert adapters.active(model) == (PRIMARY,)
    with pytest.raises(RuntimeError, match="boom"), collecting(model):
        raise RuntimeError("boom")
    assert flags == [p.requires_grad for p in model.parameters()]
    loss_of(case, model)()  # no hook is left: base weights have no gradient, adapters have
    assert adapters.parameters(model, PRIMARY)[0].grad is not None


class Toy:
    """A task whose samples are random vectors keyed by their slot."""

    num_samples = 5

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        self.model = tiny_mlp().to(dtype)
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self.scale, self.dtype = scale, dtype

    @property
    def module(self) -> Callable[[dict[str, Any]], Tensor]:
        return lambda inputs: self.model(inputs["x"]).float().square().mean(1) * self.scale

    def micro_batches(
        self, schedule: Sequence[tuple[int, tuple[int, ...]]], step_size: int
    ) -> Iterator[MicroBatch]:
        for step, slots in schedule:
            self.asked.append((step * step_size, slots))
            rows = torch.stack([self.sample(slot) for slot in slots])
            known = tuple(str(slot) for slot in slots)
            yield MicroBatch(slots, known, known, {"x": rows.to(self.dtype)})

    def sample(self, slot: int) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(slot))

    def targets(self) -> list[Target]:
        return [Target("toy", self.model, AdapterSpec(2, 3, 0, "lora-ga", False, TARGETS), 1e-2)]


def gradient_of(task: Toy, samples: int = 7, micro_batch: int = 2) -> dict[str, Tensor]:
    method = create("lora")
    method.setup(task.targets())
    return mean_gradients(
        cast(Any, task),
        {"toy": task.model},
        samples=samples,
        micro_batch=micro_batch,
        seed=0,
        device=torch.device("cpu"),
    )["toy"]


def test_the_tasks_mean_gradient_depends_on_the_samples_alone() -> None:
    tasks = [Toy(), Toy()]
    one, other = (gradient_of(t, micro_batch=m) for t, m in zip(tasks, (1, 3), strict=True))
    plain = Toy()
    rows = torch.stack([plain.sample(slot) for slot in range(7)])
    plain.module({"x": rows}).mean().backward()
    for path, value in one.items():
        torch.testing.assert_close(value, other[path])
        torch.testing.assert_close(value, plain.model.get_submodule(path).weight.grad)
    first, slots = tasks[1].asked[0]
    assert first % Toy.num_samples == 0  # a whole number of epochs
    assert first > 10**9  # which no run reaches
    assert [s for _, slots in tasks[1].asked for s in slots] == list(range(7))
    assert slots == (0, 1, 2)


def test_initialise_is_repeatable_and_leaves_no_trace_in_random_state() -> None:
    states: list[dict[str, Tensor]] = []
    cfg: Any = SimpleNamespace(lora_ga_samples=7, train_batch_size=2, seed=4)
    engine: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    for _ in range(2):
        task, method = Toy(), create("bilora")
        torch.manual_seed(5)
        method.setup(task.targets())
        before = torch.random.get_rng_state()
        assert initialise(cast(Any, task), method.targets, cfg, engine)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(method.tensors())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    full = create("full")
    full.setup(Toy().targets())
    assert not initialise(cast(Any, Toy()), full.targets, cfg, engine)


def test_fp16_gradients_are_scaled_and_scaled_back(monkeypatch) -> None:
    exact = gradient_of(Toy())
    for scale in (1.0, 1e4):  # the second overflows at first
        half = gradient_of(Toy(scale=scale, dtype=torch.float16))
        for path, value in half.items():
            torch.testing.assert_close(value / scale, exact[path], rtol=0.05, atol=2e-3)
    with pytest.raises(TrainingError, match="not finite"):
        gradient_of(Toy(scale=1e9, dtype=torch.float16))
    with pytest.raises(TrainingError, match="not finite for 0, 1"):  # the loss of these samples
        gradient_of(Toy(scale=float("nan")))
    monkeypatch.setattr(gradients_module, "FP16_SCALES", (2.0**20,))
    with pytest.raises(TrainingError, match=r"toy\..* is not finite.*bf16"):
        gradient_of(Toy(scale=1e4, dtype=torch.float16))


def test_a_layer_out_of_the_losss_reach_keeps_the_default_init() -> None:
    model, usual = tiny_mlp(), tiny_mlp()
    config = BiLoRAConfig(rank=2, init="lora-ga", target_modules=TARGETS)
    torch.manual_seed(1)
    bilora = attach(model, config)
    torch.manual_seed(1)
    attach(usual, BiLoRAConfig(rank=2, target_modules=TARGETS))
    bilora.initialise(lambda: cast(Any, model).first(torch.randn(4, 6)).square().sum().backward())
    for own, plain in zip(*(adapters.factors(m, PRIMARY) for m in (model, usual)), strict=True):
        assert torch.equal(own.A, plain.A) == (own.name != "first")
        assert bool(own.B.any()) == (own.name == "first")


def test_lora_ga_through_the_api_needs_a_gradient() -> None:
    model = tiny_mlp()
    bilora = attach(model, BiLoRAConfig(rank=2, init="lora-ga", target_modules=TARGETS))
    with pytest.raises(UserError, match="call initialise"):
        bilora.param_groups(lr=1e-3)
    with pytest.raises(UserError, match="no layer got one"):
        bilora.initialise(lambda: None)

    def broken() -> None:
        (model(torch.randn(4, 6)).sum() * float("nan")).backward()

    with pytest.raises(TrainingError, match="gradient of first is not finite"):
        bilora.initialise(broken)
    bilora.initialise(lambda: model(torch.randn(4, 6)).square().sum().backward())
    assert bilora.param_groups(lr=1e-3)
    with pytest.raises(UserError, match="already"):
        bilora.initialise(lambda: None)
    with pytest.raises(UserError, match="needs no gradient"):
        attach(tiny_mlp(), BiLoRAConfig(rank=2, init="pissa")).initialise(lambda: None)


@pytest.mark.parametrize(("init", "rank"), [("pissa", 6), ("lora-ga", 3)])
def test_layers_that_are_too_small_for_an_init_are_refused(init: str, rank: int) -> None:
    with pytest.raises(UserError, match=r"last is 5 x 8.*needs 6 on each"):
        attach(tiny_mlp(), BiLoRAConfig(rank=rank, init=init, target_modules=TARGETS))


def test_weights_that_an_init_can_not_change_are_refused() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cast(Any, tied[1]).weight = tied[0].weight
    with pytest.raises(UserError, match="weight of 0 is shared"):
        attach(tied, BiLoRAConfig(rank=2, init="pissa", target_modules=("0",)))
    packed = nn.Sequential(nn.Linear(4, 4))
    spec = AdapterSpec(rank=2, init="pissa", target_modules=("0",))
    adapters.inject(packed, spec)
    bits = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    cast(Any, packed[0]).base_layer.weight = bits
    with pytest.raises(UserError, match="weight of 0 is quantized"):
        inits.prepare(packed, spec)


def test_adapters_that_a_model_brings_are_not_replaced() -> None:
    model = get_peft_model(tiny_mlp(), LoraConfig(r=2, lora_alpha=4, target_modules=["first"]))
    spec: dict[str, Any] = {"rank": 2, "alpha": 4, "target_modules": ("first",)}
    with pytest.raises(UserError, match='init "pissa" would replace'):
        attach(model, BiLoRAConfig(init="pissa", **spec))
    model.add_adapter(INITIAL, LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(UserError, match=f'already has an adapter "{INITIAL}"'):
        attach(model, BiLoRAConfig(**spec))


def test_the_initial_adapter_never_acts_and_stays() -> None:
    model = tiny_mlp()
    attach(model, BiLoRAConfig(rank=2, init="pissa", target_modules=TARGETS))
    with pytest.raises(UserError, match="counted twice"):
        adapters.activate(model, (PRIMARY, INITIAL))
    with pytest.raises(UserError, match="counted twice"), adapters.only(model, (INITIAL,)):
        pass
    with pytest.raises(UserError, match="can't be exported"):
        adapters.delete(model, INITIAL)
    assert adapters.active(model) == (PRIMARY, AUXILIARY)
    adapters.delete(model, AUXILIARY)
    assert adapters.names(model) == (PRIMARY, INITIAL)
    assert adapters.active(model) == (PRIMARY,)
