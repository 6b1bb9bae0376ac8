"""The first turn of MT-Bench: the model answers, and a judge rates each answer from 1 to 10.

Source: Zheng et al. 2023, https://arxiv.org/abs/2306.05685, single-answer grading. The 80 questions
come from the hub or from a file. The prompt for the judge is this project's own, so scores can be
compared only within one table.
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
# Category -> temperature, as in MT-Bench; 0 for all other categories
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
# Maximum number of replies requested for one answer, until a reply contains a rating
RATING_ATTEMPTS = 3
# Limits of a judge's reply
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
# Environment variable of the judge's key. It has its own name, so that the key of another service
# is never sent to the judge.
KEY = "JUDGE_API_KEY"
_RATING = r"(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?"
# Forms of a rating, beginning with the requested one
_FORMS = (
    re.compile(rf"\[\[\s*(?:rating:?\s*)?{_RATING}\]\]", re.IGNORECASE),
    re.compile(rf"rating\W{{0,6}}{_RATING}", re.IGNORECASE),
    re.compile(rf"\[\s*{_RATING}\]"),
)


def rating(text: str) -> float | None:
    """Read the last rating, from 1 to 10, in a judge's reply; None if there is none."""
    for form in _FORMS:
        values = [float(number) for number in form.findall(text)]
        # A judge may first repeat the scale or the example; its rating comes last.
        valid = [value for value in values if 1 <= value <= 10]
        if valid:
            return valid[-1]
    return None


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible endpoint, which rates answers."""

    # Address of the endpoint, up to and including "/v1"
    base_url: str
    # Name of the model at the endpoint
    model: str
    # Key that is sent as a bearer token; "" sends none. It is never shown.
    key: str = field(default="", repr=False)
    # Maximum number of requests for one reply; the waiting time between them grows.
    attempts: int = 8

    def ask(self, prompt: str) -> str:
        """Return the judge's reply at temperature 0.

        Raises:
            UserError: the endpoint gives no reply.
        """
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
        # The package does not check that the reply is a chat completion.
        except (AttributeError, TypeError):
            reason = "its reply is not a chat completion"
        except (OpenAIError, ValueError) as error:
            reason = f"{error} {error.__cause__ or ''}"
        if self.key:  # some endpoints repeat the key in their error messages
            reason = reason.replace(self.key, "***")
        raise UserError(
            f"the judge at {self.base_url} gave no answer ({' '.join(reason.split())[:240]}):"
            " check that the judge is running, and check --judge_base_url, --judge_model and"
            f" {KEY}; the same command then resumes."
        )

    @property
    def _headers(self) -> dict[str, Any]:
        from openai import Omit

        # By default, the package sends the environment's OpenAI organization, project and key.
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
            api_key=self.key or "none",  # the package requires a key; `_headers` overrides it
            max_retries=self.attempts - 1,
            timeout=REPLY_SECONDS,
        )


def connect(base_url: str | None, model: str | None) -> Judge:
    """Make the judge that the command line names, without sending a request.

    Raises:
        UserError: the address or the model is missing, the address is not usable, or the package
            openai is not installed.
    """
    if not base_url or not model:
        raise UserError(
            "mtbench needs a judge: give --judge_base_url (such as http://localhost:8000/v1) and"
            f" --judge_model. If the endpoint needs a key, set the environment variable {KEY}."
        )
    # The address is written to the result, so it must not contain a secret.
    parts = urllib.parse.urlsplit(base_url)
    if parts.username or parts.password or parts.query:
        raise UserError(
            "--judge_base_url contains a user name or a query, which would be written to the"
            f" result: give only the address, and put the key into {KEY}."
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(
            f'--judge_base_url "{base_url}" is not an address: write it like http://localhost:8000/v1.'
        )
    require("openai", "--benchmarks mtbench")
    return Judge(base_url.rstrip("/"), model, os.environ.get(KEY, ""))


@dataclass(frozen=True)
class Question:
    """The first turn of a question, with a reference answer if there is one."""

    id: str
    category: str
    text: str
    reference: str = ""

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, 0.0)


def questions(source: str | None, limit: int | None = None) -> list[Question]:
    """Read the questions from a JSONL file, or from the dataset on the hub.

    Args:
        source: a JSONL file with one question per line. The fields are turns (or prompt) and,
            optionally, question_id, category and reference. None for the hub.
        limit: maximum number of questions.

    Raises:
        UserError: the questions can't be read, or one is invalid or repeated.
    """
    if source is None:
        import datasets

        with as_user_error(
            f"the questions of MT-Bench can't be loaded from the hub ({HUB})",
            "give them as a JSONL file with --mtbench_questions",
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
            raise UserError(
                f"{source or HUB} contains question {question.id} twice: remove one of them."
            )
        ids.add(question.id)
        parsed.append(question)
    if not parsed:
        raise UserError(
            f"{source or HUB} contains no question: give another file with --mtbench_questions."
        )
    return parsed[:limit]


def _parse_question(row: dict[str, Any], number: int, place: str) -> Question:
    text = _first_turn(row.get("turns") or row.get("prompt"))
    if not text or not isinstance(text, str):
        raise UserError(
            f"{place} has no first turn: write question_id, category and turns into each line."
        )
    name = row.get("question_id", row.get("prompt_id", number))
    reference = _first_turn(row.get("reference")) or ""
    return Question(str(name), str(row.get("category", "")), text, str(reference))


def _first_turn(turns: Any) -> Any:
    return turns[0] if isinstance(turns, list) and turns else turns


def grading_prompt(question: Question, answer: str) -> str:
    """Return the prompt for the judge."""
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
        """Return everything that a score depends on, except the model."""
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
        """Get the answers and ratings that are not cached; the score is the mean rating."""
        # Id of a question -> the answer of the model under test
        replies: dict[str, str] = {}
        # Include the questions' hash in the cache, since other files may have the same ids.
        questions = self.settings()["questions"]
        # All prompts of a batch have the same temperature.
        for temperature in sorted({question.temperature for question in self.questions}):
            decoding = replace(self.decoding, temperature=temperature)
            prompts = {q.id: q.text for q in self.questions if q.temperature == temperature}
            cache = cache_for({"decoding": asdict(decoding), "questions": questions})
            replies |= answers(model, prompts, decoding, template, batch_size, cache)

        # The judge's replies are cached, not the ratings; a later version of `rating` can reread
        # them without new requests.
        verdicts = cache_for(self.settings())
        for question in tqdm(self.questions, unit="answer", leave=False):
            if question.id not in verdicts:
                prompt = grading_prompt(question, replies[question.id].strip())
                verdicts.put(question.id, self._ask_judge(prompt))
        verdict_by_id = {question.id: verdicts.get(question.id) for question in self.questions}
        return assess(self.questions, replies, verdict_by_id)

    def _ask_judge(self, prompt: str) -> str:
        """Return the judge's reply; the judge is asked again if it contains no rating."""
        words = ""
        for _ in range(RATING_ATTEMPTS):
            words = self.judge.ask(prompt)
            if rating(words) is not None:
                break
        return words


def assess(
    questions: Sequence[Question], replies: Mapping[str, str], verdicts: Mapping[str, str]
) -> Measurement:
    """Average the ratings that could be read, over all questions and for each category.

    Raises:
        UserError: no rating could be read.
    """
    items: list[Item] = []
    # Answers without a rating are excluded from both means.
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
            "none of the judge's replies contains a rating in the requested form [[N]]: give"
            " another --judge_model."
        )
    metrics = {
        f"category {category}": mean(scores_by_category[category])
        for category in sorted(scores_by_category)
    }
    return Measurement(mean(scores), items, metrics)
