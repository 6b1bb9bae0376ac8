"""Readers for users' text files and tables, and helpers for messages about them.

A file is either read completely or refused with a one-sentence message. Rows keep their types and
their line numbers from the file, which pandas would change.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, as_user_error, did_you_mean

# Maximum length of a value that a message quotes, in characters.
LETTERS = 80
# Default limit for the size of a file that is read into memory, in bytes.
MAX_BYTES = 2_000_000_000
# Suffixes of models in a single file.
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt")
# Maximum number of columns that a message lists.
COLUMNS = 20
# Root of the repository, or the folder that the package is installed in.
ROOT = Path(__file__).resolve().parents[2]
# A path does not start after a letter or a colon, since these may be part of a URL. Exceptions are
# the prefixes of model folders, such as ``hf:FOLDER``.
_PATH_START = r"(?:(?<![\w./:~-])|(?<=\bopen_clip:)|(?<=\bhf:)|(?<=\bblip:))"
_PATH_LETTERS = r"[^\s'\"<>|:,;()\[\]]"
_ABSOLUTE_PATH = re.compile(rf"{_PATH_START}~?/(?:{_PATH_LETTERS}+/)*((?:(?!/){_PATH_LETTERS})+)/?")
# Rows of a table, each with its name in messages, such as "line 3 of answers.csv".
Rows = list[tuple[str, dict[str, Any]]]


# Unlike the methods of `Path`, these functions return False for strings that can't be paths,
# instead of raising an error.
is_file = os.path.isfile
is_folder = os.path.isdir


def regular_file(path: Path) -> Path:
    """Check that a file can be read into memory, and return its path.

    Raises:
        OSError: the path is not a regular file (it may be an endless pipe), or the file is too
            large.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if status.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, "it is too large")
    return path


def hash_of_file(path: Path) -> str:
    """Return the SHA-256 hash of a file's content as 64 hex digits, like ``sha256sum``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, name: str, max_bytes: int) -> str:
    """Return the text of a UTF-8 file without its byte order mark.

    Args:
        path: the file.
        name: name of the file in messages.
        max_bytes: maximum size of the file in bytes.

    Raises:
        UserError: the path is not a regular file, or the file can't be read, is too large or is not
            UTF-8; the message names the first line that is not UTF-8.
    """
    if not is_file(path):
        kind = "not there"
        if os.path.exists(path):
            kind = "a folder" if is_folder(path) else "not a regular file"
        raise UserError(f"{name} is {kind}: give a text file.")
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)  # the extra byte shows that the file is larger
    except OSError as error:
        raise UserError(
            f"{name} can't be read ({error.strerror}): correct its permissions."
        ) from error
    if len(content) > max_bytes:
        raise UserError(
            f"{name} is larger than {max_bytes / 1e6:.3g} MB, the maximum: shorten it, or check"
            " that it is the right file."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {line} of {name} is not UTF-8 (byte {error.object[error.start]:#04x}): save the"
            " whole file as UTF-8."
        ) from error


def is_text(value: str) -> bool:
    """Return whether a string has no lone surrogates, which can't be written or tokenized.

    They come from escapes in JSON, and Python converts each byte on the command line that is not
    UTF-8 to one.
    """
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def quoted(value: object) -> str:
    """Return a value for a message: in quotes, on one line of at most `LETTERS` characters."""
    line = " ".join(str(value).split())
    text = line.encode("utf-8", "backslashreplace").decode()
    if len(text) > LETTERS:
        text = text[: LETTERS - 3] + "..."
    return f'"{text}"'


def folder_or_id(value: str, option: str) -> Path | None:
    """Return the folder that a value names, or None if the value can only be a hub id.

    Args:
        value: path of a folder, or id of a repository on the hub.
        option: option that has the value, for messages.

    Raises:
        UserError: the value is a file, a path that does not exist, or not a valid hub id.
    """
    # Imported lazily: --help does not need it.
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    path = Path(value).expanduser()
    if is_folder(path):
        return path
    named_value = f"{option} {quoted(value)}"
    if os.path.exists(path):
        advice = ""
        if path.suffix in CHECKPOINT_SUFFIXES:
            advice = " docs/models.md shows how to convert a single-file checkpoint to a folder."
        raise UserError(f"{named_value} is a file: give a folder or a hub id.{advice}")
    if value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1:
        raise UserError(f"{named_value} does not exist: correct the path, or give a hub id.")
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise UserError(
            f"{named_value} is neither a folder here nor a valid hub id: correct it."
        ) from error
    return None


def read_rows(
    path: Path, name: str | None = None, *, kind: str | None = None, max_bytes: int = MAX_BYTES
) -> Rows:
    """Return the rows of a table, which may be empty.

    A row of a JSON file has only its own keys; a row of CSV or Parquet has every column.

    Args:
        path: a file with one object per line (.jsonl), a list of objects (.json) or a table with a
            header (.csv), all in UTF-8; or a Parquet file (.parquet).
        name: name of the file in messages; None for its name without the folder.
        kind: one of `TABLES`, the format to read; None for the path's suffix.
        max_bytes: maximum size of a text file in bytes.

    Raises:
        UserError: the file does not exist, has another format, is too large or is not UTF-8; or an
            entry is not a row, and the message then names its line, or its number in a JSON list.
    """
    if name is None:
        name = path.name
    kind = kind or path.suffix.lower()
    if kind not in TABLES:
        raise UserError(f"{name} is not one of {', '.join(TABLES)}: convert it to one of them.")
    if not is_file(path):
        raise UserError(f"there is no file {quoted(path)} that can be read: correct the path.")
    if kind == ".parquet":
        return _parquet(path, name)
    text = read_text(path, name, max_bytes)
    return list(_READERS[kind](text, name))


def require_column(column: str, columns: Iterable[str], option: str, name: str) -> None:
    """Raise UserError if a table does not have a column.

    Args:
        column: the column.
        columns: the table's columns, which the message lists.
        option: option that names the column, for the message.
        name: the table's name in the message.
    """
    columns = list(columns)
    if column not in columns:
        raise UserError(
            f"{name} has no column {quoted(column)}{did_you_mean(column, columns)}: set {option} to"
            f" one of its columns ({listed(columns)})."
        )


def listed(words: Sequence[str]) -> str:
    """Return names, such as column names, as a list for a message; at most `COLUMNS` of them."""
    names = [quoted(word).strip('"') for word in words[:COLUMNS]]
    if len(words) > COLUMNS:
        names.append("...")
    return ", ".join(names)


def counted(count: int | str, noun: str) -> str:
    """Return a number with a noun whose plural ends in s: "1 image", "2 images"."""
    ending = "" if str(count) == "1" else "s"
    return f"{count} {noun}{ending}"


def describe_hours_per_second(count: float, noun: str) -> str:
    """Return how long ``count`` steps take: "0.5 hours for each second that a step takes"."""
    return f"{count / 3600:.2g} hours for each second that {noun} takes"


def bytes_for_people(count: float) -> str:
    """Return a number of bytes with a unit, such as "1.5 GB"."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} TB"


