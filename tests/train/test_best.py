"""The lowest held-out loss: its step, where the patience ends, which weights are kept."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bilora_diffusion.train.outcome import Best
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
