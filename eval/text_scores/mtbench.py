"""MT-Bench, first turn: answers made here, each rated from 1 to 10 by a judge.

Source: Zheng et al. 2023, https://arxiv.org/abs/2306.05685, single-answer grading. The 80 questions
come from the hub or from a file; the words in which the judge is asked are this project's, so that
scores are compared within one table only.
"""

from __future__ import annotations

import math
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bilora_diffusion.config.machine import require
from bilora_diffusion.core.errors import UserError, translated
from bilora_diffusion.core.files import read_rows
from bilora_diffusion.core.seeds import digest_texts

from .benchmarks import SHOWN, Item, Measured
from .models import CacheOf, Decoding, Loaded, answers

HUB = "HuggingFaceH4/mt_bench_prompts"
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Category -> temperature, as MT-Bench sets it; 0 for others, which have one right answer."""
ASKED_AGAIN = 3
MOST_TOKENS, SECONDS = 2048, 120.0
"""Of a judge's reply, and of the time in which it is to come."""
_GRADING = (
    "Rate how well an assistant answered a user's question. Judge usefulness, relevance,"
    " correctness, depth, originality and level of detail; do not let length or style"
    " decide.{with_reference} First explain your judgement in a few sentences. Then give the"
    " rating on a scale from 1 (worst) to 10 (best), exactly in this form: [[rating]], for"
    " example [[5]].\n\n"
    "# Question\n{question}\n{reference}\n# The assistant's answer\n{answer}\n# End of the answer"
)
KEY = "JUDGE_API_KEY"
"""The environment variable of the key. It is one of its own, so that no other service's is sent."""
_RATING = r"(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?"
_FORMS = (
    re.compile(rf"\[\[\s*(?:rating:?\s*)?{_RATING}\]\]", re.IGNORECASE),
    re.compile(rf"rating\W{{0,6}}{_RATING}", re.IGNORECASE),
    re.compile(rf"\[\s*{_RATING}\]"),
)
"""Forms of a rating, the asked one first."""


def rating(text: str) -> float | None:
    """The last rating in a judge's words, from 1 to 10; None if there is none."""
    for form in _FORMS:
        values = [float(number) for number in form.findall(text)]
        valid = [value for value in values if 1 <= value <= 10]
        if valid:
            return valid[-1]
    return None


@dataclass(frozen=True)
class Judge:
    """Source of ratings.

    Args:
        base_url: up to and with "/v1".
        model: the endpoint's name for it.
        key: sent as bearer token; "" sends none. Never shown.
        attempts: requests per rating before it is given up, ever longer apart, or as far as the
            endpoint asks for.
    """

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    attempts: int = 8

    def ask(self, prompt: str) -> str:
        """The judge's reply at temperature 0."""
        from openai import OpenAIError

        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=MOST_TOKENS,
                extra_headers=self._headers,
            )
            return (reply.choices[0].message.content or "") if len(reply.choices) else ""
        except (AttributeError, TypeError):  # the package hands on what is no such reply as it is
            reason = "its reply is not a chat completion"
        except (OpenAIError, ValueError) as error:
            reason = f"{error} {error.__cause__ or ''}"
        reason = reason.replace(self.key, "***") if self.key else reason
        raise UserError(
            f"the judge at {self.base_url} gave no answer ({' '.join(reason.split())[:240]}):"
            f" check that it runs, --judge_base_url, --judge_model and {KEY}; the same command"
            " goes on."
        )

    @property
    def _headers(self) -> dict[str, Any]:
        from openai import Omit

        # What the package would send of another service that the environment names is left out.
        of_others = dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), Omit())
        return of_others | {"Authorization": f"Bearer {self.key}" if self.key else Omit()}

    @cached_property
    def _client(self) -> Any:
        from openai import OpenAI  # here, since only MT-Bench needs the package

        key, retries = self.key or "none", self.attempts - 1
        return OpenAI(base_url=self.base_url, api_key=key, max_retries=retries, timeout=SECONDS)


