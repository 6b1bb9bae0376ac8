"""How good answers are: classes by scikit-learn, free text by comparison."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from ..errors import UserError, did_you_mean

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")

MOST_DIGITS = 1000


def score(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str] = (),
    answer_marker: str | None = None,
) -> dict[str, float]:
    """Metrics of predicted against wanted answers; white space around either does not count.

    Args:
        metrics: some of ``METRICS``.
        predictions: what the model answered; an answer that is no label word is a wrong class.
        references: what it should have answered.
        labels: the label words, by class number; of two, the last is F1's positive one.
        answer_marker: what stands before the answer proper, for "answer_match".

    Returns:
        One number for each metric: -1 to 1 for Matthews correlation, else 0 to 1.

    Raises:
        UserError: an unknown metric, scikit-learn is missing, or a reference without its marker.
        ValueError: nothing to compare, or not as many predictions as references.
    """
    if not references or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions can't be scored by {len(references)}")
    found = {}
    for name in metrics:
        if name not in METRICS:
            raise UserError(
                f'there is no metric "{name}"{did_you_mean(name, METRICS)}: give some of'
                f" {', '.join(METRICS)}."
            )
        given, wanted = ([text.strip() for text in texts] for texts in (predictions, references))
        found[name] = float(METRICS[name](given, wanted, labels, answer_marker))
    return found


def answer_after(text: str, marker: str | None) -> str | None:
    """The answer proper: the line after the first ``marker``, a number in it without its dress.

    So "#### 1,000", "####1000.0" and "#### $1000." are the same answer. Where several numbers or
    words stand there, the whole line counts. Text after that line is what a model that does not
    stop goes on with.

    Returns:
        None if the marker is not in the text; without a marker, the whole text is looked at.
    """
    if marker:
        _, found, text = text.partition(marker.strip())
        if not found:
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


def _accuracy(p: list[str], r: list[str], labels: Sequence[str], marker: str | None) -> float:
    return _sklearn().accuracy_score(r, p)


def _matthews(p: list[str], r: list[str], labels: Sequence[str], marker: str | None) -> float:
    return _sklearn().matthews_corrcoef(r, p)


def _f1(p: list[str], r: list[str], labels: Sequence[str], marker: str | None) -> float:
    """F1 of the last of two classes, else the mean over the classes."""
    words = list(labels) or sorted(set(r))
    averaged = words[-1:] if len(words) == 2 else words
    return _sklearn().f1_score(r, p, labels=averaged, average="macro", zero_division=0)


def _exact_match(p: list[str], r: list[str], labels: Sequence[str], marker: str | None) -> float:
    return sum(a == b for a, b in zip(p, r, strict=True)) / len(r)


def _answer_match(p: list[str], r: list[str], labels: Sequence[str], marker: str | None) -> float:
    wanted = [answer_after(text, marker) for text in r]
    if None in wanted:
        text = r[wanted.index(None)]
        raise UserError(
            f'the reference "{text[-60:]}" has no "{marker}", after which its answer should stand:'
            " correct it, or use another metric."
        )
    given = [answer_after(text, marker) for text in p]
    return sum(a == b for a, b in zip(given, wanted, strict=True)) / len(r)


METRICS: dict[str, Callable[[list[str], list[str], Sequence[str], str | None], float]] = {
    "accuracy": _accuracy,
    "matthews_correlation": _matthews,
    "f1": _f1,
    "exact_match": _exact_match,
    "answer_match": _answer_match,
}
