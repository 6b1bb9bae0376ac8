"""Options, each declared once as a field of a dataclass with its default, help, choices and range.

The flags, ``--help``, the tables of docs/, the checks and the ignored options come from the fields.
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

# Words that a boolean flag takes, in lower case: those of Transformers' parser.
TRUE = ("yes", "true", "t", "y", "on", "1")
FALSE = ("no", "false", "f", "n", "off", "0")


@dataclass(frozen=True)
class IgnoredCase:
    """A case in which an option has no effect: a run then prints a note and ignores the option."""

    when: Callable[[Mapping[str, Any]], bool]  # tests the values of all options for the case
    where: str  # a clause that follows "has no effect"
    fix: str = "drop it"  # in the imperative, with options in backquotes
    becomes: str | None = None  # name of the option whose value it takes; None for its default


def unless(name: str, value: Any, where: str) -> IgnoredCase:
    """The case that another option does not have the value with which this one has an effect."""
    fix = f"use `--{name} {value}`"
    if value is True:
        fix = f"add `--{name}`"
    return IgnoredCase(lambda values: values[name] != value, where, f"{fix} or drop it")


@dataclass(frozen=True)
class Option:
    """Properties of an option, in its field's metadata under "option"."""

    help: str  # one or two sentences for ``--help``
    ignored: tuple[IgnoredCase, ...] = ()  # cases in which it has no effect
    range: Range | None = None  # its numbers
    is_path: bool = False  # its value may be the path of a file or a folder
    may_change_on_resume: bool = (
        False  # a resumed run may change it: it touches at most the last digits
    )
    choices: tuple[str, ...] | None = None  # its values, where they are words
    words: tuple[str, ...] = ()  # its values that are not numbers
    read: Callable[[str], Any] | None = None  # reads its text; the text of a ValueError is advice
    aliases: tuple[str, ...] = ()  # further flags
    itemized: bool = False  # its flag may come several times, and a recipe have lists of mappings
    fix_if_repeated: str = ""  # a second, other value is refused: what to give instead


def option(default: Any, help: str, **settings: Any) -> Any:
    """Declare a field of a dataclass as an option.

    Args:
        default: value where nobody gives one; a list for an option that takes several values.
        help: one or two sentences.
        **settings: further fields of `Option`; a number needs a ``range`` or ``read``.
    """
    metadata = {"option": Option(help, **settings)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def like(group: Any, name: str, **changes: Any) -> Any:
    """Declare an option of another group once more, with ``changes`` as `option` takes them."""
    field = group.__dataclass_fields__[name]
    settings = {"default": default_of(field), **vars(option_of(field)), **changes}
    return option(**settings)


def option_of(field: dataclasses.Field[Any]) -> Option:
    """Properties of a field that is an option."""
    return field.metadata["option"]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a field where nobody gives one."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def options_of(groups: Iterable[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of some dataclasses that are options, by name, in their order."""
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
    """Refuse values that an option can't have; None means no value.

    Args:
        fields: options by name.
        values: their values, by the same names.
        dashes: prefix of a name in messages, as the user wrote it.
        smallest: a number other than 0 below it is refused too.

    Raises:
        UserError: it names the option, the value and the fix.
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
    """Refuse NULs and bytes that are not UTF-8, which can be neither written nor opened."""
    items = value if isinstance(value, list) else [value]
    for text in items:
        if isinstance(text, str) and ("\0" in text or not is_text(text)):
            raise UserError(
                f"{label} {quoted(text)} has a NUL or bytes that are not UTF-8: type it again."
            )


def _check_place(label: str, value: str) -> None:
    """Refuse a path that no file or folder can have; the file need not exist."""
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
    """Groups of options by the name of their section in ``--help``."""
    groups_by_section: dict[str, list[Any]] = {}
    for group in groups:
        groups_by_section.setdefault(group.section, []).append(group)
    return groups_by_section


class OneValue(argparse.Action):
    """Stores a value, and refuses a second, other one: the user may mean both."""

    def __init__(self, *args: Any, fix: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fix = fix

    def __call__(self, parser: Any, namespace: Any, value: Any, flag: str | None = None) -> None:
        """Store the value under the option's name.

        Raises:
            UserError: another value is stored already.
        """
        earlier = getattr(namespace, self.dest)
        if earlier not in (None, value):
            raise UserError(
                f"{flag} is given twice, as {quoted(earlier)} and {quoted(value)}: {self.fix}."
            )
        setattr(namespace, self.dest, value)


def add_flags(parser: argparse.ArgumentParser, groups: Iterable[Any], bare: bool = False) -> None:
    """Add a flag for each option of some groups.

    The flags are those of Transformers' ``HfArgumentParser``, whose import takes a second. A name
    has underscores or dashes. A boolean takes no value or one, as does a choice of yes, no
    and other words. A boolean that is on by default also has a ``--no_`` form. A list takes one or
    more values.

    Args:
        parser: the parser to add them to.
        groups: dataclasses with a ``section``.
        bare: booleans take no value, so that a positional argument may follow them.
    """
    for section_name, section_groups in sections(groups).items():
        section = parser.add_argument_group(section_name)
        for group in section_groups:
            hints = typing.get_type_hints(group)
            for name, field in options_of([group]).items():
                _add_flag(section, field, hints[name], bare)


def _add_flag(section: Any, field: dataclasses.Field[Any], hint: Any, bare: bool) -> None:
    properties = option_of(field)
    # A percent sign in the help would be a format of argparse's.
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
    """The flag with underscores and that with dashes; one where the name has neither."""
    underscored = f"--{name}"
    dashed = f"--{name.replace('_', '-')}"
    return [underscored] if dashed == underscored else [underscored, dashed]


def _parser_arguments(field: dataclasses.Field[Any], hint: Any, bare: bool) -> dict[str, Any]:
    """Arguments of ``add_argument`` that say how the values of an option are read.

    Args:
        field: the option.
        hint: its type.
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
    if isinstance(hint, types.UnionType):  # of a type and None, or of a number and words
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
    """A function that reads a number or one of some words.

    It raises ValueError with the advice to give one of them.
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
    """Read any word for true or false as yes or no, and other words as they are."""
    try:
        return "yes" if _read_truth(word) else "no"
    except ValueError:
        return word
