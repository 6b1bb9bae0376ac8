"""The lowest held-out loss: its step, where the patience ends, which weights are kept; averages."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bilora_diffusion.train.outcome import Best, Outcome
from tests.scripts.runs import reading

LOSSES = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan, math.inf]), min_size=1)


@given(LOSSES, st.integers(1, 4))
def test_it_stops_and_keeps_as_a_reading_of_the_record_would(losses, patience):
    weight = nn.Parameter(torch.zeros(2))
    best = Best([weight], patience)
    rows = []
    for step, loss in enumerate(losses):
        with torch.no_grad():
            weight.fill_(step)
        if best.is_lowered_by(loss, step):
            best.store()
        rows.append((step, None if not math.isfinite(loss) else loss))
        if best.is_exhausted:
            break
    assert (best.step, rows[-1][0] if best.is_exhausted else None) == reading(rows, patience)
    if best.step is not None:
        with best.applied():
            assert weight.tolist() == [best.step] * 2
    assert weight.tolist() == [rows[-1][0]] * 2


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.99, 0.9999])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_the_average_is_the_weighted_mean_of_the_steps_with_the_decay_as_given(decay, steps):
    weight = nn.Parameter(torch.full((2,), 100.0))  # the value before training has no part in it
    options = {"use_ema": True, "ema_decay": decay}
    options |= {"keep_best": False, "early_stopping_patience": None}
    method: Any = SimpleNamespace(result_parameters=lambda: [weight])
    outcome = Outcome(method, cast(Any, SimpleNamespace(**options)))
    trajectory = torch.randn(steps, 2, generator=torch.manual_seed(steps)).tolist()
    for values in trajectory:
        with torch.no_grad():
            weight.copy_(torch.tensor(values))
        outcome.update()
    shares = [decay ** (steps - step) for step in range(1, steps + 1)]
    expected = [
        math.fsum(share * values[i] for share, values in zip(shares, trajectory, strict=True))
        / math.fsum(shares)
        for i in range(2)
    ]
    with outcome.averaged():
        assert weight.tolist() == pytest.approx(expected, abs=1e-5)
    assert weight.tolist() == pytest.approx(trajectory[-1])
