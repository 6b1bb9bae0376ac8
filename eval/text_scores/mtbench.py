"""MT-Bench, first turn: answers made here, each rated from 1 to 10 by a judge.

Source: Zheng et al. 2023, https://arxiv.org/abs/2306.05685, single-answer grading. The 80 questions
come from the hub or from a file; the words in which the judge is asked are this project's, so that
scores are compared within one table only.
"""

from __future__ import annotations

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
from bilora_diffusion.core.errors import UserError, as_user_error
from bilora_diffusion.core.files import read_rows
from bilora_diffusion.core.seeds import digest_texts

from ..results.compare import mean
from .benchmarks import ANSWER_LETTERS, Item, Measurement
from .models import CacheFor, Decoding, LoadedModel, answers

HUB = "HuggingFaceH4/mt_bench_prompts"
# Category -> temperature, as MT-Bench sets it; 0 for others, which have one right answer
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
# Times that the judge is asked for one rating, where its words hold none
RATING_ATTEMPTS = 3
# Bounds of a judge's reply
REPLY_TOKENS = 2048
REPLY_SECONDS = 120.0
_GRADING = (
    "Rate how well an assistant answered a user's question. Judge usefulness, relevance,"
    " correctness, depth, originality and level of detail; do not let length or style"
    " decide.{with_reference} First explain your judgement in a few sentences. Then give the"
    " rating on a scale from 1 (worst) to 10 (best), exactly in this form: [[rating]], for"
    " example [[5]].\n\n"
    "# Question\n{question}\n{reference}\n# The assistant's answer\n{answer}\n# End of the answer"
)
# The key has a variable of its own, so that no other service's key is sent to the judge.
KEY = "JUDGE_API_KEY"
_RATING = r"(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?"
# Forms of a rating, the asked one first
_FORMS = (
    re.compile(rf"\[\[\s*(?:rating:?\s*)?{_RATING}\]\]", re.IGNORECASE),
    re.compile(rf"rating\W{{0,6}}{_RATING}", re.IGNORECASE),
    re.compile(rf"\[\s*{_RATING}\]"),
)


def rating(text: str) -> float | None:
    """The last rating in a judge's words, from 1 to 10; None if there is none."""
    for form in _FORMS:
        values = [float(number) for number in form.findall(text)]
        # A judge repeats the scale or the example; its rating comes last.
        valid = [value for value in values if 1 <= value <= 10]
        if valid:
            return valid[-1]
    return None


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible endpoint, which rates answers."""

    # Address of the endpoint, up to and with "/v1"
    base_url: str
    # The endpoint's name of the model
    model: str
    # Sent as a bearer token; "" sends none. It is never shown.
    key: str = field(default="", repr=False)
    # Requests for one rating before it is given up, each later than the one before
    attempts: int = 8

    def ask(self, prompt: str) -> str:
        """The judge's reply at temperature 0."""
        from openai import OpenAIError

        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=REPLY_TOKENS,
                extra_headers=self._headers,
            )
            if len(reply.choices) == 0:
                return ""
            return reply.choices[0].message.content or ""
        # The package returns a reply that is not a chat completion as it is.
        except (AttributeError, TypeError):
            reason = "its reply is not a chat completion"
        except (OpenAIError, ValueError) as error:
            reason = f"{error} {error.__cause__ or ''}"
        if self.key:  # some endpoints repeat it in their message
            reason = reason.replace(self.key, "***")
        raise UserError(
            f"the judge at {self.base_url} gave no answer ({' '.join(reason.split())[:240]}):"
            f" check that it runs, --judge_base_url, --judge_model and {KEY}; the same command"
            " goes on."
        )

    @property
    def _headers(self) -> dict[str, Any]:
        from openai import Omit

        # The package would send the variables that the environment has for another service.
        headers: dict[str, Any] = {
            "OpenAI-Organization": Omit(),
            "OpenAI-Project": Omit(),
            "Authorization": Omit(),
        }
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return headers

    @cached_property
    def _client(self) -> Any:
        from openai import OpenAI  # here, since only MT-Bench needs the package

        return OpenAI(
            base_url=self.base_url,
            api_key=self.key or "none",  # the package demands one; the header above decides
            max_retries=self.attempts - 1,
            timeout=REPLY_SECONDS,
        )


