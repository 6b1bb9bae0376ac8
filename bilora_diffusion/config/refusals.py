"""The one table of combinations that are refused, why, and what to do instead: `refusals.toml`.

Options with each other and with the device, ways to launch (DDP trains everything, FSDP2 adapters
of text models, see ``train.sharding``), and flags of other scripts. It is asked with a mapping of
facts: option values by name, and what its ``[facts]`` name. Command lines, launches and trainers
refuse what stands there, the contract tests leave it out, and docs/options.md shows it
(``python -m docs.make``).

An option that the chosen method does not read stands without complaint, so that runs which differ
only in ``--method`` can share a recipe.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import UserError

TABLE = Path(__file__).with_name("refusals.toml")
Facts = Mapping[str, Any]
_TEXT = re.compile(r"(given|absent|above|other than|equal to)(?: (.+))?")


class Condition(NamedTuple):
    """A condition on one fact."""

    name: str
    test: str = ""  # given, absent, above, other than or equal to; "" where values are listed
    argument: str = ""  # of the test: a number, words with commas between them, or ``--option``
    values: tuple[Any, ...] = ()  # those that meet it, where they are listed

    def holds(self, facts: Facts) -> bool:
        """Test that the fact is known and meets the condition."""
        if self.name not in facts:
            return False
        value, other = facts[self.name], facts.get(self.argument[2:])
        match self.test:
            case "given":
                return value not in (None, "") and value is not False
            case "absent":
                return value in (None, "")
            case "above":
                return isinstance(value, str) or (value or 0) > float(self.argument)
            case "other than":
                return value is not None and value not in (other, *self.argument.split(", "))
            case "equal to":
                return bool(value) and value == other
        return value in self.values

    def shown(self) -> str:
        """The condition in Markdown."""
        if form := table().facts.get(self.name):
            named = " or ".join(form.format(value) for value in self.values or ("...",))
        else:
            first, *others = self.values or (True,)
            named = " or ".join((f"`{said(self.name, first)}`", *(f"`{v}`" for v in others)))
        if self.test in ("", "given"):
            return named
        argument = f"`{self.argument}`" if self.argument.startswith("--") else self.argument
        return f"no {named}" if self.test == "absent" else f"{named} {self.test} {argument}"


@dataclass(frozen=True)
class Refusal:
    """Facts that are refused together."""

    when: tuple[Condition, ...]  # the entry holds where every one is met
    reason: str  # a clause that follows "since", with options in backquotes
    instead: str  # what to do about it, in the imperative, likewise

    def holds(self, facts: Facts) -> bool:
        """Test that these facts are refused."""
        return all(condition.holds(facts) for condition in self.when)

    def sentence(self, facts: Facts) -> str:
        """The sentence for the user, for facts for which the entry holds."""
        subject = ""
        for name, test, *_ in self.when:
            link = " and " if test == "absent" or " with " in subject else " with "
            part = f"no --{name}" if test == "absent" else said(name, facts[name])
            subject = f"{subject}{link}{part}" if subject else part
        return f"{subject} is refused, since {self.reason}: {self.instead}.".replace("`", "")

    def shown(self) -> str:
        """The facts in Markdown."""
        return ", ".join(condition.shown() for condition in self.when)


class Table(NamedTuple):
    """Content of `refusals.toml`."""

    facts: dict[str, str]  # that are no options, and how a sentence calls them
    refused: tuple[Refusal, ...]  # in the order in which they are asked
    foreign: dict[str, dict[str, tuple[str, str]]]  # flags by modality: reason, instead


@functools.cache
def table() -> Table:
    """Read the table, once."""
    content = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    refused = tuple(
        Refusal(tuple(map(_condition, when, when.values())), row["since"], row["instead"])
        for row in content["refused"]
        for when in row["when"]
    )
    return Table(content["facts"], refused, content["foreign"])


def _condition(name: str, asked: Any) -> Condition:
    """A value of the table as a condition: a value, a list of values, or a test in words."""
    if isinstance(asked, str) and (test := _TEXT.fullmatch(asked)):
        return Condition(name, test[1], test[2] or "")
    return Condition(name, values=tuple(asked) if isinstance(asked, list) else (asked,))


def refused(facts: Facts) -> Refusal | None:
    """The first entry that holds for these facts, or None; unknown facts are not refused."""
    return next((entry for entry in table().refused if entry.holds(facts)), None)


def check(facts: Facts) -> None:
    """Refuse what does not go together."""
    if (entry := refused(facts)) is not None:
        raise UserError(entry.sentence(facts))


def said(name: str, value: Any) -> str:
    """A fact as the user wrote it, without a secret."""
    if name in table().facts:
        return table().facts[name].format(value)
    if value is True or name == "hub_token":
        return f"--{name}"
    plain = not isinstance(value, str) or re.fullmatch(r"[\w.+-]+", value)
    return f"--{name} {value}" if plain else f'--{name} "{value}"'
