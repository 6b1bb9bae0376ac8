"""A YAML file of options, read so that a value is the text that stands there.

YAML 1.1 makes numbers of ``1:30`` and ``010``, a date of ``2024-01-01`` and a truth of ``on``. Here
every value is what is written, as on the command line, and the option's own type decides what it
means; only ``true``, ``false`` and ``null`` (or nothing) are more than text. Anchors, tags and
repeated keys are refused, since an option has no use for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, did_you_mean
from ..files import is_file, quoted, read_text

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""The repository's recipes, which an installed package brings along."""
MOST_BYTES = 200_000
MOST_LEVELS = 10
MOST_LETTERS = 200
"""Of a key: an option of a recipe, or the label of an arm."""
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


def find_recipe(name: str) -> Path:
    """The file that ``--config`` names: a path, or one of `RECIPES` such as t5_base/mrpc.

    Raises:
        UserError: a name that is neither.
    """
    path, packaged = Path(name), RECIPES / f"{name}.yaml"
    if is_file(path) or path.is_absolute() or path.suffix:
        return path
    if is_file(packaged):
        return packaged
    known = [
        file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml")
    ]
    raise UserError(
        f"--config {quoted(name)} is neither a file nor a recipe{did_you_mean(name, known)}: give a"
        f" path or one of {', '.join(sorted(n for n in known if '/' not in n))}."
    )


def read_options(path: Path, what: str, flag: str) -> Any:
    """The content of a YAML file: mappings, lists, texts, True, False and None.

    Args:
        path: the file.
        what: it in the user's words, for messages.
        flag: the option that names it.

    Raises:
        UserError: no regular file, too large, no text, no YAML, or YAML that is more than options.
    """
    text = read_text(path, f"{what} of {flag}", MOST_BYTES)
    try:
        events = yaml.parse(text, Loader=yaml.BaseLoader)
        return _document(events)
    except _Unfit as error:
        raise UserError(f"{what} {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{what} is not valid YAML{line}: correct it.") from error
    except (ValueError, OverflowError) as error:  # an escape or a version beyond all range
        raise UserError(f"{what} is not valid YAML ({error}): correct it.") from error


class _Unfit(Exception):
    """The end of a sentence about a file."""


def _document(events: Iterator[Any]) -> Any:
    next(events)  # the start of the stream
    if isinstance(next(events), yaml.StreamEndEvent):
        return None
    value = _value(next(events), events, 0)
    next(events)  # the end of the document
    if not isinstance(next(events), yaml.StreamEndEvent):
        raise _Unfit('holds several documents: leave out the lines "---"')
    return value


def _value(event: Any, events: Iterator[Any], level: int) -> Any:
    line = event.start_mark.line + 1
    if event.anchor is not None or getattr(event, "tag", None) is not None:
        raise _Unfit(
            f"uses an anchor, an alias or a tag in line {line}: write the value out, or put a text"
            " that starts with &, * or ! in quotes"
        )
    if level > MOST_LEVELS:
        raise _Unfit(f"is nested more than {MOST_LEVELS} levels deep in line {line}: flatten it")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event)
    if isinstance(event, yaml.SequenceStartEvent):
        values = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            values.append(_value(item, events, level + 1))
        return values
    return _mapping(events, level)


def _mapping(events: Iterator[Any], level: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line = event.start_mark.line + 1
        if not isinstance(event, yaml.ScalarEvent) or event.anchor or event.tag:
            raise _Unfit(f"has a key in line {line} that is no plain text: name an option")
        key = _readable(event.value, line)
        if len(key) > MOST_LETTERS:
            raise _Unfit(f"has a key of {len(key)} letters in line {line}: name an option")
        if key in values:
            raise _Unfit(f'gives "{key}" twice, in lines {lines[key]} and {line}: keep one')
        lines[key] = line
        values[key] = _value(next(events), events, level + 1)
    return values


def _scalar(event: Any) -> str | bool | None:
    if event.style is None and event.value in _WORDS:
        return _WORDS[event.value]
    return _readable(event.value, event.start_mark.line + 1)


def _readable(text: str, line: int) -> str:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Unfit(f"has an escaped character in line {line} that is no text: leave it out")
    return text
