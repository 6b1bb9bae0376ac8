"""Files of text that others wrote: read whole, within a bound, or refused in one sentence."""

from __future__ import annotations

import csv
import io
import json
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

LETTERS = 80
"""How much of a text that is wrong a sentence quotes."""


def is_file(path: Path) -> bool:
    """Whether a file lies there that has an end: no folder, device, pipe or socket.

    Unlike ``Path.is_file`` it is False, too, for what can be no path: a name that is too long or
    has a NUL, a loop of links, a folder that may not be entered.
    """
    return _mode(path) == stat.S_IFREG


def is_folder(path: Path) -> bool:
    """Whether a folder lies there; False for what can be no path."""
    return _mode(path) == stat.S_IFDIR


def read_text(path: Path, name: str, most_bytes: int) -> str:
    """The text of a file in UTF-8, without its byte order mark.

    Args:
        path: the file; a link is followed.
        name: it in messages.
        most_bytes: a larger file is refused.

    Raises:
        UserError: no file, no end to it, too large, or no text; it names the first line that is
            not.
    """
    if not is_file(path):
        kind = {None: "not there", stat.S_IFDIR: "a folder"}.get(_mode(path), "no regular file")
        raise UserError(f"{name} is {kind}: give a text file.")
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"{name} can't be read ({error.strerror}): correct its rights.") from error
    if len(content) > most_bytes:
        raise UserError(
            f"{name} is larger than {most_bytes / 1e6:.3g} MB, the most that is read: cut it into"
            " several, or check that it is the right file."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"line {line} of {name} is not UTF-8 (byte {error.object[error.start]:#04x}): save the"
            " whole file as UTF-8."
        ) from error
    place = text.find("\0")
    if place >= 0:
        line = text.count("\n", 0, place) + 1
        raise UserError(
            f"line {line} of {name} is no text, it has a NUL: save the whole file as UTF-8."
        )
    return text


def is_text(value: str) -> bool:
    """Whether a string is text: half a surrogate pair, which an escape in JSON or bytes of a
    command line become, can be neither written nor tokenized.
    """
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def quoted(value: object) -> str:
    """A wrong value for a sentence: printable, on one line, and not longer than that takes."""
    text = " ".join(str(value).split()).encode("utf-8", "backslashreplace").decode()
    text = text.replace("\0", "\\0")
    return f'"{text if len(text) <= LETTERS else text[: LETTERS - 3] + "..."}"'


def parse_json(text: str, name: str) -> Any:
    """What a text in JSON says.

    Raises:
        UserError: it is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name} is not JSON ({error.msg} at line {error.lineno}, column {error.colno}):"
            " correct it, and name files with one object a line .jsonl."
        ) from error
    except RecursionError as error:
        raise UserError(f"{name} is nested too deeply: write flat objects.") from error
    except ValueError as error:
        raise UserError(
            f"{name} has a number of thousands of digits: correct it, or put it in quotes."
        ) from error


def json_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """What each line of a JSONL file says, with what to call the line; blank ones are left out.

    Raises:
        UserError: as ``parse_json``.
    """
    # Only "\n" ends a line: `splitlines` would cut strings at other separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {name}"
            yield where, parse_json(line, where)


def csv_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file with a header, with what to call each.

    Raises:
        UserError: wrong quotes, a row of another length than the header, a column that is there
            twice, a field above the csv module's limit.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        twice = [column for column, count in Counter(columns).items() if count > 1]
        if twice:
            raise UserError(
                f"{name} has several columns {quoted(twice[0])}: rename or drop all but one."
            )
        for row in reader:
            where = f"line {reader.line_num} of {name}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where} does not have {len(columns)} fields as its header has: quote fields"
                    " that contain a comma or a line break."
                )
            yield where, row
    except csv.Error as error:
        raise UserError(
            f"line {reader.reader.line_num} of {name}: {error}; correct its quotes, or write JSONL."
        ) from error


def _mode(path: Path) -> int | None:
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):
        return None