def connect(base_url: str | None, model: str | None) -> Judge:
    """The judge that a command line names; nothing is sent yet."""
    if not base_url or not model:
        raise UserError(
            "mtbench needs a judge: give --judge_base_url (such as http://localhost:8000/v1) and"
            f" --judge_model, and the key, if it asks for one, in the environment variable {KEY}."
        )
    parts = urllib.parse.urlsplit(base_url)
    if parts.username or parts.password or parts.query:
        raise UserError(
            "--judge_base_url holds a user name or a query, which would be written into the"
            f" result: give the bare address, and the key in {KEY}."
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(
            f'--judge_base_url "{base_url}" is not an address: write it like http://localhost:8000/v1.'
        )
    require("openai", "--benchmarks mtbench")
    return Judge(base_url.rstrip("/"), model, os.environ.get(KEY, ""))


@dataclass(frozen=True)
class Question:
    """The first turn of a question."""

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
    """
    if source is None:
        import datasets

        what = f"the questions of MT-Bench can't be loaded from the hub ({HUB})"
        with translated(what, "give them as a JSONL file by --mtbench_questions"):
            loaded: Any = datasets.load_dataset(HUB, split="train")
        rows = [(f"question {n} of {HUB}", dict(row)) for n, row in enumerate(loaded, start=1)]
    else:
        rows = read_rows(Path(source), kind=".jsonl")
    asked = [_question(row, number, where) for number, (where, row) in enumerate(rows, start=1)]
    ids = [question.id for question in asked]
    if repeated := [name for name in ids if ids.count(name) > 1]:
        raise UserError(f"{source or HUB} holds question {repeated[0]} twice: leave one out.")
    if not asked:
        raise UserError(f"{source or HUB} holds no question: give another --mtbench_questions.")
    return asked[:limit]


def _question(row: dict[str, Any], number: int, where: str) -> Question:
    first = _first(row.get("turns") or row.get("prompt"))
    if not first or not isinstance(first, str):
        raise UserError(
            f"{where} has no first turn: give each line question_id, category and turns."
        )
    name = row.get("question_id", row.get("prompt_id", number))
    right = _first(row.get("reference")) or ""
    return Question(str(name), str(row.get("category", "")), first, str(right))


def _first(turns: Any) -> Any:
    return turns[0] if isinstance(turns, list) and turns else turns


def grading_prompt(question: Question, answer: str) -> str:
    """Prompt for the judge."""
    reference = compare = ""
    if question.reference:
        reference = f"\n# A right answer, for comparison\n{question.reference}\n"
        compare = " Compare it with the given right answer."
    texts = {"question": question.text, "answer": answer, "reference": reference}
    return _GRADING.format(**texts, with_reference=compare)


@dataclass(frozen=True)
class MTBench:
    """The benchmark, ready to be asked."""

    questions: Sequence[Question]
    judge: Judge
    decoding: Decoding

    def settings(self) -> dict[str, Any]:
        """All that a score depends on beside the model."""
        texts = [part for q in self.questions for part in (q.id, q.category, q.text, q.reference)]
        return {
            "decoding": asdict(self.decoding),
            "questions": digest_texts(texts),
            "judge": self.judge.model,
            "judge_base_url": self.judge.base_url,
        }

    def measure(self, loaded: Loaded, template: str, batch_size: int, cache: CacheOf) -> Measured:
        """Answer and have rated what is not cached; the score is the mean rating."""
        replies: dict[str, str] = {}
        for temperature in sorted({question.temperature for question in self.questions}):
            decoding = replace(self.decoding, temperature=temperature)
            prompts = {q.id: q.text for q in self.questions if q.temperature == temperature}
            written = cache({"decoding": asdict(decoding)})
            replies |= answers(loaded, prompts, decoding, template, batch_size, written)
        ratings = cache(self.settings())
        for question in tqdm(self.questions, unit="answer", leave=False):
            prompt = grading_prompt(question, replies[question.id].strip())
            ratings.item(question.id, lambda prompt=prompt: self._judged(prompt))
        return assess(self.questions, replies, {q.id: ratings.get(q.id) for q in self.questions})

    def _judged(self, prompt: str) -> str:
        """The judge's words; it is asked again where they hold no rating."""
        words = ""
        for _ in range(ASKED_AGAIN):
            words = self.judge.ask(prompt)
            if rating(words) is not None:
                break
        return words


def assess(
    asked: Sequence[Question], replies: Mapping[str, str], ratings: Mapping[str, str]
) -> Measured:
    """The mean of the ratings that could be read, and of each category's."""
    items, by_category = [], {}
    for question in asked:
        score = rating(ratings[question.id])
        answer = replies[question.id].strip()[:SHOWN]
        items.append(Item(question.id, score, score is not None, answer))
        if score is not None:
            by_category.setdefault(question.category, []).append(score)
    scores = [score for of_one in by_category.values() for score in of_one]
    if not scores:
        raise UserError(
            "no rating could be read in what the judge said (it is asked for [[N]]): give another"
            " --judge_model."
        )
    means = {name: math.fsum(given) / len(given) for name, given in sorted(by_category.items())}
    others = {f"category {name}": mean for name, mean in means.items()}
    return Measured(math.fsum(scores) / len(scores), items, others)
