"""Paired differences and their intervals, and metrics at equal training loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eval.statistics import (
    Interval,
    at_training_loss,
    bootstrap_interval,
    mean,
    mean_and_error,
    paired_difference,
    reached_training_loss,
)

finite = st.floats(-1e3, 1e3)


def test_the_interval_is_scipys() -> None:
    values = [0.3, -0.1, 0.8, 0.4, 0.2]
    expected = stats.bootstrap(
        (np.array(values),),
        np.mean,
        n_resamples=9999,
        confidence_level=0.95,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert bootstrap_interval(values) == Interval(float(expected.low), float(expected.high))
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_equal_values_give_no_width() -> None:
    assert bootstrap_interval([0.0] * 5) == Interval(0.0, 0.0)
    assert bootstrap_interval([0.25] * 5) == Interval(0.25, 0.25)
    noise = bootstrap_interval([0.1 + 0.2, 0.3, 0.3])  # equal but for rounding
    assert noise is not None
    assert noise.low == noise.high == pytest.approx(0.3)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_there_is_no_interval_without_two_values(values: list[float]) -> None:
    assert bootstrap_interval(values) is None


@given(st.lists(finite, min_size=2, max_size=6))
def test_an_interval_lies_within_the_values(values: list[float]) -> None:
    found = bootstrap_interval(values, resamples=99)
    assert found is not None
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack


def test_coverage_is_as_documented() -> None:
    random = np.random.default_rng(0)
    draws = random.normal(loc=2.0, size=(300, 10))
    intervals = [bootstrap_interval(list(row), resamples=299) for row in draws]
    covered = np.mean([found is not None and found.low <= 2 <= found.high for found in intervals])
    assert 0.85 <= covered <= 0.95  # 0.91 by a long run


def test_only_common_seeds_are_paired() -> None:
    arm, control = {0: 1.0, 1: 2.0, 3: 9.0}, {0: 1.5, 1: 2.5, 2: 7.0}
    found = paired_difference(arm, control)
    assert found is not None
    assert (found.mean, found.better, found.seeds) == (-0.5, 2, 2)
    assert found.interval == Interval(-0.5, -0.5)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_what_is_better_depends_on_the_metric_and_a_tie_is_not() -> None:
    arm, control = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 1.0, 2: 4.0}
    lower = paired_difference(arm, control)
    higher = paired_difference(arm, control, higher_is_better=True)
    assert lower is not None
    assert higher is not None
    assert (lower.better, higher.better) == (1, 1)
    assert lower.mean == higher.mean == 0.0


def test_one_seed_has_a_difference_without_an_interval() -> None:
    found = paired_difference({4: 1.0}, {4: 3.0})
    assert found is not None
    assert (found.mean, found.interval, found.better, found.seeds) == (-2.0, None, 1, 1)


def test_means() -> None:
    assert mean([]) is None
    assert mean_and_error([]) is None
    assert mean([1.0, 3.0]) == 2.0
    assert mean_and_error([1.0]) == (1.0, 0.0)
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))


def test_equal_training_loss_is_interpolated() -> None:
    training, measured = [10.0, 8.0, 6.0], [5.0, 4.0, 4.5]
    assert at_training_loss(training, measured, 7.0) == 4.25
    assert at_training_loss(training, measured, 10.0) == 5.0
    assert at_training_loss(training, measured, 6.0) == 4.5


def test_the_first_time_counts_where_training_loss_rises_again() -> None:
    training, measured = [10.0, 6.0, 9.0, 5.0], [1.0, 2.0, 3.0, 4.0]
    assert at_training_loss(training, measured, 8.0) == 1.5
    assert at_training_loss([10.0, 11.0, 9.0], [1.0, 2.0, 3.0], 10.5) is None  # began below
    assert at_training_loss(training, measured, 4.0) is None  # never reached
    assert at_training_loss([], [], 4.0) is None


def test_a_run_that_never_fell_reached_nothing() -> None:
    assert reached_training_loss([3.0, 2.0, 2.5]) == 2.0
    assert reached_training_loss([3.0, 4.0, 3.0]) is None
    assert reached_training_loss([3.0]) is None
    assert reached_training_loss([]) is None
