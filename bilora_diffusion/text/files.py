"""Examples of a local file: JSONL, JSON, CSV or Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import is_text, kind_of, listed, quoted, read_rows, require_column
from .examples import Example, from_turns

INPUTS = ("input", "prompt", "question", "instruction", "text", "sentence")
TARGETS = ("target", "answer", "output", "response", "label", "completion")
CONVERSATION = "messages"
INSTRUCTION = "instruction"
CONTEXTS = ("input", "context")
"""What Alpaca and Dolly call that which an instruction is about."""


def open_file(
    path: str | Path, *, input_column: str | None = None, target_column: str | None = None
) -> list[Example]:
    """The examples of a file.

    Args:
        path: one object a line (.jsonl), a list of objects (.json), a table with a header (.csv),
            or a Parquet file; text is UTF-8.
        input_column: the column of what goes in, or of conversations: lists of objects with "role"
            and "content". None or "auto": "messages", else the first of ``INPUTS`` that the file
            has; a file with "instruction" and "input" or "context" gives both, and the second may
            be missing, null or blank.
        target_column: the column of answers; None or "auto": the first of ``TARGETS``. Not needed
            for conversations.

    Raises:
        UserError: it can't be read, has no rows, lacks a column, or a row is of another kind.
    """
    path = Path(path)
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path.name} has no rows: give a file that has some.")
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    column, context = _input_columns(path, columns, input_column)
    if any(isinstance(row.get(column), list) for _, row in rows):
        return [from_turns(_turns(row, column, where), where) for where, row in rows]
    target = _column(path, columns, target_column, TARGETS, "--target_column")
    return [
        Example(
            _text(row, column, where, columns),
            _text(row, target, where, columns, numbers=True),
            input=_text(row, context, where, columns) if row.get(context) is not None else "",
        )
        for where, row in rows
    ]


def _input_columns(path: Path, columns: Sequence[str], wanted: str | None) -> tuple[str, str]:
    """The column of what goes in, and that of what it is about ("" if there is none)."""
    if wanted in (None, "auto"):
        if CONVERSATION in columns:
            return CONVERSATION, ""
        context = next((name for name in CONTEXTS if name in columns), "")
        if context and INSTRUCTION in columns:
            return INSTRUCTION, context
    return _column(path, columns, wanted, INPUTS, "--input_column"), ""


def _column(
    path: Path, columns: Sequence[str], wanted: str | None, usual: Sequence[str], flag: str
) -> str:
    if wanted not in (None, "auto"):
        require_column(str(wanted), columns, flag, path.name)
        return str(wanted)
    found = next((column for column in usual if column in columns), None)
    if found is None:
        raise UserError(
            f"{path.name} has no column named {', '.join(usual[:-1])} or {usual[-1]}: set {flag} to"
            f" one of its columns ({listed(columns)})."
        )
    return found


def _text(
    row: Mapping[str, Any], column: str, where: str, columns: Sequence[str], numbers: bool = False
) -> str:
    if column not in row:
        raise UserError(f'{where} has no "{column}", as others have: add it, or drop the row.')
    value = row[column]
    if numbers and isinstance(value, int):  # a class number, or true and false
        return str(value)
    if not isinstance(value, str):
        raise UserError(
            f'"{column}" of {where} is {kind_of(value)}, not text: correct the row, or name another'
            f" column of {listed(columns)}."
        )
    return _require_text(value, f'"{column}" of {where}')


def _turns(row: Mapping[str, Any], column: str, where: str) -> list[tuple[str, str]]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f'"{column}" of {where} is {kind_of(turns)}, not a conversation: give a list of objects'
            ' with "role" and "content".'
        )
    for number, turn in enumerate(turns, start=1):
        parts = [turn.get(key) for key in ("role", "content")] if isinstance(turn, dict) else []
        if not parts or not all(isinstance(part, str) for part in parts):
            raise UserError(
                f'turn {number} of {where} has no "role" and "content" that are text: correct it.'
            )
        for part in map(str, parts):
            _require_text(part, f"turn {number} of {where}")
    return [(turn["role"], turn["content"]) for turn in turns]


def _require_text(value: str, where: str) -> str:
    if not is_text(value):
        raise UserError(
            f"{where} holds half a character (a lone surrogate, {quoted(value)}): write the text"
            " anew, in UTF-8."
        )
    return value
