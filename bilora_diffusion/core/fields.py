"""Options, declared as fields of dataclasses that carry default, help, choices, range and readers.

The command line, ``--help``, the tables of docs/, the checks and what is ignored come from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import is_text, quoted
from .values import SMALLEST, Range, check_choice

TRUE = ("yes", "true", "t", "y", "on", "1")
FALSE = ("no", "false", "f", "n", "off", "0")


@dataclass(frozen=True)
class IgnoredCase:
    """A case in which an option has no effect: it is then named in one line and ignored."""

    when: Callable[[Mapping[str, Any]], bool]  # whether it has none, from all options' values
    where: str  # a clause that follows "has no effect"
    fix: str = "drop it"  # in the imperative, with options in backquotes
    becomes: str | None = None  # the option whose value it takes then; None for its default


def unless(name: str, value: Any, where: str) -> IgnoredCase:
    """No effect unless another option has one value."""
    fix = f"add `--{name}`" if value is True else f"use `--{name} {value}`"
    return IgnoredCase(lambda values: values[name] != value, where, f"{fix} or drop it")


@dataclass(frozen=True)
class Option:
    """Metadata of a field under "option"."""

    help: str  # one or two sentences for ``--help``
    ignored: tuple[IgnoredCase, ...] = ()  # where it has no effect
    range: Range | None = None  # the numbers that it may be
    place: bool = False  # it may name a file or a folder
    free: bool = False  # a resumed run may change it: it touches at most the last digits
    choices: tuple[str, ...] | None = None  # what it may be
    words: tuple[str, ...] = ()  # what it may be instead of a number
    aliases: tuple[str, ...] = ()  # further flags
    itemized: bool = False  # its flag may come several times, and a recipe have lists of mappings
    one_value: str = ""  # its flag is refused with a second value; what to give instead


def option(default: Any, help: str, **settings: Any) -> Any:
    """A field that is an option.

    Args:
        default: its value when nobody gives one; a list for an option that takes several.
        **settings: what `Option` has; a number needs a ``range``.
    """
    metadata = {"option": Option(help, **settings)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def like(group: Any, name: str, **changes: Any) -> Any:
    """An option of another group once more, with ``changes`` as `option` takes them."""
    field = group.__dataclass_fields__[name]
    return option(**{"default": default_of(field), **vars(option_of(field)), **changes})


def option_of(field: dataclasses.Field[Any]) -> Option:
    """The metadata of a field that is an option."""
    return field.metadata["option"]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a field when nobody gives one."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def options_of(groups: Iterable[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The options of some groups by name, in their order."""
    return {
        field.name: field
        for group in groups
        for field in dataclasses.fields(group)
        if "option" in field.metadata
    }


def check(
    fields: Mapping[str, dataclasses.Field[Any]],
    values: Mapping[str, Any],
    dashes: str = "--",
    smallest: float = SMALLEST,
) -> None:
    """Refuse values that no run can mean; None is no value.

    Args:
        dashes: what stands before a name where the user wrote it.
        smallest: below it, a number other than 0 is refused too.
    """
    for name, field in fields.items():
        value, declared = values[name], option_of(field)
        if value is None or value in declared.words:
            continue
        label = f"{dashes}{name}"
        _check_text(label, value)
        if declared.range:
            declared.range.check(label, value, smallest)
        if declared.choices:
            check_choice(label, value, declared.choices)
        if declared.place and isinstance(value, str):
            _check_place(label, value)


