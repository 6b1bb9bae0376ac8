"""What every registered method promises, on each kind of model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from bilora_diffusion import adapters
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.methods import Method, Target, create, names
from tests.contract.models import CASES, Case

pytestmark = [
    pytest.mark.parametrize("name", names()),
    pytest.mark.parametrize("kind", list(CASES)),
]


class Run:
    """A method on a model with its optimizer."""

    def __init__(self, name: str, case: Case, lr: float = 1e-2) -> None:
        self.case, self.model = case, case.make().train()
        self.base = copy.deepcopy(self.model)
        self.method: Method = create(name)
        spec = AdapterSpec(rank=4, alpha=6, target_modules=case.targets)
        torch.manual_seed(3)
        groups = self.method.setup([Target("model", self.model, spec, lr, 0.01)])
        self.optimizer = torch.optim.AdamW(groups)
        self.method.bind(self.optimizer)

    def train(self, steps: int) -> list[float]:
        return [float(self.method.step(self._loss, self.optimizer)) for _ in range(steps)]

    def _loss(self) -> Tensor:
        loss = (self.case.output(self.model) - 1).square().mean()
        loss.backward()
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{adapter}/{key}": value
            for adapter in self.method.adapters
            for key, value in adapters.state_dict(self.model, adapter).items()
        }


@pytest.fixture
def start(name: str, kind: str) -> Callable[[], Run]:
    return lambda: Run(name, CASES[kind])


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("base_layer.", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def test_three_steps_lower_the_loss_and_leave_the_base_alone(start: Callable[[], Run]) -> None:
    run = start()
    initial = run.tensors()
    losses = run.train(3)
    assert losses[-1] < losses[0]
    final = run.tensors()
    assert initial.keys() == final.keys()
    for adapter in run.method.adapters:
        changed = [k for k in final if k.startswith(f"{adapter}/") and "lora_B" in k]
        assert changed
        assert all(not torch.equal(initial[key], final[key]) for key in changed)
    kept = base_weights(run.model)
    original = dict(run.base.named_parameters())
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[key], original[key]) for key in kept)
    assert not any(parameter.requires_grad for parameter in kept.values())
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_only_the_primary_is_exported(start: Callable[[], Run], tmp_path: Path) -> None:
    run = start()
    run.train(2)
    adapters.save_pretrained(run.model, tmp_path)
    loaded = PeftModel.from_pretrained(run.base, str(tmp_path)).train()
    assert list(loaded.peft_config) == [PRIMARY]
    with torch.no_grad(), run.method.evaluating():
        assert torch.equal(run.case.output(loaded), run.case.output(run.model))


def test_evaluating_is_the_primary_alone_and_leaves_no_trace(start: Callable[[], Run]) -> None:
    run = start()
    run.train(2)
    before = {n: p.requires_grad for n, p in run.model.named_parameters()}
    order = adapters.active(run.model)
    assert order == run.method.adapters
    with torch.no_grad():
        training = run.case.output(run.model)
        with run.method.evaluating():
            assert adapters.active(run.model) == (PRIMARY,)
            primary = run.case.output(run.model)
        with pytest.raises(RuntimeError, match="boom"), run.method.evaluating():
            raise RuntimeError("boom")
        assert {n: p.requires_grad for n, p in run.model.named_parameters()} == before
        assert adapters.active(run.model) == order
        assert torch.equal(run.case.output(run.model), training)
        for adapter in run.method.adapters:
            if adapter != PRIMARY:
                for key, value in adapters.named_parameters(run.model, adapter).items():
                    if "lora_B" in key:
                        value.zero_()
        torch.testing.assert_close(run.case.output(run.model), primary, rtol=1e-4, atol=1e-5)
        for adapter in run.method.adapters[1:]:
            adapters.delete(run.model, adapter)
        merged = adapters.merge_primary(run.model)
        torch.testing.assert_close(run.case.output(merged), primary, rtol=1e-4, atol=1e-5)


def test_it_resumes_exactly(start: Callable[[], Run]) -> None:
    whole = start()
    losses = whole.train(4)
    first = start()
    assert first.train(2) == losses[:2]
    saved: dict[str, Any] = {
        "tensors": first.tensors(),
        "optimizer": copy.deepcopy(first.optimizer.state_dict()),
        "method": first.method.state_dict(),
    }
    second = start()
    for adapter in second.method.adapters:
        prefix = f"{adapter}/"
        state = {k.removeprefix(prefix): v for k, v in saved["tensors"].items() if prefix in k}
        adapters.load_state_dict(second.model, adapter, state)
    second.optimizer.load_state_dict(saved["optimizer"])
    second.method.load_state_dict(saved["method"])
    assert second.train(2) == losses[2:]
    final = whole.tensors()
    assert all(torch.equal(value, final[key]) for key, value in second.tensors().items())


def test_clipping_sees_trained_parameters_only(start: Callable[[], Run]) -> None:
    run = start()
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    clipped = {id(p) for p in run.method.clip_parameters()}
    assert clipped
    assert clipped <= trained
    assert trained == {id(p) for p in run.model.parameters() if p.requires_grad}


def test_metrics_are_numbers(start: Callable[[], Run]) -> None:
    run = start()
    run.train(1)
    assert all(isinstance(value, float) for value in run.method.metrics().values())
