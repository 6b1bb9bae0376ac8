"""The best held-out measurement: its step, the end of the patience, and the kept weights."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bilora_diffusion.train.outcome import Best
from tests.scripts.runs import best_and_stop_step

VALUES = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan, math.inf]), min_size=1)
# Metrics, and the factor that makes lower values better
MEASURES = st.sampled_from([("heldout_loss", 1), ("heldout_exact_match", -1)])


@given(VALUES, MEASURES, st.integers(1, 4))
def test_the_best_and_the_last_step_are_those_computed_from_the_record(values, measure, patience):
    weight = nn.Parameter(torch.zeros(2))
    name, sign = measure
    best = Best([weight], patience, name)
    rows = []
    last_step = stopped_at = None
    for last_step, value in enumerate(values):
        weight.data.fill_(last_step)
        if best.is_improved_by(value, last_step):
            best.store()
        # In a record, null replaces values that are not finite.
        rows.append((last_step, sign * value if math.isfinite(value) else None))
        if best.is_exhausted:
            stopped_at = last_step
            break
    assert (best.step, stopped_at) == best_and_stop_step(rows, patience)
    assert best.step != 0  # step 0 is the base model
    if best.step is not None:
        with best.applied():
            assert weight.tolist() == [best.step] * 2
    assert weight.tolist() == [last_step] * 2
