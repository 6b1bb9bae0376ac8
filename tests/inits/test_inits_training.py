"""The inits in use: on models, under methods, from a task's loss, through the API, and refused."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bilora_diffusion import BiLoRAConfig, adapters, attach, inits
from bilora_diffusion.adapters import AUXILIARY, INITIAL, PRIMARY, AdapterSpec
from bilora_diffusion.adapters.quantize import quantize
from bilora_diffusion.errors import TrainingError, UserError
from bilora_diffusion.methods import Target, create
from bilora_diffusion.train import gradients as gradients_module
from bilora_diffusion.train.gradients import collecting, mean_gradients
from bilora_diffusion.train.task import MicroBatch
from tests.contract.models import CASES, tiny_mlp

TARGETS = ("first", "conv", "last")


def test_collecting_gives_the_gradients_of_the_model_as_it_came():
    case = CASES["unet"]
    base, model = case.make().train(), case.make().train()

    def backward(of):
        (case.output(of) - 1).square().mean().backward()

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
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self.scale, self.dtype = scale, dtype

    @property
    def module(self):
        return lambda inputs: self.model(inputs["x"]).float().square().mean(1) * self.scale

    def micro_batches(self, schedule, step_size):
        for step, slots in schedule:
            self.asked.append((step * step_size, slots))
            known = tuple(str(slot) for slot in slots)
            yield MicroBatch(slots, known, known, {"x": self.rows(slots)})

    def rows(self, slots):
        made = [torch.randn(6, generator=torch.Generator().manual_seed(slot)) for slot in slots]
        return torch.stack(made).to(self.dtype)

    def targets(self):
        return [Target("toy", self.model, AdapterSpec(2, 3, 0, "lora-ga", False, TARGETS), 1e-2)]


def gradient_of(task, micro_batch=2):
    create("lora").setup(task.targets())
    cfg: Any = SimpleNamespace(lora_ga_samples=7, train_batch_size=micro_batch, seed=0)
    device, models = torch.device("cpu"), {"toy": task.model}
    return mean_gradients(cast(Any, task), models, cfg, device)["toy"]


def test_the_tasks_mean_gradient_depends_on_the_samples_alone():
    tasks, plain = [Toy(), Toy()], Toy()
    one, other = (gradient_of(t, micro_batch=m) for t, m in zip(tasks, (1, 3), strict=True))
    plain.module({"x": plain.rows(range(7))}).mean().backward()
    for path, value in one.items():
        torch.testing.assert_close(value, other[path])
        torch.testing.assert_close(value, plain.model.get_submodule(path).weight.grad)
    first, _ = tasks[1].asked[0]
    assert first % Toy.num_samples == 0  # a whole number of epochs
    assert first > 10**9  # which no run reaches
    assert [s for _, slots in tasks[1].asked for s in slots] == list(range(7))


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
    for refuse, kind, word in (
        (lambda: bilora.param_groups(lr=1e-3), UserError, "call initialise"),
        (lambda: bilora.initialise(lambda: None), UserError, "no layer got one"),
        (
            lambda: bilora.initialise(
                lambda: (first(torch.ones(4, 6)) * torch.nan).sum().backward()
            ),
            TrainingError,
            "gradient of first is not finite",
        ),
        (
            lambda: attach(tiny_mlp(), BiLoRAConfig(rank=2, init="pissa")).initialise(lambda: None),
            UserError,
            "needs no gradient",
        ),
    ):
        with pytest.raises(kind, match=word):
            refuse()
    bilora.initialise(lambda: first(torch.randn(4, 6)).square().sum().backward())
    for own, plain in zip(*(adapters.factors(m, PRIMARY) for m in (model, usual)), strict=True):
        assert torch.equal(own.A, plain.A) == (own.name != "first")
        assert bool(own.B.any()) == (own.name == "first")
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
