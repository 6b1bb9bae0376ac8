"""Options. Each is declared once, as a dataclass field with its default, help, choices and range.

The flags, ``--help``, the tables in docs/ and the checks are all derived from these fields.
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
from .values import SMALLEST_NORMAL, Range, check_choice

# Words that a boolean flag accepts, in lower case; Transformers' parser lacks only "on" and "off".
TRUE = ("yes", "true", "t", "y", "on", "1")
FALSE = ("no", "false", "f", "n", "off", "0")


@dataclass(frozen=True)
class IgnoredCase:
    """A case in which an option has no effect: a run then prints a note and ignores the option."""

    when: Callable[[Mapping[str, Any]], bool]  # whether the values of all options are this case
    where: str  # phrase that follows "has no effect" in the note
    fix: str = "drop it"  # imperative, with options in backquotes
    becomes: str | None = None  # option whose value replaces the given one; None for the default


def unless(name: str, value: Any, where: str) -> IgnoredCase:
    """Return the case in which the option ``name`` has a value other than ``value``."""
    fix = f"use `--{name} {value}`"
    if value is True:
        fix = f"add `--{name}`"
    return IgnoredCase(lambda values: values[name] != value, where, f"{fix} or drop it")


@dataclass(frozen=True)
class Option:
    """Properties of an option, stored in its field's metadata under "option"."""

    help: str  # one or two sentences for ``--help``
    ignored: tuple[IgnoredCase, ...] = ()  # cases in which the option has no effect
    range: Range | None = None  # allowed numbers
    is_path: bool = False  # whether the value may be the path of a file or a folder
    # Whether a resumed run may change the option, which affects the weights of a step at most by
    # rounding.
    may_change_on_resume: bool = False
    choices: tuple[str, ...] | None = None  # allowed values, if they are words
    words: tuple[str, ...] = ()  # allowed words of an option whose other values are numbers
    read: Callable[[str], Any] | None = None  # parses the text; its ValueError has the advice
    aliases: tuple[str, ...] = ()  # additional flags
    itemized: bool = False  # whether the flag may be repeated, and a recipe may list mappings
    fix_if_repeated: str = ""  # if set: refuse a second, different value with this advice


