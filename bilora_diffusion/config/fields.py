"""How an option is declared: a dataclass field that also carries its help."""

import dataclasses
from typing import Any


def option(default: Any, help: str, **argparse_options: Any) -> Any:
    """A field for ``HfArgumentParser``.

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
