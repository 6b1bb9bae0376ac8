"""The table of refused combinations, with reasons and what to do instead: `constraints.toml`.

It has combinations of options with each other and with the device, ways to launch (DDP trains
everything, FSDP2 adapters of text models), and flags of other scripts. It is checked against a
mapping of facts: values of options by name, and further facts that its ``[facts]`` name. Command
lines, launches and trainers refuse what it lists, the contract tests skip it, and
docs/options.md shows it (``python -m docs.make``).

An option that the chosen method does not read is not refused, so that runs which differ only in
``--method`` can share a recipe.
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
# A test in words, with its argument.
TEST = re.compile(r"(given|absent|above|other than|equal to)(?: (.+))?")
# Text that needs no quotes in a shell.
PLAIN_VALUE = re.compile(r"[\w.+-]+")
# Values of options, and further facts, by name.
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """A condition on one fact: a test, or a list of values."""

    name: str  # of the fact
    test: str = ""  # given, absent, above, other than or equal to; "" where values are listed
    argument: str = ""  # of the test: a number, words with commas between them, or ``--option``
    values: tuple[Any, ...] = ()  # the values that meet the condition

    def holds(self, facts: Facts) -> bool:
        """Test that the fact is known and meets the condition."""
        if self.name not in facts:
            return False
        value = facts[self.name]
        # The value of an option that is the argument, such as --learning_rate.
        compared_value = facts.get(self.argument.removeprefix("--"))
        match self.test:
            case "given":
                return value not in (None, "") and value is not False
            case "absent":
                return value in (None, "")
            case "above":
                return (value or 0) > float(self.argument)
            case "other than":
                is_listed = value in self.argument.split(", ")
                return value is not None and value != compared_value and not is_listed
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
        argument = self.argument
        if argument.startswith("--"):
            argument = f"`{argument}`"
        return f"{phrase} {self.test} {argument}"

    def _values_in_markdown(self) -> str:
        form = table().facts.get(self.name)
        if form is not None:
            return " or ".join(form.format(value) for value in self.values or ("...",))
        # In the form "`--method bilora` or `lora`"; without values it is a flag.
        first_value, *further_values = self.values or (True,)
        phrases = [f"`{fact_text(self.name, first_value)}`"]
        phrases += [f"`{value}`" for value in further_values]
        return " or ".join(phrases)


@dataclass(frozen=True)
class Constraint:
    """Facts that are refused together."""

    conditions: tuple[Condition, ...]  # it is violated where all of them hold
    reason: str  # a clause that follows "since", with options in backquotes
    instead: str  # what to do instead, in the imperative, with options in backquotes

    def is_violated(self, facts: Facts) -> bool:
        """Test that this constraint refuses these facts."""
        return all(condition.holds(facts) for condition in self.conditions)

    def sentence(self, facts: Facts) -> str:
        """The sentence for the user on facts that are refused."""
        subject = ""  # in the form "A with B and C", or "no D and no E"
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
        """The conditions for a table of the documentation."""
        return ", ".join(condition.markdown() for condition in self.conditions)


@dataclass(frozen=True)
class Table:
    """Content of `constraints.toml`."""

    facts: dict[str, str]  # facts that are not options, and a format for them in sentences
    constraints: tuple[Constraint, ...]  # in the order in which they are checked
    # Flags of other scripts by modality and name: the reason, and what to do instead.
    foreign: dict[str, dict[str, tuple[str, str]]]


@functools.cache
def table() -> Table:
    """Read the table, once."""
    content = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    constraints: list[Constraint] = []
    for row in content["constraint"]:
        for facts in row["when"]:
            conditions = [condition(name, value) for name, value in facts.items()]
            constraints.append(Constraint(tuple(conditions), row["since"], row["instead"]))
    return Table(content["facts"], tuple(constraints), content["foreign"])


def condition(name: str, value: Any) -> Condition:
    """Make the condition of an entry: a value, a list of values, or a test in words."""
    if isinstance(value, list):
        return Condition(name, values=tuple(value))
    if isinstance(value, str):
        match = TEST.fullmatch(value)
        if match is not None:
            return Condition(name, test=match[1], argument=match[2] or "")
    return Condition(name, values=(value,))


def first_violated(facts: Facts) -> Constraint | None:
    """The first constraint that these facts violate, or None; a missing fact violates none."""
    for constraint in table().constraints:
        if constraint.is_violated(facts):
            return constraint
    return None


def check(facts: Facts) -> None:
    """Refuse facts that violate a constraint.

    Raises:
        UserError: it names the facts, the reason and what to do instead.
    """
    constraint = first_violated(facts)
    if constraint is not None:
        raise UserError(constraint.sentence(facts))


def fact_text(name: str, value: Any) -> str:
    """A fact as the user wrote it, without the value of a secret."""
    if name in table().facts:
        return table().facts[name].format(value)
    if value is True or name == "hub_token":
        return f"--{name}"
    if isinstance(value, str) and not PLAIN_VALUE.fullmatch(value):
        value = f'"{value}"'
    return f"--{name} {value}"