def duration(seconds: float) -> str:
    """Return seconds with units: "48 s", "3 min 12 s", "2 h 5 min"."""
    minutes, full_seconds = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{full_seconds} s"
    if minutes < 60:
        return f"{minutes} min {full_seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def without_paths(text: str) -> str:
    """Remove the names of this machine's folders from a text that others will read.

    An absolute path inside the repository or the current folder becomes relative to it; any other
    absolute path is cut to its last part.
    """
    for root in (ROOT, Path.cwd()):
        if root != Path(root.anchor):
            text = text.replace(f"{root}/", "")
    return _ABSOLUTE_PATH.sub(r"\1", text)


def kind_of(value: object) -> str:
    """Return the kind of a JSON value for a message, such as "a list" or "empty"."""
    names = {
        type(None): "empty",
        list: "a list",
        dict: "an object",
        str: "a text",
        bool: "true or false",
        float: "a number",
        int: "a number",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{name} is nested too deeply: write flat objects.") from error
    except ValueError as error:  # also raised for a number with thousands of digits
        problem, _, _ = str(error).partition(";")
        raise UserError(
            f"{name} is not JSON ({problem}): correct it; a .json file is one list of objects, a"
            " .jsonl file has one object per line."
        ) from error


def _object(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {kind_of(value)}, not a JSON object: correct or drop it.")
    return where, value


def _json_lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Only "\n" ends a line: `splitlines` would cut strings at other separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {name}"
            yield _object(_json(line, where), where)


def _json_list(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not text.strip():
        return
    content = _json(text, name)
    if not isinstance(content, list):
        raise UserError(
            f"{name} holds {kind_of(content)}, not a list of objects: put [ and ] around its rows,"
            " or name it .jsonl if it has one object per line."
        )
    for number, row in enumerate(content, start=1):
        yield _object(row, f"row {number} of {name}")


def _csv(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        for column, count in Counter(columns).items():
            if count > 1:
                raise UserError(
                    f"{name} has several columns named {quoted(column)}: rename or drop all but"
                    " one."
                )
        for row in reader:
            where = f"line {reader.line_num} of {name}"
            # `DictReader` stores extra fields under the key None and fills missing ones with None.
            if None in row or None in row.values():
                raise UserError(
                    f"{where} does not have {len(columns)} fields like the header: quote fields"
                    " that contain a comma or a line break."
                )
            yield where, row
    except csv.Error as error:
        raise UserError(
            f"line {reader.reader.line_num} of {name}: {error}; correct its quotes, or write JSONL."
        ) from error


def _parquet(path: Path, name: str) -> Rows:
    # Imported lazily: most runs read no Parquet file.
    from pyarrow import parquet

    with as_user_error(f"{name} can't be read as Parquet", "save it again"):
        rows = parquet.read_table(path).to_pylist()
    return [(f"row {number} of {name}", row) for number, row in enumerate(rows, start=1)]


_READERS = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv}
# File name suffixes of tables.
TABLES = (".jsonl", ".json", ".csv", ".parquet")
