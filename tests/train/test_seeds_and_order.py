"""Seeds and digests depend only on their arguments, and each epoch has every sample."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilora_diffusion.core.seeds import digest, seed_of
from bilora_diffusion.train.task import KindsOrder, LengthGroupedOrder, SampleOrder

PARTS = st.one_of(st.integers(), st.text(max_size=8))
KEYS = st.lists(PARTS, max_size=4).map(tuple)
LENGTHS = [(7 * i) % 101 for i in range(500)]


@given(KEYS, KEYS)
def test_different_keys_have_different_seeds(a, b):
    # There are 2^63 seeds, so different keys do not collide by chance.
    assert (seed_of(*a) == seed_of(*b)) == (a == b)
    assert 0 <= seed_of(*a) < 2**63


def test_seeds_are_the_same_in_every_process_and_version():
    """A resumed run repeats the interrupted run's noise, so this value must never change."""
    assert seed_of(0, "noise", 12, "a") == 5504335286977931919


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_a_digest_depends_on_values_shape_and_dtype(dtype):
    values = torch.arange(6).to(dtype)
    base = digest(values)
    assert base == digest(values.clone())
    assert base == digest(torch.stack([values, values], dim=1)[:, 0])  # not contiguous
    for changed in (values + 1, values.reshape(2, 3), values[:5], values.to(torch.float16)):
        assert digest(changed) != base
    # The boundaries between tensors change the digest too.
    assert digest(values, values) != digest(torch.cat([values, values]))
    assert digest(torch.empty(0, 3)) != digest(torch.empty(3, 0))


def samples_of_epoch(order, epoch):
    start = epoch * len(order)
    return [order.sample(position) for position in range(start, start + len(order))]


@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 4), st.integers(0, 3))
def test_each_epoch_has_every_sample_equally_often(n, seed, repeats, epoch):
    samples = samples_of_epoch(SampleOrder(n, seed, repeats), epoch)
    assert sorted(samples) == sorted(list(range(n)) * repeats)


@given(st.integers(2, 30), st.integers(0, 5), st.lists(st.integers(0, 200), max_size=20))
def test_a_sample_depends_on_its_position_and_not_on_earlier_calls(n, seed, positions):
    order = SampleOrder(n, seed)
    grouped_order = LengthGroupedOrder(LENGTHS[:n], seed, 4, 5)
    for position in positions:
        assert order.sample(position) == SampleOrder(n, seed).sample(position)
        fresh_order = LengthGroupedOrder(LENGTHS[:n], seed, 4, 5)
        assert grouped_order.sample(position) == fresh_order.sample(position)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 7), st.integers(1, 4))
def test_each_epoch_grouped_by_length_has_every_sample_once_and_the_longest_first(
    lengths, batch, group
):
    order = LengthGroupedOrder(lengths, 3, batch, group)
    for epoch in range(2):
        samples = samples_of_epoch(order, epoch)
        assert sorted(samples) == list(range(len(lengths)))
        assert lengths[samples[0]] == max(lengths)  # so a lack of memory shows immediately


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_each_step_has_one_kind_and_every_sample_occurs_equally_often(
    kinds, step_size, repeats, seed
):
    order = KindsOrder(kinds, seed, step_size, repeats)
    passes = 4 * step_size
    total = passes * len(order)  # enough steps to make every kind's share a whole number
    samples = [order.sample(position) for position in range(total)]
    for step in range(total // step_size):
        step_samples = samples[step * step_size : (step + 1) * step_size]
        assert len({kinds[sample] for sample in step_samples}) == 1
    assert set(Counter(samples).values()) == {passes * repeats}
    fresh_order = KindsOrder(kinds, seed, step_size, repeats)
    assert fresh_order.sample(total - 1) == samples[-1]  # without the earlier calls
