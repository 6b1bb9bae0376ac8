"""Examples of a local file: JSONL, JSON, CSV or Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..text_file import csv_rows, is_file, is_text, json_lines, parse_json, quoted, read_text
from .examples import Example, from_turns

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
INPUTS = ("input", "prompt", "question", "instruction", "text", "sentence")
TARGETS = ("target", "answer", "output", "response", "label", "completion")
CONVERSATION = "messages"
INSTRUCTION = "instruction"
CONTEXTS = ("input", "context")
"""What Alpaca and Dolly call that which an instruction is about."""
MOST_BYTES = 2_000_000_000
Rows = list[tuple[str, dict[str, Any]]]
"""Each row with what to call it in messages."""


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
    rows = _rows(path)
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
    known = _listed(columns)
    if wanted not in (None, "auto"):
        if wanted not in columns:
            raise UserError(
                f'{path.name} has no column "{wanted}": set {flag} to one of its columns ({known}).'
            )
        return str(wanted)
    found = next((column for column in usual if column in columns), None)
    if found is None:
        raise UserError(
            f"{path.name} has no column named {', '.join(usual[:-1])} or {usual[-1]}: set {flag} to"
            f" one of its columns ({known})."
        )
    return found


def _listed(columns: Sequence[str]) -> str:
    shown = [quoted(column).strip('"') for column in columns[:20]]
    return ", ".join([*shown, *(["..."] if len(columns) > 20 else [])])


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
            f'"{column}" of {where} is {_kind(value)}, not text: correct the row, or name another'
            f" column of {_listed(columns)}."
        )
    return _require_text(value, f'"{column}" of {where}')


def _turns(row: Mapping[str, Any], column: str, where: str) -> list[tuple[str, str]]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise UserError(
            f'"{column}" of {where} is {_kind(turns)}, not a conversation: give a list of objects'
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


def _kind(value: object) -> str:
    names = {
        type(None): "empty",
        list: "a list",
        dict: "an object",
        float: "a number",
        int: "a number",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def _rows(path: Path) -> Rows:
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f'"{path}" is none of {", ".join(SUFFIXES)}: convert it to one of them.')
    if not is_file(path):
        raise UserError(f'there is no file "{path}" that can be read: correct the path.')
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    return reader[path.suffix.lower()](path)


def _jsonl(path: Path) -> Rows:
    lines = json_lines(read_text(path, path.name, MOST_BYTES), path.name)
    return [(where, _object(row, where)) for where, row in lines]


def _json(path: Path) -> Rows:
    text = read_text(path, path.name, MOST_BYTES)
    content = parse_json(text, path.name) if text.strip() else []
    if not isinstance(content, list):
        raise UserError(
            f"{path.name} holds {_kind(content)}, not a list of objects: put [ and ] around its"
            " rows, or name it .jsonl if it has one object a line."
        )
    places = [f"row {number} of {path.name}" for number in range(1, len(content) + 1)]
    return [(where, _object(row, where)) for where, row in zip(places, content, strict=True)]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_kind(value)}, not a JSON object: correct or drop it.")
    return value


def _csv(path: Path) -> Rows:
    return list(csv_rows(read_text(path, path.name, MOST_BYTES), path.name))


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    # Damaged pages, texts that are not UTF-8, dates that Python does not have, two columns of one
    # name: Arrow has an exception for each, and derives most of them from Python's.
    except (
        pyarrow.ArrowException,
        OSError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
    ) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path.name} can't be read as Parquet ({reason}): save it anew.") from e
    return [(f"row {number} of {path.name}", row) for number, row in enumerate(rows, start=1)]
