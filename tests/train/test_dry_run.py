"""A run without weights takes, on paper, what a real one takes: the same ledger counts both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from bilora_diffusion.adapters.weightless import empty, is_weightless, weightless
from bilora_diffusion.choices import OPTIMIZERS
from bilora_diffusion.image import dry_run as images
from bilora_diffusion.image.config import parse
from bilora_diffusion.image.script import assembled, settle
from bilora_diffusion.methods import names
from bilora_diffusion.train.dry_run import GRADIENTS, OPTIMIZER, trained
from bilora_diffusion.train.estimate import TRAINING, Estimate, verdict
from bilora_diffusion.train.memory import ACTIVATIONS, Ledger, Moment, Phase
from bilora_diffusion.train.running import build_accelerator
from bilora_diffusion.train.stepping import Schedule
from tests.scripts.runs import flags


def rehearsed(folder: Path, dry: bool, **values: Any) -> Ledger:
    """The ledger of a step on the miniature, with weights or without."""
    AcceleratorState._reset_state()
    cfg = parse(flags(folder, dry_run=dry or None, **values))
    accelerator, ledger = build_accelerator(cfg), Ledger()
    task = assembled(cfg, accelerator)
    rehearsal = images.Rehearsal(task, Schedule.of(cfg, accelerator), ledger)
    settle(task, accelerator)
    trained(rehearsal, accelerator, ledger)
    return ledger


def step_of(ledger: Ledger) -> Phase:
    return next(phase for phase in ledger.phases if phase.name == TRAINING)


@pytest.mark.parametrize(
    "method", [pytest.param(n, marks=[pytest.mark.slow] * (n != "bilora")) for n in names()]
)
def test_each_method_takes_what_it_takes_with_real_weights(method: str, tmp_path: Path) -> None:
    dry, real = (step_of(rehearsed(tmp_path, d, method=method)) for d in (True, False))
    assert dry.activations == real.activations
    assert dry.peaks["cpu"].total == pytest.approx(real.peaks["cpu"].total, rel=0.01)
    for part in (GRADIENTS, OPTIMIZER, "adapters: primary", "adapters: auxiliary"):
        assert dry.peaks["cpu"].parts.get(part) == real.peaks["cpu"].parts.get(part), part


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"train_batch_size": 2},
        {"use_dora": True},
        {"use_ema": True, "keep_best": True, "validation_dataset": "mini-heldout"},
        {"quantize": "nf4"},
        *({"optimizer": name} for name in OPTIMIZERS if name != "adamw"),
        {"train_text_encoder": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_options_take_what_they_take_with_real_weights(
    values: dict[str, Any], tmp_path: Path
) -> None:
    dry, real = (step_of(rehearsed(tmp_path, d, **values)) for d in (True, False))
    assert dry.activations == real.activations
    assert dry.peaks["cpu"].total == pytest.approx(real.peaks["cpu"].total, rel=0.02)


def test_activations_are_what_saved_tensors_hooks_count() -> None:
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)), torch.nn.GELU())

    model, saved = build(), {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    x = torch.randn(10, 64)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own | {x.untyped_storage()._cdata}:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(x)
    ledger, bare = Ledger(), weightless(build, torch.float32).requires_grad_(True)
    ledger.hold("weights", [*bare.parameters(), x])
    with ledger.phase("forward"):
        out = bare(x)
    assert is_weightless(out)
    assert out.shape == kept.shape
    assert ledger.phases[0].activations == sum(s.nbytes() for s in saved.values()) > 0
    assert ledger.live("cpu").parts[ACTIVATIONS] == ledger.phases[0].activations


def test_a_storage_counts_until_its_last_tensor_is_gone() -> None:
    ledger = Ledger()
    with ledger.phase("all"):
        first = torch.zeros(1000)
        view, second = first[:10], first + 1
        del first
        assert ledger.live("cpu").total == 8000
        del view
        assert ledger.live("cpu").total == 4000
        third = second * 2
    assert ledger.phases[0].peaks["cpu"].total == 8000
    del second, third
    assert ledger.live("cpu").total == 0


def test_a_value_that_nobody_knows_is_made_up() -> None:
    values, known = empty((4,), torch.float32), torch.tensor([True, False, True, True])
    with Ledger().phase("all"):
        assert float(values.sum()) == 1
        assert bool((values > 0).all())
        assert values[known].shape == (3,)
        assert values[values > 0].shape == (4,)


@pytest.mark.parametrize(("free", "said"), [(10**9, "It fits"), (10**6, "It does not fit")])
def test_the_verdict_is_about_what_is_free(free: int, said: str) -> None:
    phase = Phase(TRAINING, {"cpu": Moment({"weights": 10**8})}, 0)
    estimate = Estimate(torch.device("cpu"), (phase,), 5 * 10**8, free)
    assert verdict(estimate).startswith(said)
    assert "600 MB" in verdict(estimate)