def option(default: Any, help: str, **settings: Any) -> Any:
    """Declare a field of a dataclass as an option.

    Args:
        default: value if the user gives none; a list for an option that takes several values.
        help: one or two sentences.
        **settings: other fields of `Option`; a numeric option needs a ``range`` or ``read``.
    """
    metadata = {"option": Option(help, **settings)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def like(group: Any, name: str, **changes: Any) -> Any:
    """Redeclare an option of another group; ``changes`` are arguments of `option`."""
    field = group.__dataclass_fields__[name]
    settings = {"default": default_of(field), **vars(option_of(field)), **changes}
    return option(**settings)


def option_of(field: dataclasses.Field[Any]) -> Option:
    """Return the properties of an option from its field."""
    return field.metadata["option"]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default value."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def options_of(groups: Iterable[Any]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of ``groups`` that are options, by name, in order of declaration."""
    options: dict[str, dataclasses.Field[Any]] = {}
    for group in groups:
        for field in dataclasses.fields(group):
            if "option" in field.metadata:
                options[field.name] = field
    return options


def check(
    fields: Mapping[str, dataclasses.Field[Any]],
    values: Mapping[str, Any],
    dashes: str = "--",
    smallest: float = SMALLEST_NORMAL,
) -> None:
    """Check that each option's value is allowed; None means no value.

    Args:
        fields: options by name.
        values: their values, by the same names.
        dashes: prefix of option names in messages, as the user writes them.
        smallest: smallest allowed absolute value of a number other than 0.

    Raises:
        UserError: a value is not allowed; the message names the option, the value and the fix.
    """
    for name, field in fields.items():
        value = values[name]
        properties = option_of(field)
        if value is None or value in properties.words:
            continue
        label = f"{dashes}{name}"
        _check_text(label, value)
        if properties.range:
            for number in value if isinstance(value, list) else [value]:
                properties.range.check(label, number, smallest)
        if properties.choices:
            check_choice(label, value, properties.choices)
        if properties.is_path and isinstance(value, str):
            _check_place(label, value)


def _check_text(label: str, value: Any) -> None:
    """Check that texts have no NUL, which no path can contain, and are valid UTF-8."""
    items = value if isinstance(value, list) else [value]
    for text in items:
        if isinstance(text, str) and ("\0" in text or not is_text(text)):
            raise UserError(
                f"{label} {quoted(text)} has a NUL or bytes that are not UTF-8: type it again."
            )


def _check_place(label: str, value: str) -> None:
    """Check that a file or folder can have this path; it need not exist."""
    try:
        Path(value).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:
        # `expanduser` raises RuntimeError for the home folder of an unknown user.
        reason = getattr(error, "strerror", None) or "there is no such user"
        raise UserError(
            f"{label} {quoted(value)} can't be opened ({reason}): correct it, or its permissions."
        ) from error


def sections(groups: Iterable[Any]) -> dict[str, list[Any]]:
    """Return the groups of options by the name of their section in ``--help``."""
    groups_by_section: dict[str, list[Any]] = {}
    for group in groups:
        groups_by_section.setdefault(group.section, []).append(group)
    return groups_by_section


class OneValue(argparse.Action):
    """Action that refuses a second, different value, since the user may want both values."""

    def __init__(self, *args: Any, fix: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fix = fix

    def __call__(self, parser: Any, namespace: Any, value: Any, flag: str | None = None) -> None:
        """Store the value under the option's name.

        Raises:
            UserError: a different value was given before.
        """
        earlier = getattr(namespace, self.dest)
        if earlier not in (None, value):
            raise UserError(
                f"{flag} is given twice, as {quoted(earlier)} and {quoted(value)}: {self.fix}."
            )
        setattr(namespace, self.dest, value)


def add_flags(parser: argparse.ArgumentParser, groups: Iterable[Any], bare: bool = False) -> None:
    """Add a flag for each option in ``groups``.

    The flags work like those of Transformers' ``HfArgumentParser``, which takes a second to import.
    Names may have underscores or dashes. A boolean's value may be left out, as may the value of an
    option whose choices include yes and no. A boolean that is on by default also has a ``--no_``
    form. A list takes one or more values.

    Args:
        parser: the parser to add the flags to.
        groups: dataclasses with a ``section``.
        bare: whether booleans take no value, so that a positional argument may follow them.
    """
    for section_name, section_groups in sections(groups).items():
        section = parser.add_argument_group(section_name)
        for group in section_groups:
            hints = typing.get_type_hints(group)
            for name, field in options_of([group]).items():
                _add_flag(section, field, hints[name], bare)


def _add_flag(section: Any, field: dataclasses.Field[Any], hint: Any, bare: bool) -> None:
    properties = option_of(field)
    # argparse would read a single percent sign in the help text as a format.
    help = properties.help.replace("%", "%%")
    flags = _spellings(field.name) + list(properties.aliases)
    section.add_argument(*flags, help=help, **_parser_arguments(field, hint, bare))
    if field.default is True:
        section.add_argument(
            *_spellings(f"no_{field.name}"),
            help=help,
            action="store_false",
            dest=field.name,
            default=False,
        )


def _spellings(name: str) -> list[str]:
    """Return the flag with underscores and the flag with dashes; only one if they are equal."""
    underscored = f"--{name}"
    dashed = f"--{name.replace('_', '-')}"
    return [underscored] if dashed == underscored else [underscored, dashed]


def _parser_arguments(field: dataclasses.Field[Any], hint: Any, bare: bool) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for an option's default and its parsing.

    Args:
        field: the option.
        hint: its type annotation.
        bare: as in `add_flags`.
    """
    properties = option_of(field)
    arguments: dict[str, Any] = {"default": default_of(field), "choices": properties.choices}
    if properties.read is not None:
        return arguments | {"type": properties.read}
    if field.default_factory is not dataclasses.MISSING:  # a list
        action = "extend" if properties.itemized else "store"
        item: Any = typing.get_args(hint)[0]
        if item in (int, float):
            item = _number_reader(item, ())
        return arguments | {"type": item, "nargs": "+", "action": action}
    if isinstance(hint, types.UnionType):  # a type or None, or a number or text
        hint = typing.get_args(hint)[0]
    if hint in (int, float):
        return arguments | {"type": _number_reader(hint, properties.words)}
    if {"yes", "no"} <= set(properties.choices or ()):
        return arguments | {"type": _read_yes_or_no, "nargs": "?", "const": "yes"}
    if properties.fix_if_repeated:
        return arguments | {"type": hint, "action": OneValue, "fix": properties.fix_if_repeated}
    if hint is not bool:
        return arguments | {"type": hint}
    if bare:
        return {"action": "store_true"}
    return arguments | {"type": _read_truth, "nargs": "?", "const": True}


def _number_reader(
    kind: Callable[[str], float], words: tuple[str, ...]
) -> Callable[[str], float | str]:
    """Return a function that parses a number or one of ``words``.

    The function raises ValueError with advice for the user.
    """
    alternatives = "a whole number" if kind is int else "a number"
    for word in words:
        alternatives += f" or {word}"

    def read(text: str) -> float | str:
        if text in words:
            return text
        try:
            return kind(text)
        except ValueError as error:
            raise ValueError(f"give {alternatives}") from error

    return read


def _read_truth(word: str) -> bool:
    if word.lower() in TRUE + FALSE:
        return word.lower() in TRUE
    raise ValueError("give True or False, or the flag alone")


def _read_yes_or_no(word: str) -> str:
    """Convert a word for true or false to "yes" or "no"; return other words unchanged."""
    try:
        return "yes" if _read_truth(word) else "no"
    except ValueError:
        return word
