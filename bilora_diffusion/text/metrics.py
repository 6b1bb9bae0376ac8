"""Metrics of answers: F1 and the Matthews correlation with scikit-learn, others by comparison."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from ..core.errors import UserError

# A number such as -1,000.5 or 1e3.
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
SIGNS_AROUND_NUMBER = re.compile(r"[\s$€£%.,]")
# Numbers with more digits are not written out, since a huge exponent would fill the memory.
MAX_DIGITS = 1000
# Function that computes a score from answers, references, label words and the answer marker.
Metric = Callable[[list[str], list[str], Sequence[str], str | None], float]


def score(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str] = (),
    answer_marker: str | None = None,
) -> dict[str, float]:
    """Compute metrics of predicted answers; white space around answers is ignored.

    Args:
        metrics: names in `METRICS`.
        predictions: the model's answers; an answer that is not a label word counts as wrong.
        references: correct answers.
        labels: label words by class number; the second of two is F1's positive class.
        answer_marker: text that precedes the final answer, for "answer_match".

    Raises:
        UserError: F1 or the Matthews correlation is computed, and scikit-learn is missing.
    """
    answers = [text.strip() for text in predictions]
    right_answers = [text.strip() for text in references]
    scores = {}
    for name in metrics:
        scores[name] = float(METRICS[name](answers, right_answers, labels, answer_marker))
    return scores


def answer_after(text: str, marker: str | None) -> str | None:
    """Extract the final answer: the first line after the first marker.

    If the line has one number and no words, the number is written in plain digits, so "#### 1,000",
    "####1000.0" and "#### $1000." are the same answer. From any other line, only periods at the end
    are removed. Later lines are ignored, since a model may continue after its answer.

    Args:
        text: a generated or correct answer.
        marker: text that precedes the final answer; None or "" for the first line of the text.

    Returns:
        The final answer; None if the text does not have the marker.
    """
    if marker:
        _, separator, text = text.partition(marker.strip())
        # The model did not give an answer.
        if not separator:
            return None
    lines = text.strip().splitlines()
    line = lines[0].strip() if lines else ""
    numbers = NUMBER.findall(line)
    words = SIGNS_AROUND_NUMBER.sub("", NUMBER.sub("", line))
    if len(numbers) == 1 and not words:
        with suppress(ArithmeticError):  # an exponent that Decimal does not support
            value = Decimal(numbers[0].replace(",", "")).normalize()
            if abs(value.adjusted()) < MAX_DIGITS:
                return f"{value + 0:f}"  # "+ 0" makes a negative zero positive
    return line.rstrip(".")


def require_packages(metrics: Sequence[str]) -> None:
    """Raise UserError if a metric needs scikit-learn and it is not installed."""
    if any(METRICS[name] in (_f1, _matthews_correlation) for name in metrics):
        _sklearn()


def require_references(
    metrics: Sequence[str], references: Iterable[tuple[str, str]], answer_marker: str | None
) -> None:
    """Check before training that the metrics can score all correct answers.

    Args:
        metrics: names in `METRICS`.
        references: name and correct answer of each row.
        answer_marker: as in `score`.

    Raises:
        UserError: an answer lacks the marker; the message names its row.
    """
    if "answer_match" not in metrics:
        return
    for row, reference in references:
        if answer_after(reference, answer_marker) is None:
            raise UserError(
                f'{row} has the answer "{reference[-60:]}" without "{answer_marker}", which must'
                " precede the final answer: correct the row, or give --max_predictions 0 (with"
                " --choose_by loss) to generate no answers."
            )


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise UserError(
            "F1 and the Matthews correlation need scikit-learn, which is not installed: run"
            ' `pip install "bilora-diffusion[text]"`.'
        ) from error
    return sklearn.metrics


def _share_of_equal(answers: list[Any], references: list[Any], *_: Any) -> float:
    pairs = zip(answers, references, strict=True)
    return sum(answer == reference for answer, reference in pairs) / len(references)


def _matthews_correlation(answers: list[str], references: list[str], *_: Any) -> float:
    return _sklearn().matthews_corrcoef(references, answers)


def _f1(answers: list[str], references: list[str], labels: Sequence[str], *_: Any) -> float:
    """Compute F1 of the second of two classes, or the mean F1 over more classes."""
    averaged_labels = list(labels) or sorted(set(references))
    if len(averaged_labels) == 2:
        # GLUE scores MRPC in this way: the second class, "equivalent", is the positive one.
        averaged_labels = averaged_labels[-1:]
    return _sklearn().f1_score(
        references, answers, labels=averaged_labels, average="macro", zero_division=0
    )


def _answer_match(
    answers: list[str], references: list[str], labels: Sequence[str], marker: str | None
) -> float:
    """Compute the share of equal final answers; `require_references` has checked the markers."""
    right_answers = [answer_after(reference, marker) for reference in references]
    return _share_of_equal([answer_after(answer, marker) for answer in answers], right_answers)


METRICS: dict[str, Metric] = {
    "accuracy": _share_of_equal,
    "matthews_correlation": _matthews_correlation,
    "f1": _f1,
    "exact_match": _share_of_equal,
    "answer_match": _answer_match,
}
