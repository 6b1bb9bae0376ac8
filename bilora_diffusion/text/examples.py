"""One question with its answer, before tokenization."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import UserError, did_you_mean
from ..seeds import generator, seed_of

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """What goes into a model and what should come out of it.

    Attributes:
        prompt: what goes in; for a classifier the first sentence of a pair.
        answer: the target text: a label word, a completion, the last turn of a conversation.
        label: the class number where there are classes.
        pair: the second sentence, for a classifier.
        turns: (role, content) of a conversation that is more than one question and its answer.
        input: what the prompt is about, where a set keeps the two apart as Alpaca's does, or "".
    """

    prompt: str
    answer: str
    label: int | None = None
    pair: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    input: str = ""

    @property
    def question(self) -> str:
        """The prompt, and its input after a blank line."""
        return f"{self.prompt}\n\n{self.input}" if self.input.strip() else self.prompt

    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the assistant's last turn, as chat templates take it."""
        turns = self.turns or (("user", self.question), ("assistant", self.answer))
        while turns[-1][0] != "assistant":
            turns = turns[:-1]
        return [{"role": role, "content": content} for role, content in turns]


def from_turns(turns: Sequence[tuple[str, str]], where: str) -> Example:
    """The example of a conversation; turns after the assistant's last one are left out.

    Args:
        turns: (role, content) in order.
        where: what to call the row in messages.

    Raises:
        UserError: no turn of the assistant, or nothing before it.
    """
    answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers or answers[-1] == 0:
        raise UserError(
            f"{where} has no turn of the assistant that answers one before it: give roles"
            ' "user" and "assistant", in turn.'
        )
    kept = tuple(turns[: answers[-1] + 1])
    plain = len(kept) == 2 and kept[0][0] == "user"
    return Example(kept[-2][1], kept[-1][1], turns=() if plain else kept)


def label_words_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """The different answers, sorted (numbers by value): the classes of a file that names none."""
    words = {example.answer for example in examples}
    numeric = all(re.fullmatch(r"-?\d{1,18}", word) for word in words)
    return tuple(sorted(words, key=(lambda word: (int(word), word)) if numeric else None))


def with_labels(examples: Sequence[Example], words: Sequence[str], name: str) -> list[Example]:
    """The examples with class numbers: the place of each answer among the label words.

    Raises:
        UserError: an answer is not a label word; it names the row.
    """
    numbers = {word: number for number, word in enumerate(words)}
    labelled = []
    for row, example in enumerate(examples, start=1):
        if example.answer not in numbers:
            known = ", ".join(list(words)[:20])
            raise UserError(
                f'the label "{example.answer[:80]}" of row {row} of {name} is not among the label'
                f" words ({known}){did_you_mean(example.answer, words)}: correct the row."
            )
        labelled.append(replace(example, label=numbers[example.answer]))
    return labelled


def subset(examples: Sequence[T], size: int | None, seed: int, purpose: str) -> list[T]:
    """``size`` of the examples, drawn by (seed, purpose) and in their own order; or all of them."""
    if size is None or size >= len(examples):
        return list(examples)
    import torch

    order = torch.randperm(len(examples), generator=generator(seed_of(seed, purpose), "subset"))
    return [examples[i] for i in sorted(order[:size].tolist())]
