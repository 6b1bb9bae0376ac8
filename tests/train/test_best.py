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
    taken = []
    for step, loss in enumerate(losses):
        with torch.no_grad():
            weight.fill_(step)
        if best.lowered_by(loss, step):
            best.keep()
        taken.append((step, None if not math.isfinite(loss) else loss))
        if best.exhausted:
            break
    assert (best.step, taken[-1][0] if best.exhausted else None) == reading(taken, patience)
    if best.step is not None:
        with best.applied():
            assert weight.tolist() == [best.step] * 2
    assert weight.tolist() == [taken[-1][0]] * 2


def test_an_average_is_there_within_its_context_only():
    weight = nn.Parameter(torch.zeros(2))
    kept = {"use_ema": True, "ema_decay": 0.5, "keep_best": False, "early_stopping_patience": None}
    method: Any = SimpleNamespace(clip_parameters=lambda: [weight])
    average = Outcome(method, cast(Any, SimpleNamespace(**kept)))
    for _ in range(20):  # the decay grows to its limit
        with torch.no_grad():
            weight.add_(1.0)
        average.update()
    with average.averaged():
        assert weight.tolist() == pytest.approx([19.0] * 2, abs=1e-2)
    assert weight.tolist() == [20.0] * 2
