"""What bf16 leaves of the auxiliary's effect: measured, logged, and at no cost to the training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, AdapterSpec
from bilora_diffusion.methods import MethodOptions, Target, create, rounding

KEY, KEPT = "auxiliary_cosine", "auxiliary_effect"


class Run:
    """Bi-LoRA on two layers in bf16, as training runs it: narrow weights, autocast, checkpoints."""

    def __init__(self, rho: float, dtype: torch.dtype = torch.bfloat16, **spec: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 40)).to(dtype)
        self.dtype, self.method = dtype, create("bilora", MethodOptions(rho=rho))
        target = Target("model", self.model, AdapterSpec(target_modules=("0", "2"), **spec), 1e-2)
        self.optimizer = torch.optim.AdamW(self.method.setup([target]))
        self.method.bind(self.optimizer)
        self.x = torch.randn(6, 10, 48, dtype=dtype)

    def output(self) -> Tensor:
        narrow = self.dtype != torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return checkpoint(self.model, self.x, use_reentrant=False)  # pyright: ignore

    def train(self, steps: int) -> list[dict[str, float]]:
        lines = []
        for _ in range(steps):
            with torch.no_grad(), self.method.evaluating():
                self.output()  # the auxiliary is off, so there is nothing to be seen
            torch.manual_seed(self.method.state_dict()["taken"])

            def forward_backward() -> Tensor:
                loss = (self.output().float() - 1).square().mean()
                loss.backward()
                return loss.detach()

            loss = self.method.step(forward_backward, self.optimizer)
            drawn = float(torch.rand(()))
            lines.append({"loss": float(loss), "drawn": drawn, **self.method.metrics()})
        return lines


def test_a_small_radius_is_lost_in_bf16_and_a_large_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = {rho: Run(rho).train(6) for rho in (1e-4, 3.0)}
    seen = {rho: [line.get(KEY) for line in own] for rho, own in lines.items()}
    for values in seen.values():  # the passes after 1, 2 and 4 steps, never the first
        assert [value is None for value in values] == [True, False, False, True, False, True]
    assert max(value for value in seen[1e-4] if value is not None) < 0.3
    assert min(value for value in seen[3.0] if value is not None) > 0.95
    assert [line[KEPT] for line in lines[3.0] if KEPT in line] == pytest.approx([1] * 3, abs=0.05)
    (record,) = caplog.records  # one line, of the small radius
    assert f"{100 * lines[1e-4][1][KEPT]:.0f} %" in record.getMessage()
    for word in ("bf16", f"{seen[1e-4][1]:.2f}", "rho 0.0001", "--rho", "--mixed_precision no"):
        assert word in record.getMessage()


def test_a_change_below_half_of_the_last_bit_is_gone_where_nothing_else_moves_the_output() -> None:
    """The base's outputs lie on bf16's grid, and the primary is still zero."""
    run = Run(1e-4)
    for group in run.optimizer.param_groups:
        group["lr"] *= group["maximize"]
    assert run.train(2)[1][KEPT] < 0.2


def test_in_fp32_nothing_is_lost_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(1e-3, torch.float32)
    assert not any(KEY in line for line in run.train(6))
    assert not caplog.records
    for _, layer in adapters.layers(run.model, AUXILIARY):
        x = torch.randn(9, adapters.base_weight(layer).shape[1])
        assert float(rounding.effect(layer, x).cosine()) > 0.999


@pytest.mark.parametrize("spec", [{"dropout": 0.3}, {"use_dora": True}], ids=str)
def test_looking_changes_no_bit(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Run(0.05, **spec)
    lines = looking.train(5)
    assert any(KEY in line for line in lines)
    monkeypatch.setattr(rounding.Probe, "arm", lambda *_: None)
    blind = Run(0.05, **spec)
    assert blind.train(5) == [
        {k: v for k, v in line.items() if k not in (KEY, KEPT)} for line in lines
    ]
    own, other = looking.method.tensors(), blind.method.tensors()
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_a_resumed_run_looks_where_the_whole_one_did() -> None:
    whole = Run(0.05)
    whole.train(4)
    resumed = Run(0.05)
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed.method.load_state_dict(whole.method.state_dict())
    lines = whole.train(1)
    assert KEY in lines[0]
    assert resumed.train(1) == lines


def test_the_effect_of_a_layer_against_its_definition() -> None:
    run = Run(2.0)
    run.train(2)
    (_, layer), *_ = adapters.layers(run.model, AUXILIARY)
    (own, *_) = adapters.factors(run.model, AUXILIARY)
    x = run.x[0]
    seen = rounding.effect(layer, x)
    torch.testing.assert_close(seen.wanted, own.scale * x.float() @ own.A.T @ own.B.T)
    with torch.no_grad():
        both = run.model[0](x).float()
        own.B.zero_()
        made = both - run.model[0](x).float()
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen.made, made)
    expected = nn.functional.cosine_similarity(seen.made.flatten(), seen.wanted.flatten(), dim=0)
    torch.testing.assert_close(seen.cosine(), expected)
    made, wanted = seen.made.flatten(), seen.wanted.flatten()
    torch.testing.assert_close(seen.products(), torch.stack([made @ wanted, wanted @ wanted]))