def _check_text(label: str, value: Any) -> None:
    """Refuse NULs and bytes that are not UTF-8, which can be neither written nor opened."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and ("\0" in text or not is_text(text)):
            raise UserError(
                f"{label} {quoted(text)} is no text, it has a NUL or bytes that are not UTF-8:"
                " write it anew."
            )


def _check_place(label: str, value: str) -> None:
    """Refuse a name that no file or folder can have; it need not exist."""
    try:
        Path(value).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "there is no such user"
        raise UserError(
            f"{label} {quoted(value)} can't be opened ({reason}): correct it, or its permissions."
        ) from error


def sections(groups: Iterable[Any]) -> dict[str, list[Any]]:
    """Groups by the section in which their options stand."""
    by_name: dict[str, list[Any]] = {}
    for group in groups:
        by_name.setdefault(group.section, []).append(group)
    return by_name


class OneValue(argparse.Action):
    """Stores a value, and refuses another one where a user may mean both."""

    def __init__(self, *args: Any, fix: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fix = fix

    def __call__(self, parser: Any, namespace: Any, value: Any, flag: str | None = None) -> None:
        """Store the value under the option's name, where there is none yet or the same."""
        earlier = getattr(namespace, self.dest)
        if earlier not in (None, value):
            raise UserError(
                f"{flag} stands twice, for {quoted(earlier)} and {quoted(value)}: {self.fix}."
            )
        setattr(namespace, self.dest, value)


def add_flags(parser: argparse.ArgumentParser, groups: Iterable[Any], bare: bool = False) -> None:
    """Add a flag for each option of some groups, dataclasses with a ``section``.

    They are those of Transformers' ``HfArgumentParser``, whose import takes a second: underscores
    and dashes both hold; a boolean stands alone or before a value, as does a choice of yes, no and
    others, and a boolean that is on by default also has a ``--no_`` form; a list takes one or more
    values. Where they are ``bare``, booleans take no value: a positional argument may follow them.
    """
    for name, members in sections(groups).items():
        section = parser.add_argument_group(name)
        for group in members:
            hints = typing.get_type_hints(group)
            for option_name, field in options_of([group]).items():
                _add_flag(section, field, hints[option_name], bare)


def _add_flag(section: Any, field: dataclasses.Field[Any], hint: Any, bare: bool) -> None:
    help = option_of(field).help.replace("%", "%%")
    flags = [*_spellings(field.name), *option_of(field).aliases]
    section.add_argument(*flags, help=help, **_reading(field, hint, bare))
    if field.default is True:
        negative = {"action": "store_false", "dest": field.name, "default": False}
        section.add_argument(*_spellings(f"no_{field.name}"), help=help, **negative)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _reading(field: dataclasses.Field[Any], hint: Any, bare: bool) -> dict[str, Any]:
    """Arguments of ``add_argument`` that say how a field's values are read."""
    declared = option_of(field)
    usual = {"default": default_of(field), "choices": declared.choices}
    if field.default_factory is not dataclasses.MISSING:
        action = "extend" if declared.itemized else "store"
        return {**usual, "type": typing.get_args(hint)[0], "nargs": "+", "action": action}
    if isinstance(hint, types.UnionType):  # of a type and None, or a number and words
        hint = typing.get_args(hint)[0]
    if hint in (int, float):
        return {**usual, "type": _number(hint, declared.words)}
    if {"yes", "no"} <= set(declared.choices or ()):
        return {**usual, "type": _yes_or_no, "nargs": "?", "const": "yes"}
    if declared.one_value:
        return {**usual, "type": hint, "action": OneValue, "fix": declared.one_value}
    if hint is not bool:
        return {**usual, "type": hint}
    if bare:
        return {"action": "store_true"}
    return {**usual, "type": _truth, "nargs": "?", "const": True}


def _number(kind: Callable[[str], float], words: tuple[str, ...]) -> Callable[[str], float | str]:
    """Reads a number, or one of a few words; raises ValueError that says so."""
    alternatives = " or ".join(("a whole number" if kind is int else "a number", *words))

    def read(text: str) -> float | str:
        if text in words:
            return text
        try:
            return kind(text)
        except ValueError as error:
            raise ValueError(f"give {alternatives}") from error

    return read


def _truth(word: str) -> bool:
    if word.lower() in (*TRUE, *FALSE):
        return word.lower() in TRUE
    raise ValueError("give True or False, or the flag alone")


def _yes_or_no(word: str) -> str:
    """Reads any word for yes or no as that word, and others as they are."""
    try:
        return "yes" if _truth(word) else "no"
    except ValueError:
        return word