def connect(base_url: str | None, model: str | None) -> Judge:
    """The judge that a command line names; nothing is sent yet."""
    if not base_url or not model:
        raise UserError(
            "mtbench needs a judge: give --judge_base_url (such as http://localhost:8000/v1) and"
            f" --judge_model, and the key, if it asks for one, in the environment variable {KEY}."
        )
    # The address is written into the result, so it must hold no secret.
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

        with as_user_error(
            f"the questions of MT-Bench can't be loaded from the hub ({HUB})",
            "give them as a JSONL file by --mtbench_questions",
        ):
            dataset: Any = datasets.load_dataset(HUB, split="train")
        rows = [(f"question {n} of {HUB}", dict(row)) for n, row in enumerate(dataset, start=1)]
    else:
        rows = read_rows(Path(source), kind=".jsonl")

    parsed: list[Question] = []
    ids: set[str] = set()
    for number, (place, row) in enumerate(rows, start=1):
        question = _parse_question(row, number, place)
        if question.id in ids:
            raise UserError(f"{source or HUB} holds question {question.id} twice: leave one out.")
        ids.add(question.id)
        parsed.append(question)
    if not parsed:
        raise UserError(f"{source or HUB} holds no question: give another --mtbench_questions.")
    return parsed[:limit]


def _parse_question(row: dict[str, Any], number: int, place: str) -> Question:
    text = _first_turn(row.get("turns") or row.get("prompt"))
    if not text or not isinstance(text, str):
        raise UserError(
            f"{place} has no first turn: give each line question_id, category and turns."
        )
    name = row.get("question_id", row.get("prompt_id", number))
    reference = _first_turn(row.get("reference")) or ""
    return Question(str(name), str(row.get("category", "")), text, str(reference))


def _first_turn(turns: Any) -> Any:
    return turns[0] if isinstance(turns, list) and turns else turns


def grading_prompt(question: Question, answer: str) -> str:
    """Prompt for the judge."""
    reference = instruction = ""
    if question.reference:
        reference = f"\n# A right answer, for comparison\n{question.reference}\n"
        instruction = " Compare it with the given right answer."
    return _GRADING.format(
        question=question.text,
        answer=answer,
        reference=reference,
        with_reference=instruction,
    )


@dataclass(frozen=True)
class MTBench:
    """The benchmark as an `Engine`."""

    questions: Sequence[Question]
    judge: Judge
    decoding: Decoding

    def settings(self) -> dict[str, Any]:
        """All that a score depends on, except the model."""
        texts: list[str] = []
        for question in self.questions:
            texts += [question.id, question.category, question.text, question.reference]
        return {
            "decoding": asdict(self.decoding),
            "questions": digest_texts(texts),
            "judge": self.judge.model,
            "judge_base_url": self.judge.base_url,
        }

    def measure(
        self, model: LoadedModel, template: str, batch_size: int, cache_for: CacheFor
    ) -> Measurement:
        """Make the answers and ratings that are not cached; the score is the mean rating."""
        # Question -> the answer of the model under test
        replies: dict[str, str] = {}
        # Questions of another file may have the same ids.
        questions = self.settings()["questions"]
        # Prompts of one batch share a temperature.
        for temperature in sorted({question.temperature for question in self.questions}):
            decoding = replace(self.decoding, temperature=temperature)
            prompts = {q.id: q.text for q in self.questions if q.temperature == temperature}
            cache = cache_for({"decoding": asdict(decoding), "questions": questions})
            replies |= answers(model, prompts, decoding, template, batch_size, cache)

        # The judge's words are cached, not the ratings: a better reading needs no new request.
        verdicts = cache_for(self.settings())
        for question in tqdm(self.questions, unit="answer", leave=False):
            if question.id not in verdicts:
                prompt = grading_prompt(question, replies[question.id].strip())
                verdicts.put(question.id, self._ask_judge(prompt))
        verdict_by_id = {question.id: verdicts.get(question.id) for question in self.questions}
        return assess(self.questions, replies, verdict_by_id)

    def _ask_judge(self, prompt: str) -> str:
        """The judge's words; it is asked again where they hold no rating."""
        words = ""
        for _ in range(RATING_ATTEMPTS):
            words = self.judge.ask(prompt)
            if rating(words) is not None:
                break
        return words


def assess(
    questions: Sequence[Question], replies: Mapping[str, str], verdicts: Mapping[str, str]
) -> Measurement:
    """The mean of the ratings that could be read, and of each category's."""
    items: list[Item] = []
    # Answers without a rating are in neither mean.
    scores: list[float] = []
    scores_by_category: dict[str, list[float]] = {}
    for question in questions:
        score = rating(verdicts[question.id])
        answer = replies[question.id].strip()[:ANSWER_LETTERS]
        items.append(Item(question.id, score, score is not None, answer))
        if score is not None:
            scores.append(score)
            scores_by_category.setdefault(question.category, []).append(score)
    if not scores:
        raise UserError(
            "no rating could be read in what the judge said (it is asked for [[N]]): give another"
            " --judge_model."
        )
    metrics = {
        f"category {category}": mean(scores_by_category[category])
        for category in sorted(scores_by_category)
    }
    return Measurement(mean(scores), items, metrics)
