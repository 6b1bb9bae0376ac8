"""Means, paired differences and win rates of CLIP scores, against loops that spell them out."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval.scores import compare
from eval.scores.schema import METRICS, Comparison
from eval.statistics import Interval, bootstrap_interval
from tests.eval.score_results import Values, result

cosines = st.floats(-1, 1, width=32)


def drawn(prompts: int, seeds: int, seed: int, shift: float = 0.0) -> list[list[float]]:
    generator = random.Random(seed)
    return [[shift + generator.gauss(0.3, 0.05) for _ in range(seeds)] for _ in range(prompts)]


def only(found: list[Comparison], metric: str) -> Comparison:
    rows = [row for row in found if row.metric == metric]
    assert len(rows) == 1
    return rows[0]


@settings(max_examples=15)  # each takes two bootstraps
@given(
    st.integers(1, 5).flatmap(
        lambda seeds: st.lists(
            st.tuples(*[st.lists(cosines, min_size=seeds, max_size=seeds)] * 2),
            min_size=1,
            max_size=8,
        )
    )
)
def test_a_comparison_is_what_a_loop_says(rows: list[tuple[list[float], list[float]]]) -> None:
    ours, theirs = [row[0] for row in rows], [row[1] for row in rows]
    found = only(result({"LoRA": {"i2t": theirs}, "Bi-LoRA": {"i2t": ours}}).comparisons, "i2t")
    wins = ties = losses = 0
    total = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        a, b = math.fsum(mine) / len(mine), math.fsum(other) / len(other)
        total += a - b
        wins, ties, losses = wins + (a > b), ties + (a == b), losses + (a < b)
    assert (found.adapter, found.control) == (1, 0)
    assert (found.wins, found.ties, found.losses) == (wins, ties, losses)
    assert found.mean == pytest.approx(total / len(rows), abs=1e-12)
    assert found.win_rate == pytest.approx((wins + 0.5 * ties) / len(rows))


def test_the_mean_is_of_prompts_and_the_interval_over_prompts() -> None:
    values = drawn(12, 3, seed=0)
    made = result({"LoRA": {"i2t": values}})
    means = [sum(seeds) / 3 for seeds in values]
    (found,) = made.summaries
    assert found.mean == pytest.approx(sum(means) / 12)
    assert found.prompts == 12
    assert found.interval is not None
    expected = bootstrap_interval([math.fsum(seeds) / 3 for seeds in values])
    assert found.interval == expected
    # more seeds of one prompt are no more prompts: the same images twice change nothing
    twice = result({"LoRA": {"i2t": [seeds * 2 for seeds in values]}}).summaries[0]
    assert twice.mean == pytest.approx(found.mean, abs=1e-15)
    assert twice.interval is not None
    assert twice.interval.low == pytest.approx(found.interval.low, abs=1e-12)


def test_an_adapter_against_itself_is_exactly_even() -> None:
    values = drawn(20, 2, seed=1)
    made = result({"LoRA": {"i2t": values, "t2t": values}, "again": {"i2t": values, "t2t": values}})
    assert {row.metric for row in made.comparisons} == {"i2t", "t2t"}
    for found in made.comparisons:
        assert found.mean == 0
        assert found.interval == Interval(0, 0)
        assert found.win_rate == 0.5
        assert found.win_rate_interval == Interval(0.5, 0.5)
        assert (found.wins, found.ties, found.losses) == (0, 20, 0)
        assert compare.verdict(found) == compare.UNDECIDED


def test_a_broken_adapter_loses_beyond_doubt() -> None:
    good, broken = drawn(30, 2, seed=2), drawn(30, 2, seed=3, shift=-0.2)
    found = only(result({"LoRA": {"i2t": good}, "broken": {"i2t": broken}}).comparisons, "i2t")
    assert found.interval is not None
    assert found.interval.high < 0
    assert found.win_rate_interval is not None
    assert found.win_rate_interval.high < 0.5
    assert compare.verdict(found) == compare.WORSE
    mirrored = only(
        result({"LoRA": {"i2t": good}, "broken": {"i2t": broken}}, control=1).comparisons, "i2t"
    )
    assert compare.verdict(mirrored) == compare.BETTER
    assert mirrored.mean == pytest.approx(-found.mean)
    assert mirrored.wins == found.losses


def test_a_lower_likeness_to_training_pictures_is_better() -> None:
    high, low = drawn(30, 1, seed=4, shift=0.3), drawn(30, 1, seed=5)
    found = only(
        result({"LoRA": {"nearest": high}, "new": {"nearest": low}}).comparisons, "nearest"
    )
    assert found.mean < 0
    assert found.losses == 30
    assert compare.verdict(found) == compare.BETTER


@pytest.mark.parametrize("wins", [0, 1, 13, 20])
def test_without_ties_the_win_rate_has_wilsons_interval(wins: int) -> None:
    n, z = 20, stats.norm.ppf(0.975)
    rate = wins / n
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    found = compare.win_rate_interval(wins, 0, n - wins)
    assert found is not None
    assert found.low == pytest.approx(max(0.0, center - half), abs=1e-12)
    assert found.high == pytest.approx(min(1.0, center + half), abs=1e-12)
    assert found.low < found.high


def test_with_ties_the_win_rate_has_a_bootstrap_interval() -> None:
    values = [1.0] * 6 + [0.5] * 3 + [0.0] * 2
    assert compare.win_rate_interval(6, 3, 2) == bootstrap_interval(values)
    assert compare.win_rate_interval(0, 1, 0) is None


def test_only_what_both_have_is_compared() -> None:
    ours: Values = [[0.4, None], [None, None], [0.2, 0.4]]
    theirs: Values = [[0.1, 0.3], [0.2, 0.2], [None, 0.1]]
    made = result({"LoRA": {"i2t": theirs}, "new": {"i2t": ours, "t2t": ours}})
    found = only(made.comparisons, "i2t")
    assert found.wins + found.ties + found.losses == 2
    assert found.mean == pytest.approx(((0.4 - 0.2) + (0.3 - 0.1)) / 2)
    assert [row.metric for row in made.comparisons] == ["i2t"]
    assert [row.prompts for row in made.summaries if row.metric == "t2t"] == [2]


def test_the_base_model_is_compared_but_never_the_control_with_itself() -> None:
    values = drawn(4, 1, seed=6)
    made = result({"base": {"i2t": values}, "LoRA": {"i2t": values}}, control=1)
    assert [(row.adapter, row.control) for row in made.comparisons] == [(0, 1)]
    assert result({"LoRA": {"i2t": values}}, control=0).comparisons == []
    assert result({"base": {"i2t": values}}, control=None).comparisons == []


def test_diversity_is_read_by_label_and_text() -> None:
    values = drawn(3, 2, seed=7)
    texts = [f"a ToK icon of a thing {p}, in the style of ToK" for p in range(3)]
    made = result(
        {"LoRA": {"i2t": values}, "new": {"i2t": values}},
        diversity={
            "LoRA": dict(zip(texts, (0.1, 0.2, 0.3), strict=True)),
            "new": dict(zip(texts, (0.2, 0.3, 0.4), strict=True)),
        },
    )
    found = only(made.comparisons, "diversity")
    assert found.mean == pytest.approx(0.1)
    assert compare.verdict(found) is None
    means = compare.summary(made, "diversity")
    assert means[0].mean == pytest.approx(0.2)


def test_the_order_of_prompts_and_adapters_changes_nothing() -> None:
    ours, theirs = drawn(15, 2, seed=8), drawn(15, 2, seed=9)
    one = only(result({"A": {"i2t": theirs}, "B": {"i2t": ours}}).comparisons, "i2t")
    reversed_prompts = {"B": {"i2t": ours[::-1]}, "A": {"i2t": theirs[::-1]}}
    other = only(result(reversed_prompts, control=1).comparisons, "i2t")
    assert other.mean == one.mean
    assert (other.wins, other.losses) == (one.wins, one.losses)


def test_every_score_has_a_title_and_a_sentence() -> None:
    for metric in METRICS.values():
        assert metric.title
        assert metric.explanation
