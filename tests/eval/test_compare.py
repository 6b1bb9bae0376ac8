"""Means, paired differences, their intervals, and metrics at equal training loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.statistics import Interval, mean_interval
from eval.results import compare
from eval.results.compare import at_training_loss, summaries
from eval.results.table import Entry, Row, Summary


@pytest.mark.parametrize(("count", "is_bootstrap"), [(2, False), (19, False), (20, True)])
def test_the_interval_of_a_mean_is_students_t_for_few_values_and_scipys_bca_for_many(
    count, is_bootstrap
):
    values = np.random.default_rng(1).exponential(size=count)
    interval = mean_interval(values)
    assert interval == mean_interval(list(values))
    if is_bootstrap:
        generator = np.random.default_rng(2)
        expected = stats.bootstrap(
            (values,), np.mean, n_resamples=9999, method="BCa", rng=generator
        ).confidence_interval
        tolerance = 0.05 * (expected.high - expected.low)  # for different random resamples
    else:
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        tolerance = 1e-9
    assert interval == pytest.approx((expected.low, expected.high), abs=tolerance)


@given(
    values=st.lists(st.integers(-20, 20), min_size=2, max_size=25),
    unit=st.floats(1e-6, 1e6),
    offset=st.integers(-1000, 1000),
    random=st.randoms(use_true_random=False),
)
@settings(max_examples=50)
def test_the_interval_does_not_depend_on_order_unit_or_offset(values, unit, offset, random):
    interval = mean_interval(values)
    assert interval is not None
    moved = [unit * (value + offset) for value in random.sample(values, len(values))]
    expected = [unit * (bound + offset) for bound in interval]
    assert mean_interval(moved) == pytest.approx(expected, rel=1e-7, abs=1e-7 * unit)


def test_the_interval_of_five_differences_covers_the_mean_in_95_percent_of_samples():
    samples = np.random.default_rng(0).normal(size=(4000, 5))
    covered = 0
    for values in samples:
        interval = mean_interval(values)
        assert interval is not None
        covered += interval.low <= 0 <= interval.high
    # The standard error of the coverage is sqrt(0.95 * 0.05 / 4000) = 0.0034.
    assert covered / len(samples) == pytest.approx(0.95, abs=0.015)


def test_an_interval_needs_two_values_and_has_no_width_if_all_are_equal():
    assert mean_interval([]) is mean_interval([1.0]) is None
    assert mean_interval([1.0, float("inf")]) is None
    for count in (5, 200):
        assert mean_interval([0.0] * count) == Interval(0.0, 0.0)
        assert mean_interval([0.25] * count) == Interval(0.25, 0.25)
    noise = mean_interval([0.1 + 0.2, 0.3, 0.3])  # equal except for rounding
    assert noise is not None
    assert noise.low == noise.high == pytest.approx(0.3)


def row(group, seed, value, **extra_fields):
    fields = {"subject": f"{group}{seed}", "metric": "loss", **extra_fields}
    return Row(group=group, seed=seed, value=value, **fields)  # pyright: ignore[reportArgumentType]


def compared(values, control_values):
    """Return the summary of a group against the control, from the values of each seed."""
    rows = [row("a", seed, value) for seed, value in values.items()]
    rows += [row("b", seed, value) for seed, value in control_values.items()]
    return summaries(rows, "b")[0]


def test_only_common_seeds_are_paired():
    line = compared({3: 9.0, 0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5, 2: 7.0})
    assert (line.count, line.mean, line.pairs) == (3, 4.0, 2)
    assert line.error == pytest.approx(np.std([1, 2, 9], ddof=1) / np.sqrt(3))
    assert (line.difference, line.difference_interval) == (-0.5, (-0.5, -0.5))
    assert (line.higher, line.equal, line.lower) == (0, 0, 2)
    assert line.interval == mean_interval([1.0, 2.0, 9.0])
    unpaired = compared({0: 1.0}, {1: 1.0})  # no seed in common
    assert (unpaired.mean, unpaired.interval) == (1.0, None)
    assert (unpaired.control, unpaired.difference) == ("", None)
    single = compared({4: 1.0}, {4: 3.0})
    assert (single.difference, single.difference_interval, single.lower) == (-2.0, None, 1)


def test_an_undefined_value_is_a_gap_in_a_curve_and_is_left_out_of_other_means():
    for step, count, mean in ((5, 2, None), (None, 1, 3.0)):
        (line,) = summaries([row("a", 0, None, step=step), row("a", 1, 3.0, step=step)])
        assert (line.count, line.mean) == (count, mean)
    (without_seeds,) = summaries([row("a", None, 1.0), row("a", None, 2.0, subject="other")])
    assert (without_seeds.count, without_seeds.mean) == (2, 1.5)


def test_items_are_averaged_over_seeds_before_they_are_paired():
    # group -> prompts -> values of each seed
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
def test_a_verdict_needs_an_interval_without_zero(low, high, verdict):
    line = Summary("a", "b", difference=(low + high) / 2, difference_low=low, difference_high=high)
    assert compare.verdict(line, False) == verdict
    opposite = {"worse": "better", "better": "worse"}.get(verdict, verdict)
    assert compare.verdict(line, True) == opposite
    assert compare.verdict(line, None) is None
    assert compare.verdict(Summary("a", "b", difference=1.0), True) == "no difference shown"
    assert compare.verdict(Summary("a", "b"), True) is None


def test_the_control_is_chosen_by_name_or_method():
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
def test_a_metric_is_read_where_the_training_loss_first_falls_to_a_level(training, level, expected):
    metric = [1.0, 2.0, 3.0, 4.0][: len(training)]
    # Between two points, the metric is interpolated linearly like the training loss.
    assert at_training_loss(training, metric, level) == expected
