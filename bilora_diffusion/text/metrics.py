"""Scores of answers: classes by scikit-learn, free text by comparison."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from ..core.errors import UserError

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
MOST_DIGITS = 1000


def score(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str] = (),
    answer_marker: str | None = None,
) -> dict[str, float]:
    """Metrics of predicted answers; white space around them does not count.

    Args:
        metrics: some of ``METRICS``.
        predictions: what the model answered; an answer that is no label word is a wrong class.
        references: what it should have answered.
        labels: the label words, by class number; of two, the last is F1's positive one.
        answer_marker: what stands before the answer proper, for "answer_match".

    Raises:
        UserError: scikit-learn is missing, or a reference has no marker.
    """
    answers, right = ([text.strip() for text in texts] for texts in (predictions, references))
    return {name: float(METRICS[name](answers, right, labels, answer_marker)) for name in metrics}


def answer_after(text: str, marker: str | None) -> str | None:
    """The answer proper: the line after the first ``marker`` (None without one), a number in it
    without its dress.

    So "#### 1,000", "####1000.0" and "#### $1000." are the same answer. Where several numbers or
    words stand there, the whole line counts. Text after that line is what a model that does not
    stop goes on with.
    """
    if marker:
        _, mark, text = text.partition(marker.strip())
        if not mark:
            return None
    lines = text.strip().splitlines()
    line = lines[0].strip() if lines else ""
    numbers = NUMBER.findall(line)
    words = re.sub(r"[\s$€£%.,]", "", NUMBER.sub("", line))
    if len(numbers) == 1 and not words:
        with suppress(ArithmeticError):  # an exponent beyond all range: the line as it stands
            value = Decimal(numbers[0].replace(",", "")).normalize()
            if abs(value.adjusted()) < MOST_DIGITS:
                return f"{value + 0:f}"  # no exponent, and no negative zero
    return line.rstrip(".")


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise UserError(
            "metrics of classes need scikit-learn, which is not installed: run"
            ' `pip install "bilora-diffusion[text]"`.'
        ) from error
    return sklearn.metrics


def _equal(predictions: list[Any], right: list[Any], *_: Any) -> float:
    """Share of equal answers."""
    return sum(a == b for a, b in zip(predictions, right, strict=True)) / len(right)


def _f1(predictions: list[str], right: list[str], labels: Sequence[str], *_: Any) -> float:
    """F1 of the last of two classes, else the mean over the classes."""
    words = list(labels) or sorted(set(right))
    averaged = words[-1:] if len(words) == 2 else words
    return _sklearn().f1_score(
        right, predictions, labels=averaged, average="macro", zero_division=0
    )


def _answer_match(
    predictions: list[str], right: list[str], labels: Sequence[str], marker: str | None
) -> float:
    answers = [answer_after(text, marker) for text in right]
    if None in answers:
        text = right[answers.index(None)]
        raise UserError(
            f'the reference "{text[-60:]}" has no "{marker}", after which its answer should stand:'
            " correct it, or use another metric."
        )
    return _equal([answer_after(text, marker) for text in predictions], answers)


METRICS: dict[str, Callable[[list[str], list[str], Sequence[str], str | None], float]] = {
    "accuracy": _equal,
    "matthews_correlation": lambda predictions, right, *_: _sklearn().matthews_corrcoef(
        right, predictions
    ),
    "f1": _f1,
    "exact_match": _equal,
    "answer_match": _answer_match,
}
