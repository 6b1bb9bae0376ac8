"""How an option is declared, a dataclass field that also carries its help, and made into a flag."""

import argparse
import dataclasses
import types
import typing
from typing import Any

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
NO_TRUTH = "neither true nor false: "


def option(default: Any, help: str, **argparse_options: Any) -> Any:
    """A field that ``add_flags`` makes a flag of.

    Args:
        default: its value when nobody gives one.
        help: one or two sentences for ``--help``.
        **argparse_options: ``choices``, ``aliases`` and whatever else ``add_argument`` takes.
    """
    metadata = {"help": help.replace("%", "%%"), **argparse_options}
    return dataclasses.field(default=default, metadata=metadata)


def automatic_switch(help: str) -> Any:
    """A boolean that is decided later unless given: bare, or followed by True or False."""
    return option(None, help, nargs="?", const=True)


def add_flags(parser: argparse.ArgumentParser, group: Any) -> None:
    """Add a section with a flag for each field of an option dataclass, ``_argument_group_name``.

    They are those of Transformers' ``HfArgumentParser``, whose import takes a second: underscores
    and dashes both hold; a boolean stands alone or before a value, and one that is on by default
    also has a ``--no_`` form; a list takes one or more values.
    """
    section = parser.add_argument_group(group._argument_group_name)
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        settings = dict(field.metadata)
        flags = [*_spellings(field.name), *settings.pop("aliases", ())]
        section.add_argument(*flags, **_reading(field, hints[field.name]), **settings)
        if field.default is True:
            negative = _spellings(f"no_{field.name}")
            section.add_argument(
                *negative, action="store_false", dest=field.name, default=False, **settings
            )


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _reading(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """How ``add_argument`` is to read a field's values."""
    if field.default_factory is not dataclasses.MISSING:
        (item,) = typing.get_args(hint)
        return {"type": item, "nargs": "+", "default": field.default_factory()}
    if isinstance(hint, types.UnionType):  # of a type and None
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if hint is not bool:
        return {"type": hint, "default": field.default}
    alone = {} if field.default is None else {"nargs": "?", "const": True}
    return {"type": _truth, "default": field.default, **alone}


def _truth(word: str) -> bool:
    if word.lower() in (*TRUE, *FALSE):
        return word.lower() in TRUE
    raise argparse.ArgumentTypeError(f"{NO_TRUTH}{word}")
