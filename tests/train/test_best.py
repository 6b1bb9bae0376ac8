"""The lowest held-out loss: its step, where the patience ends, which weights are kept; averages."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bilora_diffusion.train.outcome import Best, Outcome
from tests.scripts.runs import best_and_stop_step

LOSSES = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan, math.inf]), min_size=1)


@given(LOSSES, st.integers(1, 4))
def test_it_stops_and_keeps_as_a_reading_of_the_record_would(losses, patience):
    weight = nn.Parameter(torch.zeros(2))
    best = Best([weight], patience)
    rows = []
    last_step = stopped_at = None
    for last_step, loss in enumerate(losses):
        weight.data.fill_(last_step)
        if best.is_lowered_by(loss, last_step):
            best.store()
        # A record has null in place of a loss that is not finite.
        rows.append((last_step, loss if math.isfinite(loss) else None))
        if best.is_exhausted:
            stopped_at = last_step
            break
    assert (best.step, stopped_at) == best_and_stop_step(rows, patience)
    assert best.step != 0  # the base model's
    if best.step is not None:
        with best.applied():
            assert weight.tolist() == [best.step] * 2
    assert weight.tolist() == [last_step] * 2


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.99, 0.9999])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_the_average_is_the_weighted_mean_of_the_steps_with_the_decay_as_given(decay, steps):
    weight = nn.Parameter(torch.full((2,), 100.0))  # the value before training has no part in it
    cfg: Any = SimpleNamespace(
        use_ema=True, ema_decay=decay, keep_best=False, early_stopping_patience=None
    )
    method: Any = SimpleNamespace(result_parameters=lambda: [weight])
    outcome = Outcome(method, cfg)
    trajectory = torch.randn(steps, 2, generator=torch.manual_seed(steps))
    for values in trajectory:
        weight.data.copy_(values)
        outcome.update()
    # Step t of n has the weight decay^(n - t); for a decay of 0 only the last one has any, 0^0 = 1.
    shares = decay ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    expected = shares @ trajectory.double() / shares.sum()
    with outcome.averaged():
        torch.testing.assert_close(weight.detach(), expected.float(), atol=1e-5, rtol=1e-6)
    # The trained weights are back.
    assert torch.equal(weight, trajectory[-1])
