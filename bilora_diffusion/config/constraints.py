"""The one table of combinations that are refused, why, and what to do instead: `constraints.toml`.

Options with each other and with the device, ways to launch (DDP trains everything, FSDP2 adapters
of text models, see ``train.engine``), and flags of other scripts. It is asked with a mapping of
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
from typing import Any

from ..core.errors import UserError

TABLE = Path(__file__).with_name("constraints.toml")
TEST = re.compile(r"(given|absent|above|other than|equal to)(?: (.+))?")
"""A test in words, with its argument."""
PLAIN_VALUE = re.compile(r"[\w.+-]+")
"""Text that a shell takes without quotes."""
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """A condition on one fact."""

    name: str
    test: str = ""  # given, absent, above, other than or equal to; "" where values are listed
    argument: str = ""  # of the test: a number, words with commas between them, or ``--option``
    values: tuple[Any, ...] = ()  # those that meet it, where they are listed

    def holds(self, facts: Facts) -> bool:
        """Test that the fact is known and meets the condition."""
        if self.name not in facts:
            return False
        value = facts[self.name]
        # Of an argument such as --learning_rate, the value of that option.
        compared_value = facts.get(self.argument.removeprefix("--"))
        match self.test:
            case "given":
                return value not in (None, "") and value is not False
            case "absent":
                return value in (None, "")
            case "above":
                # A word, such as auto or sample, stands for more than any number.
                return isinstance(value, str) or (value or 0) > float(self.argument)
            case "other than":
                excluded = (compared_value, *self.argument.split(", "))
                return value is not None and value not in excluded
            case "equal to":
                return bool(value) and value == compared_value
        return value in self.values

    def markdown(self) -> str:
        """The condition for a table of the documentation."""
        phrase = self._values_in_markdown()
        if self.test == "absent":
            return f"no {phrase}"
        if self.test in ("", "given"):
            return phrase
        argument = f"`{self.argument}`" if self.argument.startswith("--") else self.argument
        return f"{phrase} {self.test} {argument}"

    def _values_in_markdown(self) -> str:
        form = table().facts.get(self.name)
        if form is not None:
            return " or ".join(form.format(value) for value in self.values or ("...",))
        first, *further = self.values or (True,)
        phrases = [f"`{fact_text(self.name, first)}`"]
        phrases += [f"`{value}`" for value in further]
        return " or ".join(phrases)


@dataclass(frozen=True)
class Constraint:
    """Facts that are refused together."""

    conditions: tuple[Condition, ...]  # it is violated where every one is met
    reason: str  # a clause that follows "since", with options in backquotes
    instead: str  # what to do about it, in the imperative, likewise

    def is_violated(self, facts: Facts) -> bool:
        """Test that these facts are refused."""
        return all(condition.holds(facts) for condition in self.conditions)

    def sentence(self, facts: Facts) -> str:
        """The sentence for the user, for facts that are refused."""
        # "A with B and C", "no D and no E".
        subject = ""
        for condition in self.conditions:
            is_absent = condition.test == "absent"
            if is_absent:
                phrase = f"no --{condition.name}"
            else:
                phrase = fact_text(condition.name, facts[condition.name])
            if subject:
                link = "and" if is_absent or " with " in subject else "with"
                phrase = f"{subject} {link} {phrase}"
            subject = phrase
        return f"{subject} is refused, since {self.reason}: {self.instead}.".replace("`", "")

    def markdown(self) -> str:
        """The facts for a table of the documentation."""
        return ", ".join(condition.markdown() for condition in self.conditions)


@dataclass(frozen=True)
class Table:
    """Content of `constraints.toml`."""

    facts: dict[str, str]  # that are no options, and how a sentence calls them
    constraints: tuple[Constraint, ...]  # in the order in which they are checked
    foreign: dict[str, dict[str, tuple[str, str]]]  # flags by modality: reason, instead


@functools.cache
def table() -> Table:
    """Read the table, once."""
    content = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    constraints: list[Constraint] = []
    for row in content["constraint"]:
        for facts in row["when"]:
            conditions = tuple(condition(name, value) for name, value in facts.items())
            constraints.append(Constraint(conditions, row["since"], row["instead"]))
    return Table(content["facts"], tuple(constraints), content["foreign"])


def condition(name: str, value: Any) -> Condition:
    """A value of the table as a condition: a value, a list of values, or a test in words."""
    if isinstance(value, list):
        return Condition(name, values=tuple(value))
    test = TEST.fullmatch(value) if isinstance(value, str) else None
    if test is None:
        return Condition(name, values=(value,))
    return Condition(name, test[1], test[2] or "")


def first_violated(facts: Facts) -> Constraint | None:
    """The first constraint that these facts violate, or None; unknown facts violate none."""
    for constraint in table().constraints:
        if constraint.is_violated(facts):
            return constraint
    return None


def check(facts: Facts) -> None:
    """Refuse what does not go together."""
    constraint = first_violated(facts)
    if constraint is not None:
        raise UserError(constraint.sentence(facts))


def fact_text(name: str, value: Any) -> str:
    """A fact as the user wrote it, without a secret."""
    if name in table().facts:
        return table().facts[name].format(value)
    if value is True or name == "hub_token":
        return f"--{name}"
    if isinstance(value, str) and not PLAIN_VALUE.fullmatch(value):
        value = f'"{value}"'
    return f"--{name} {value}"
