"""One question with its answer, before tokenization, and the files that hold such."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError, did_you_mean
from ..core.files import (
    kind_of,
    listed,
    quoted,
    read_rows,
    require_column,
)

CONVERSATION = "messages"
INPUTS = ("input", "prompt", "question", "instruction", "text", "sentence")
TARGETS = ("target", "answer", "output", "response", "label", "completion")
INSTRUCTION = "instruction"
CONTEXTS = ("input", "context")
"""Alpaca's and Dolly's columns of what an instruction is about."""


@dataclass(frozen=True)
class Example:
    """A model's input and the answer that it should give."""

    prompt: str
    answer: str
    label: int | None = None  # the class number where there are classes
    pair: str | None = None  # the second sentence, for a classifier
    # (role, content) of a conversation that is more than one question and its answer.
    turns: tuple[tuple[str, str], ...] = ()
    input: str = ""  # what the prompt is about, where a set keeps the two apart as Alpaca's does
    where: str = field(default="the row", compare=False, repr=False)  # its name in messages

    @property
    def question(self) -> str:
        """The prompt, and its input after a blank line."""
        return f"{self.prompt}\n\n{self.input}" if self.input.strip() else self.prompt

    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the assistant's last turn, as chat templates take it."""
        turns = self.turns or (("user", self.question), ("assistant", self.answer))
        return [{"role": role, "content": content} for role, content in turns]


def from_turns(turns: Sequence[tuple[str, str]], where: str) -> Example:
    """The example of a conversation, (role, content) in order, without what follows the assistant's
    last turn.

    Raises:
        UserError: no turn of the assistant, or nothing before it.
    """
    answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers or answers[-1] == 0:
        raise UserError(
            f"{where} has no turn of the assistant that answers one before it: give roles"
            ' "user" and "assistant", in turn.'
        )
    dialogue = tuple(turns[: answers[-1] + 1])
    plain = len(dialogue) == 2 and dialogue[0][0] == "user"
    return Example(dialogue[-2][1], dialogue[-1][1], turns=() if plain else dialogue, where=where)


def open_file(
    path: Path, input_column: str | None = None, target_column: str | None = None
) -> list[Example]:
    """The examples of a file that ``files.read_rows`` reads.

    Args:
        input_column: the column of what goes in, or of conversations: lists of objects with "role"
            and "content". None or "auto": "messages", else the first of ``INPUTS`` that the file
            has; a file with "instruction" and "input" or "context" gives both, and the second may
            be missing, null or blank.
        target_column: the column of answers; None or "auto": the first of ``TARGETS``. Not needed
            for conversations.

    Raises:
        UserError: it can't be read, has no rows, a column is missing, or a row is of another kind.
    """
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path.name} has no rows: give a file that has some.")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    usual, context = (CONVERSATION, *INPUTS), ""
    if input_column in (None, "auto") and INSTRUCTION in columns and CONVERSATION not in columns:
        context = next((name for name in CONTEXTS if name in columns), "")
        usual = (INSTRUCTION,) if context else usual
    column = _column(path, columns, input_column, usual, "--input_column")
    if any(isinstance(row.get(column), list) for _, row in rows):
        return [from_turns(_turns(row, column, where), where) for where, row in rows]
    target = _column(path, columns, target_column, TARGETS, "--target_column")
    fix = f"correct the row, or name another column of {listed(columns)}"
    return [
        Example(
            text_of(row, column, where, fix),
            text_of(row, target, where, fix, numbers=True),
            input="" if row.get(context) is None else text_of(row, context, where, fix),
            where=where,
        )
        for where, row in rows
    ]


def _column(
    path: Path, columns: Sequence[str], column_name: str | None, usual: Sequence[str], option: str
) -> str:
    if column_name is not None and column_name != "auto":
        require_column(column_name, columns, option, path.name)
        return column_name
    column = next((name for name in usual if name in columns), None)
    if column is None:
        raise UserError(
            f"{path.name} has no column named {', '.join(usual[:-1])} or {usual[-1]}: set {option}"
            f" to one of its columns ({listed(columns)})."
        )
    return column


def text_of(
    row: Mapping[str, Any], column: str, where: str, fix: str, numbers: bool = False
) -> str:
    """The text in a column; with ``numbers`` a whole number, or true and false, counts as text.

    Raises:
        UserError: the column is missing or something else; it ends with ``fix``.
    """
    if column not in row:
        raise UserError(f'{where} has no "{column}", only {listed(list(row))}: {fix}.')
    value = row[column]
    if numbers and isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f'"{column}" of {where} is {kind_of(value)}, not text: {fix}.')
    return value


def _turns(row: Mapping[str, Any], column: str, where: str) -> list[tuple[str, str]]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f'"{column}" of {where} is {kind_of(turns)}, not a conversation: give a list of objects'
            ' with "role" and "content".'
        )
    pairs = []
    for number, turn in enumerate(turns, start=1):
        place = f"turn {number} of {where}"
        parts = [turn.get(key) for key in ("role", "content")] if isinstance(turn, dict) else []
        if not parts or not all(isinstance(part, str) for part in parts):
            raise UserError(f'{place} has no "role" and "content" that are text: correct it.')
        role, content = map(str, parts)
        pairs.append((role, content))
    return pairs


def label_words_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """The different answers, sorted (numbers by value): the classes of a file that names none."""
    words = {example.answer for example in examples}
    numeric = all(re.fullmatch(r"-?\d{1,18}", word) for word in words)
    return tuple(sorted(words, key=(lambda word: (int(word), word)) if numeric else None))


def with_labels(examples: Sequence[Example], words: Sequence[str]) -> list[Example]:
    """The examples with class numbers: the place of each answer among the label words.

    Raises:
        UserError: an answer is not a label word; it names the row.
    """
    numbers = {word: number for number, word in enumerate(words)}
    for example in examples:
        if example.answer not in numbers:
            raise UserError(
                f"the label {quoted(example.answer)} of {example.where} is not among the label"
                f" words ({listed(words)}){did_you_mean(example.answer, words)}: correct the row."
            )
    return [replace(example, label=numbers[example.answer]) for example in examples]
