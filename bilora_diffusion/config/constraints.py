"""The table of refused combinations, with reasons and what to do instead: `constraints.toml`.

The table lists options that can't be combined with each other, with a device or with a way of
launching (DDP trains everything, FSDP2 only adapters of text models), and flags of other scripts.
Its conditions are checked against a mapping of facts: option values by name, and the other facts
that its ``[facts]`` section names. Command lines, launches and trainers refuse the combinations in
the table, the contract tests skip them, and docs/options.md lists them (``python -m docs.make``).

A constraint on an option that only some methods read names the method, so that runs that
differ only in ``--method`` can share a recipe.
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
# A test in words with its argument, such as "above 0".
TEST = re.compile(r"(given|absent|above|other than|equal to)(?: (.+))?")
# Text that needs no quotes in a shell.
PLAIN_VALUE = re.compile(r"[\w.+-]+")
# Option values and other facts, by name.
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """A condition on one fact: a test, or a list of values."""

    name: str  # name of the fact
    test: str = ""  # given, absent, above, other than or equal to; "" if ``values`` is used
    argument: str = ""  # the test's argument: a number, comma-separated words, or ``--option``
    values: tuple[Any, ...] = ()  # the values that meet the condition

    def holds(self, facts: Facts) -> bool:
        """Return whether the fact is known and meets the condition."""
        if self.name not in facts:
            return False
        value = facts[self.name]
        # The value of the option that the argument names, such as --learning_rate.
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
        """Return the condition in Markdown, for a table in the documentation."""
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
        # In the form "`--method bilora` or `lora`"; only the flag if there are no values.
        first_value, *further_values = self.values or (True,)
        phrases = [f"`{fact_text(self.name, first_value)}`"]
        phrases += [f"`{value}`" for value in further_values]
        return " or ".join(phrases)


@dataclass(frozen=True)
class Constraint:
    """A refused combination of facts."""

    conditions: tuple[Condition, ...]  # the constraint is violated if all of them hold
    reason: str  # a clause that follows "since", with options in backquotes
    instead: str  # what to do instead, in the imperative, with options in backquotes

    def is_violated(self, facts: Facts) -> bool:
        """Return whether this constraint refuses the facts."""
        return all(condition.holds(facts) for condition in self.conditions)

    def sentence(self, facts: Facts) -> str:
        """Return the message for facts that this constraint refuses."""
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
        """Return the conditions in Markdown, for a table in the documentation."""
        return ", ".join(condition.markdown() for condition in self.conditions)


@dataclass(frozen=True)
class Table:
    """Content of `constraints.toml`."""

    facts: dict[str, str]  # facts that are not options, with their format in messages
    constraints: tuple[Constraint, ...]  # in the order in which they are checked
    # Flags of other scripts by modality and name, with the reason and what to do instead.
    foreign: dict[str, dict[str, tuple[str, str]]]


@functools.cache
def table() -> Table:
    """Return the table, which is read from its file only once."""
    content = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    constraints: list[Constraint] = []
    for row in content["constraint"]:
        for facts in row["when"]:
            conditions = [condition(name, value) for name, value in facts.items()]
            constraints.append(Constraint(tuple(conditions), row["since"], row["instead"]))
    return Table(content["facts"], tuple(constraints), content["foreign"])


def condition(name: str, value: Any) -> Condition:
    """Create the condition for an entry: a value, a list of values, or a test in words."""
    if isinstance(value, list):
        return Condition(name, values=tuple(value))
    if isinstance(value, str):
        match = TEST.fullmatch(value)
        if match is not None:
            return Condition(name, test=match[1], argument=match[2] or "")
    return Condition(name, values=(value,))


def first_violated(facts: Facts) -> Constraint | None:
    """Return the first constraint that the facts violate, or None; a missing fact violates none."""
    for constraint in table().constraints:
        if constraint.is_violated(facts):
            return constraint
    return None


def check(facts: Facts) -> None:
    """Check that the facts violate no constraint.

    Raises:
        UserError: they violate one; the message names the facts, the reason and what to do instead.
    """
    constraint = first_violated(facts)
    if constraint is not None:
        raise UserError(constraint.sentence(facts))


def fact_text(name: str, value: Any) -> str:
    """Return a fact as the user wrote it, without the value of a secret."""
    if name in table().facts:
        return table().facts[name].format(value)
    if value is True or name == "hub_token":
        return f"--{name}"
    if isinstance(value, str) and not PLAIN_VALUE.fullmatch(value):
        value = f'"{value}"'
    return f"--{name} {value}"
