"""Batches of samples that are about equally long."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from bilora_diffusion.train.order import LengthGroupedOrder, SampleOrder

LENGTHS = [(7 * i) % 101 for i in range(500)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 7), st.integers(1, 4))
def test_each_epoch_shows_each_sample_once(lengths: list[int], batch: int, group: int) -> None:
    order = LengthGroupedOrder(lengths, 3, batch, group)
    n = len(order)
    assert n == len(lengths)
    for epoch in range(2):
        seen = [order.sample(epoch * n + i) for i in range(n)]
        assert sorted(seen) == list(range(n))
        assert lengths[seen[0]] == max(lengths)


def test_it_depends_on_seed_and_position_alone() -> None:
    whole = LengthGroupedOrder(LENGTHS, 0, 4, 5)
    seen = [whole.sample(position) for position in range(1000)]
    jumping = LengthGroupedOrder(LENGTHS, 0, 4, 5)
    assert [jumping.sample(p) for p in (700, 3, 999, 0)] == [seen[p] for p in (700, 3, 999, 0)]
    other = LengthGroupedOrder(LENGTHS, 1, 4, 5)
    assert seen[:500] != seen[500:]
    assert seen[:500] != [other.sample(position) for position in range(500)]


def test_groups_are_sorted_and_batches_waste_less() -> None:
    order, plain = LengthGroupedOrder(LENGTHS, 0, 10, 10), SampleOrder(500, 0)
    seen = [order.sample(i) for i in range(500)]
    for start in range(100, 500, 100):
        lengths = [LENGTHS[i] for i in seen[start : start + 100]]
        assert sum(a < b for a, b in pairwise(lengths)) <= 1  # the swap

    def padded(samples: list[int]) -> int:
        batches = [samples[i : i + 10] for i in range(0, 500, 10)]
        return sum(10 * max(LENGTHS[i] for i in batch) for batch in batches)

    assert padded(seen) < 0.65 * padded([plain.sample(i) for i in range(500)])
