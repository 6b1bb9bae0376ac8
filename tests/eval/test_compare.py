"""Means, paired differences, their intervals, win rates, and metrics at equal training loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.figures import student_interval
from eval import compare
from eval.compare import (
    Interval,
    at_training_loss,
    bootstrap_interval,
    summaries,
    win_rate_interval,
)
from eval.table import Entry, Row, Summary

VALUES = [0.3, -0.1, 0.8, 0.4, 0.2]


@pytest.mark.parametrize("values", [VALUES, [*VALUES, -0.7, 1.9, 0.05, 1.1, 0.66]])
def test_the_bootstrap_interval_is_scipys_without_ties(values):
    expected = stats.bootstrap(
        (np.array(values),),
        np.mean,
        n_resamples=9999,
        confidence_level=0.95,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    # scipy resamples at random where we take all resamples of up to five values.
    tolerance = 0.1 * (expected.high - expected.low)
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values)
    assert interval == pytest.approx((expected.low, expected.high), abs=tolerance)


@given(
    values=st.lists(st.integers(-20, 20), min_size=2, max_size=6),
    unit=st.floats(1e-6, 1e6),
    offset=st.integers(-1000, 1000),
    random=st.randoms(use_true_random=False),
)
def test_the_bootstrap_interval_depends_on_neither_order_nor_unit_nor_offset(
    values, unit, offset, random
):
    interval = bootstrap_interval(values)
    assert interval is not None
    low, high = interval
    moved = [unit * (value + offset) for value in random.sample(values, len(values))]
    expected = (unit * (low + offset), unit * (high + offset))
    assert bootstrap_interval(moved) == pytest.approx(expected, rel=1e-9, abs=1e-9 * unit)
    if len(values) <= 5:  # of more, the resamples are random
        assert bootstrap_interval([-value for value in values]) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("count", "expected"), [(3, 0.72), (5, 0.84)])
def test_the_coverage_of_few_values_is_as_documented(count, expected):
    samples = np.random.default_rng(0).normal(size=(800, count))
    covered = 0
    for values in samples:
        interval = bootstrap_interval(values)
        assert interval is not None
        covered += interval.low <= 0 <= interval.high
    # sqrt(0.8 * 0.2 / 800) = 0.014 is the standard error of the share.
    assert covered / len(samples) == pytest.approx(expected, abs=0.04)


def test_other_intervals_are_scipys():
    expected = stats.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert student_interval(VALUES) == pytest.approx((expected.low, expected.high))
    wilson = stats.binomtest(3, 4).proportion_ci(0.95, method="wilson")
    assert win_rate_interval(3, 0, 1) == (wilson.low, wilson.high)
    assert win_rate_interval(1, 1, 2) == bootstrap_interval([1.0, 0.5, 0.0, 0.0])


def test_there_is_no_interval_without_two_values_and_no_width_without_two_that_differ():
    assert bootstrap_interval([]) is bootstrap_interval([1.0]) is student_interval([1.0]) is None
    infinite = [1.0, float("inf")]
    assert win_rate_interval(0, 1, 0) is None
    assert bootstrap_interval(infinite) is student_interval(infinite) is None
    assert bootstrap_interval([0.0] * 5) == Interval(0.0, 0.0)
    assert bootstrap_interval([0.25] * 5) == Interval(0.25, 0.25)
    noise = bootstrap_interval([0.1 + 0.2, 0.3, 0.3])  # equal but for rounding
    assert noise.low == noise.high == pytest.approx(0.3)


def row(group, seed, value, **extra_fields):
    fields = {"subject": f"{group}{seed}", "metric": "loss", **extra_fields}
    return Row(group=group, seed=seed, value=value, **fields)  # pyright: ignore[reportArgumentType]


def compared(values, control_values):
    """A group of runs by seed against the control."""
    rows = [row("a", seed, value) for seed, value in values.items()]
    rows += [row("b", seed, value) for seed, value in control_values.items()]
    return summaries(rows, "b")[0]


def test_only_common_units_are_paired():
    line = compared({3: 9.0, 0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5, 2: 7.0})
    assert (line.count, line.mean, line.pairs) == (3, 4.0, 2)
    assert line.error == pytest.approx(np.std([1, 2, 9], ddof=1) / np.sqrt(3))
    assert (line.difference, line.difference_interval) == (-0.5, (-0.5, -0.5))
    assert (line.higher, line.equal, line.lower) == (0, 0, 2)
    assert line.interval == bootstrap_interval([1.0, 2.0, 9.0])
    unpaired = compared({0: 1.0}, {1: 1.0})  # no seed in common
    assert (unpaired.mean, unpaired.interval) == (1.0, None)
    assert (unpaired.control, unpaired.difference) == ("", None)
    single = compared({4: 1.0}, {4: 3.0})
    assert (single.difference, single.difference_interval, single.lower) == (-2.0, None, 1)


def test_what_is_not_defined_is_a_gap_in_a_curve_and_left_out_of_a_figure():
    for step, count, mean in ((5, 2, None), (None, 1, 3.0)):
        (line,) = summaries([row("a", 0, None, step=step), row("a", 1, 3.0, step=step)])
        assert (line.count, line.mean) == (count, mean)
    (without_seeds,) = summaries([row("a", None, 1.0), row("a", None, 2.0, subject="other")])
    assert (without_seeds.count, without_seeds.mean) == (2, 1.5)


def test_items_are_averaged_over_seeds_before_they_are_paired():
    # group -> values of each prompt by seed
    values = {"a": [[1.0, 3.0], [5.0, 5.0]], "b": [[0.0, 2.0], [5.0, 5.0]]}
    rows = []
    for group, prompts in values.items():
        for prompt, seeds in enumerate(prompts):
            for seed, value in enumerate(seeds):
                rows.append(row(group, seed, value, item=str(prompt), subject=group))
    first_line, _ = summaries(rows, "b", unit="item")
    assert (first_line.count, first_line.mean, first_line.difference) == (2, 3.5, 0.5)
    assert (first_line.higher, first_line.equal, first_line.lower) == (1, 1, 0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "worse"), (-0.3, -0.1, "better"), (-0.1, 0.1, "no difference shown")],
)
def test_a_verdict_needs_the_whole_interval(low, high, verdict):
    line = Summary("a", "b", difference=(low + high) / 2, difference_low=low, difference_high=high)
    assert compare.verdict(line, False) == verdict
    opposite = {"worse": "better", "better": "worse"}.get(verdict, verdict)
    assert compare.verdict(line, True) == opposite
    assert compare.verdict(line, None) is None
    assert compare.verdict(Summary("a", "b", difference=1.0), True) == "no difference shown"
    assert compare.verdict(Summary("a", "b"), True) is None


def test_the_control():
    def entry(group, method, kind="run"):
        return Entry(group, group, kind, method=method)

    entries = [entry("base", None, "base"), entry("mine", "bilora"), entry("plain", "lora")]
    assert compare.control(entries, None) == "plain"
    assert compare.control(entries, None, prefer=None) == "mine"
    assert compare.control(entries[:1], None) == "base"
    assert compare.control(entries, "mine") == "mine"
    with pytest.raises(UserError, match=r'--control is "plan" \(did you mean "plain"\?\)'):
        compare.control(entries, "plan")


@pytest.mark.parametrize(
    ("training", "level", "expected"),
    [([10, 6, 9, 5], 8, 1.5), ([10, 6, 9, 5], 4, None), ([10, 11, 9], 10.5, None)],
)
def test_at_a_training_loss_the_first_fall_counts(training, level, expected):
    metric = [1.0, 2.0, 3.0, 4.0][: len(training)]
    # Between two points the metric is interpolated, as the training loss is.
    assert at_training_loss(training, metric, level) == expected
