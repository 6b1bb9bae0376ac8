"""Examples before tokenization, each an input with its answer, and functions that read them."""

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
# Usual names of input columns; the first name that a file has is used.
INPUTS = ("input", "prompt", "question", "instruction", "text", "sentence")
# Usual names of answer columns.
TARGETS = ("target", "answer", "output", "response", "label", "completion")
INSTRUCTION = "instruction"
# Columns with the text that an instruction refers to, as in Alpaca and Dolly.
CONTEXTS = ("input", "context")


@dataclass(frozen=True)
class Example:
    """An input and its correct answer.

    Checkpoints store hashes of an example's `repr`, so the names and the order of the fields must
    not change.

    Attributes:
        prompt: the input; for a classifier, its first sentence.
        answer: the answer.
        label: class number; None for free text.
        pair: a classifier's second sentence.
        turns: (role, content) of each turn of a conversation; () for one question and its answer.
        input: text that the prompt refers to, such as Alpaca's "input"; "" if there is none.
        where: name of the row for messages.
    """

    prompt: str
    answer: str
    label: int | None = None
    pair: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    input: str = ""
    where: str = field(default="the row", compare=False, repr=False)

    @property
    def question(self) -> str:
        """The prompt, followed by a blank line and its input if it has one."""
        if not self.input.strip():
            return self.prompt
        return f"{self.prompt}\n\n{self.input}"

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation up to the assistant's last turn, as chat templates take it."""
        turns = self.turns or (("user", self.question), ("assistant", self.answer))
        return [{"role": role, "content": content} for role, content in turns]


def from_turns(turns: Sequence[tuple[str, str]], where: str) -> Example:
    """Convert a conversation to an example; turns after the assistant's last turn are dropped.

    Args:
        turns: (role, content) of each turn, in order.
        where: name of the row for messages.

    Raises:
        UserError: the assistant has no turn, or its only turn is the first of the conversation.
    """
    answer_numbers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    if not answer_numbers or answer_numbers[-1] == 0:
        raise UserError(
            f"{where} has no turn of the assistant that follows another turn: alternate the roles"
            ' "user" and "assistant".'
        )
    dialogue = tuple(turns[: answer_numbers[-1] + 1])
    _, question = dialogue[-2]
    _, answer = dialogue[-1]
    # A single question and its answer have no turns, as if they were read from two columns.
    is_plain = len(dialogue) == 2 and dialogue[0][0] == "user"
    return Example(question, answer, turns=() if is_plain else dialogue, where=where)


def open_file(
    path: Path, input_column: str | None = None, target_column: str | None = None
) -> list[Example]:
    """Read the examples of a file of rows (`files.read_rows`).

    Args:
        path: the file.
        input_column: column with the inputs, or with conversations: lists of objects with "role"
            and "content". None or "auto" selects the first of these that the file has: "messages",
            "instruction" together with "input" or "context", one of `INPUTS`. "input" or "context"
            may then be missing, null or blank in a row.
        target_column: column with the answers; None or "auto" selects the first of `TARGETS` that
            the file has. Not used for conversations.

    Raises:
        UserError: the file can't be read, has no rows, lacks a column, or has a row with another
            type of content.
    """
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path.name} has no rows: give a file with rows.")
    names: dict[str, None] = {}  # column names, in the order of their first rows
    for _, row in rows:
        # Rows of JSON can have different keys.
        names |= dict.fromkeys(row)
    columns = list(names)
    usual_columns, context = (CONVERSATION, *INPUTS), ""
    if input_column in (None, "auto") and INSTRUCTION in columns and CONVERSATION not in columns:
        context = next((name for name in CONTEXTS if name in columns), "")
        if context:
            usual_columns = (INSTRUCTION,)
    column = _column(path, columns, input_column, usual_columns, "--input_column")
    # If one row is a conversation, all rows must be.
    if any(isinstance(row.get(column), list) for _, row in rows):
        return [from_turns(_turns(row, column, where), where) for where, row in rows]
    target = _column(path, columns, target_column, TARGETS, "--target_column")
    fix = f"correct the row, or name another column of {listed(columns)}"
    examples = []
    for where, row in rows:
        prompt = text_of(row, column, where, fix)
        answer = text_of(row, target, where, fix, accepts_numbers=True)
        text = ""
        # The context can be missing in a row.
        if row.get(context) is not None:
            text = text_of(row, context, where, fix)
        examples.append(Example(prompt, answer, input=text, where=where))
    return examples


def _column(
    path: Path,
    columns: Sequence[str],
    column_name: str | None,
    usual_columns: Sequence[str],
    option: str,
) -> str:
    """Return the column that an option names, or the first usual column that the file has."""
    if column_name is not None and column_name != "auto":
        require_column(column_name, columns, option, path.name)
        return column_name
    for name in usual_columns:
        if name in columns:
            return name
    raise UserError(
        f"{path.name} has no column named {', '.join(usual_columns[:-1])} or {usual_columns[-1]}:"
        f" set {option} to one of its columns ({listed(columns)})."
    )


def text_of(
    row: Mapping[str, Any], column: str, where: str, fix: str, accepts_numbers: bool = False
) -> str:
    """Read the text in a column.

    Args:
        row: values by column name.
        column: name of the column.
        where: name of the row for messages.
        fix: what the user should do, the last part of the messages, without a period.
        accepts_numbers: whether integers and booleans are converted to text.

    Raises:
        UserError: the column is missing or has another type.
    """
    if column not in row:
        raise UserError(f'{where} has no "{column}", only {listed(list(row))}: {fix}.')
    value = row[column]
    if accepts_numbers and isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f'"{column}" of {where} is {kind_of(value)}, not text: {fix}.')
    return value


def _turns(row: Mapping[str, Any], column: str, where: str) -> list[tuple[str, str]]:
    """Read the conversation in a column; return (role, content) of each turn."""
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f'"{column}" of {where} is {kind_of(turns)}, not a conversation: give a list of objects'
            ' with "role" and "content".'
        )
    pairs = []
    for number, turn in enumerate(turns, start=1):
        role = content = None
        if isinstance(turn, dict):
            role = turn.get("role")
            content = turn.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f'turn {number} of {where} needs a "role" and a "content" that are text: correct'
                " the turn."
            )
        pairs.append((role, content))
    return pairs


def label_words_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the classes of a file: its distinct answers, sorted; by value if all are integers.

    A blank answer is not a class: `encode` skips its example.
    """
    words = sorted({example.answer for example in examples if example.answer.strip()})
    if all(re.fullmatch(r"-?\d{1,18}", word) for word in words):
        # Sort by value, so "10" comes after "9".
        words.sort(key=int)
    return tuple(words)


def with_labels(examples: Sequence[Example], words: Sequence[str]) -> list[Example]:
    """Return examples with class numbers: the index of each answer in the label words.

    An example with a blank answer gets no class number.

    Raises:
        UserError: an answer is not a label word; the message names its row.
    """
    class_numbers = {word: number for number, word in enumerate(words)}
    for example in examples:
        if example.answer.strip() and example.answer not in class_numbers:
            raise UserError(
                f"the label {quoted(example.answer)} of {example.where} is not among the label"
                f" words ({listed(words)}){did_you_mean(example.answer, words)}: correct the row."
            )
    return [replace(example, label=class_numbers.get(example.answer)) for example in examples]
