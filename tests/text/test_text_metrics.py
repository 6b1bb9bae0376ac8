"""Scores of answers, and the number that an answer ends in."""

from __future__ import annotations

import sys

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.text.metrics import answer_after, score


def test_accuracy_and_exact_match_ignore_white_space_around() -> None:
    figures = score(("accuracy", "exact_match"), [" yes\n", "no", "maybe"], ["yes", "no ", "no"])
    assert figures == pytest.approx({"accuracy": 2 / 3, "exact_match": 2 / 3})


def test_matthews_correlation_from_its_counts() -> None:
    right = ["acceptable"] * 6 + ["unacceptable"] * 4
    given = ["acceptable"] * 5 + ["unacceptable"] * 4 + ["acceptable"]
    tp, fn, tn, fp = 5, 1, 3, 1
    by_hand = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    figures = score(["matthews_correlation"], given, right, ("unacceptable", "acceptable"))
    assert figures["matthews_correlation"] == pytest.approx(by_hand)
    assert score(["matthews_correlation"], right[:1] * 10, right) == {"matthews_correlation": 0.0}


def test_f1_is_that_of_the_last_of_two_classes_or_the_mean_of_more() -> None:
    given, right = ["b", "b", "a", "what?"], ["b", "a", "b", "b"]
    assert score(["f1"], given, right, ("a", "b"))["f1"] == pytest.approx(2 * 1 / (2 + 1 + 2))
    figures = score(["f1"], ["a", "b", "b"], ["a", "b", "c"], ("a", "b", "c"))
    assert figures["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 1,000", "1000"),
        ("#### 1e999999999", "1e999999999"),  # written out it would fill the memory
        ("#### $1000.", "1000"),
        ("#### 1e3", "1000"),
        ("#### -0.0", "0"),
        ("#### 12 %", "12"),
        ("#### 3\nQuestion: more\n#### 4", "3"),
        ("#### 3 apples", "3 apples"),
        (r"#### \frac{1}{2}.", r"\frac{1}{2}"),
        ("1000", None),
    ],
)
def test_the_answer_after_a_marker(text: str, answer: str | None) -> None:
    assert answer_after(text, "####") == answer


def test_answer_match() -> None:
    given = ["I think\n#### 72.0", "72", "#### 71"]
    figures = score(["answer_match"], given, ["#### 72"] * 3, answer_marker="####")
    assert figures == {"answer_match": pytest.approx(1 / 3)}


def test_a_missing_package_or_marker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match='the reference "72" has no "####"'):
        score(["answer_match"], ["72"], ["72"], answer_marker="####")
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r'pip install "bilora-diffusion\[text\]"'):
        score(["f1"], ["a"], ["a"])
