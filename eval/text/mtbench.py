"""MT-Bench, first turn: answers made here, each rated from 1 to 10 by a judge.

Source: Zheng et al. 2023, https://arxiv.org/abs/2306.05685, single-answer grading. The 80 questions
come from the hub or from a file; the words in which the judge is asked are this project's, so that
scores are compared within one table only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion.errors import UserError
from bilora_diffusion.seeds import digest_texts

from .generate import Decoding, Prompt, answers
from .journal import Journal
from .judge import Judge, rating
from .models import Loaded
from .schema import Item, Measured

HUB = "HuggingFaceH4/mt_bench_prompts"
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of the categories, as MT-Bench sets them; 0 for the others, which have one right answer."""
ASKED_AGAIN = 3
SHOWN = 200
_GRADING = (
    "Rate how well an assistant answered a user's question. Judge usefulness, relevance,"
    " correctness, depth, originality and level of detail; do not let length or style"
    " decide.{with_reference} First explain your judgement in a few sentences. Then give the"
    " rating on a scale from 1 (worst) to 10 (best), exactly in this form: [[rating]], for"
    " example [[5]].\n\n"
    "# Question\n{question}\n{reference}\n# The assistant's answer\n{answer}\n# End of the answer"
)


@dataclass(frozen=True)
class Question:
    """The first turn of a question.

    Args:
        id: of the set.
        category: such as "writing".
        text: what the user says.
        reference: a right answer, where the set has one.
    """

    id: str
    category: str
    text: str
    reference: str = ""

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, 0.0)


def questions(source: str | None, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file, or of the hub's set.

    Args:
        source: a file with a line per question: question_id, category, turns (or prompt), and
            reference where there is one; None for the hub.

    Raises:
        UserError: it can't be read, or a line is no question.
    """
    rows = _of_hub() if source is None else _of_file(Path(source))
    found = [_question(row, number, source or HUB) for number, row in enumerate(rows, start=1)]
    ids = [question.id for question in found]
    if repeated := [name for name in ids if ids.count(name) > 1]:
        raise UserError(f"{source or HUB} holds question {repeated[0]} twice: leave one out.")
    if not found:
        raise UserError(f"{source or HUB} holds no question: give another --mtbench_questions.")
    return found[:limit]


def digest(asked: Sequence[Question]) -> str:
    """Identifies the questions."""
    return digest_texts([part for q in asked for part in (q.id, q.category, q.text, q.reference)])


def _of_file(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--mtbench_questions {path} can't be read as text: give a JSONL file."
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"line {number} of {path} is no JSON: correct it.") from error
    return rows


def _of_hub() -> list[Any]:
    import datasets

    try:
        return list(datasets.load_dataset(HUB, split="train"))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the questions of MT-Bench can't be loaded from the hub ({HUB}): give them as a JSONL"
            " file by --mtbench_questions."
        ) from error


def _question(row: Any, number: int, source: str) -> Question:
    try:
        turns = row.get("turns") or row.get("prompt")
        reference = row.get("reference") or [""]
        first = turns if isinstance(turns, str) else turns[0]
        right = reference if isinstance(reference, str) else reference[0]
        name = row.get("question_id", row.get("prompt_id", number))
        if not first or not isinstance(first, str):
            raise ValueError
    except (AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
        raise UserError(
            f"question {number} of {source} has no first turn: give each line question_id,"
            " category and turns."
        ) from error
    return Question(str(name), str(row.get("category", "")), first, str(right or ""))


def grading_prompt(question: Question, answer: str) -> str:
    """What the judge is asked."""
    reference = f"\n# A right answer, for comparison\n{question.reference}\n"
    return _GRADING.format(
        question=question.text,
        answer=answer,
        reference=reference if question.reference else "",
        with_reference=" Compare it with the given right answer." if question.reference else "",
    )


def measure(
    loaded: Loaded,
    asked: Sequence[Question],
    judge: Judge,
    replies: Journal,
    ratings: Journal,
    *,
    decoding: Decoding,
    template: str,
    batch_size: int,
    advance: Callable[[int], object],
) -> Measured:
    """Answer and have rated what the journals lack; the score is the mean rating.

    Args:
        replies: question -> answer.
        ratings: question -> what the judge said, the last attempt's.
        decoding: its temperature is the category's.

    Raises:
        UserError: the judge can't be reached, or no rating at all could be read.
    """
    answer_all(loaded, asked, replies, decoding, template, batch_size)
    for question in asked:
        if question.id not in ratings.values:
            said = _judged(judge, grading_prompt(question, str(replies.values[question.id])))
            ratings.add(question.id, said)
        advance(1)
    return assess(asked, replies.values, ratings.values)


def answer_all(
    loaded: Loaded,
    asked: Sequence[Question],
    replies: Journal,
    decoding: Decoding,
    template: str,
    batch_size: int,
) -> None:
    """Fill the journal of answers, one temperature after the other."""
    for temperature in sorted({question.temperature for question in asked}):
        missing = [
            Prompt(question.id, question.text)
            for question in asked
            if question.temperature == temperature and question.id not in replies.values
        ]
        chosen = replace(decoding, temperature=temperature)
        for prompt, text in answers(loaded, missing, chosen, template, batch_size):
            replies.add(prompt.key, text.strip())


def _judged(judge: Judge, prompt: str) -> str:
    said = ""
    for _ in range(ASKED_AGAIN):
        said = judge.ask(prompt)
        if rating(said) is not None:
            break
    return said


def assess(
    asked: Iterable[Question], replies: Mapping[str, str], ratings: Mapping[str, str]
) -> Measured:
    """The mean of the ratings that could be read, and of each category's.

    Raises:
        UserError: none could be read.
    """
    items, by_category = [], {}
    for question in asked:
        score = rating(ratings[question.id])
        items.append(Item(question.id, score, score is not None, str(replies[question.id])[:SHOWN]))
        if score is not None:
            by_category.setdefault(question.category, []).append(score)
    scores = [score for found in by_category.values() for score in found]
    if not scores:
        raise UserError(
            "no rating could be read in what the judge said (it is asked for [[N]]): give another"
            " --judge_model."
        )
    others = {f"category {name}": _mean(found) for name, found in sorted(by_category.items())}
    return Measured(_mean(scores), items, others)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
