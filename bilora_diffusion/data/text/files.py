"""Examples of a local file: JSONL, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from .examples import Example, from_turns

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
INPUTS = ("input", "prompt", "question", "instruction", "text", "sentence")
TARGETS = ("target", "answer", "output", "response", "label", "completion")
CONVERSATION = "messages"
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
            has; of a file with "instruction" and "input", both.
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
    inputs = _input_columns(path, columns, input_column)
    if any(isinstance(row.get(inputs[0]), list) for _, row in rows):
        return [from_turns(_turns(row, inputs[0], where), where) for where, row in rows]
    target = _column(path, columns, target_column, TARGETS, "--target_column")
    return [
        Example(
            _joined([_text(row, column, where, columns) for column in inputs]),
            _text(row, target, where, columns, numbers=True),
        )
        for where, row in rows
    ]


def _input_columns(path: Path, columns: Sequence[str], wanted: str | None) -> list[str]:
    if wanted in (None, "auto"):
        if CONVERSATION in columns:
            return [CONVERSATION]
        if {"instruction", "input"} <= set(columns):
            return ["instruction", "input"]
    return [_column(path, columns, wanted, INPUTS, "--input_column")]


def _column(
    path: Path, columns: Sequence[str], wanted: str | None, usual: Sequence[str], flag: str
) -> str:
    known = ", ".join(map(str, columns))
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


def _joined(parts: list[str]) -> str:
    return "\n\n".join([parts[0], *(part for part in parts[1:] if part.strip())])


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
            f" column of {', '.join(map(str, columns))}."
        )
    return value


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
    return [(turn["role"], turn["content"]) for turn in turns]


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
    if not path.is_file():
        raise UserError(f'there is no file "{path}": correct the path.')
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    return reader[path.suffix.lower()](path)


def _decoded(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is not UTF-8; it names the first line that is not.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): correct its rights.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"line {line} of {path.name} is not UTF-8 (byte {error.object[error.start]:#04x}): save"
            " the whole file as UTF-8."
        ) from error
    return text


def _jsonl(path: Path) -> Rows:
    rows: Rows = []
    # Only "\n" ends a line: `splitlines` would cut strings at other separators.
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {path.name}"
            rows.append((where, _object(_parsed(line, where), where)))
    return rows


def _json(path: Path) -> Rows:
    text = _decoded(path)
    content = _parsed(text, path.name) if text.strip() else []
    if not isinstance(content, list):
        raise UserError(
            f"{path.name} holds {_kind(content)}, not a list of objects: put [ and ] around its"
            " rows, or name it .jsonl if it has one object a line."
        )
    places = [f"row {number} of {path.name}" for number in range(1, len(content) + 1)]
    return [(where, _object(row, where)) for where, row in zip(places, content, strict=True)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg} at line {error.lineno}, column {error.colno}):"
            " correct it, and name files with one object a line .jsonl."
        ) from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_kind(value)}, not a JSON object: correct or drop it.")
    return value


def _csv(path: Path) -> Rows:
    reader = csv.DictReader(io.StringIO(_decoded(path), newline=""), strict=True)
    rows: Rows = []
    try:
        for row in reader:
            where = f"line {reader.line_num} of {path.name}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where} does not have {len(reader.fieldnames or ())} fields as its header"
                    " has: quote fields that contain a comma or a line break."
                )
            rows.append((where, row))
    except csv.Error as error:
        line = reader.reader.line_num
        raise UserError(f"line {line} of {path.name}: {error}; correct its quotes.") from error
    return rows


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path.name} can't be read as Parquet ({str(error).splitlines()[0]}): save it anew."
        ) from error
    names = (f"row {number} of {path.name}" for number in range(1, table.num_rows + 1))
    return list(zip(names, table.to_pylist(), strict=True))
