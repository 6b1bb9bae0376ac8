"""How a refusal is written down: facts, what is asked of each, why, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FACTS = {
    "modality": "{} models",
    "pipeline": "a {}",
    "device": "the device {}",
    "alone": "no variable LOCAL_RANK",
    "engine": "the engine {}",
    "fsdp_setting": "the setting {}",
    "compiled": "a dynamo backend",
    "trainer_engine": "a trainer on {}",
    "trainer_processes": "a trainer in {} processes",
    "model_init": "a trainer with model_init",
    "optim": 'optim="{}"',
}
"""Facts that are no options, and how a sentence calls them."""


@dataclass(frozen=True)
class Condition:
    """What is asked of one fact.

    Args:
        holds: whether it is met, from the fact's value and all facts.
        shown: it in Markdown, with ``{}`` for the fact and the values.
        values: the values that meet it, where these are a few.
    """

    holds: Callable[[Any, Mapping[str, Any]], bool]
    shown: str = "{}"
    values: tuple[Any, ...] = ()


def among(*values: Any) -> Condition:
    """One of a few values."""
    return Condition(lambda value, _: value in values, values=values)


def above(limit: float) -> Condition:
    """Any number above `limit`."""
    return Condition(lambda value, _: value is not None and value > limit, f"{{}} above {limit:g}")


def several() -> Condition:
    """More than one, by number or in a word."""
    return Condition(lambda value, _: value not in (None, 1), "{} above 1")


def other_than(*values: str) -> Condition:
    """Any value but a few."""
    return Condition(lambda value, _: value not in values, f"{{}} other than {', '.join(values)}")


def same_as(other: str) -> Condition:
    """The value of another option."""
    return Condition(
        lambda value, facts: bool(value) and value == facts.get(other), f"{{}} equal to `--{other}`"
    )


def unlike(other: str) -> Condition:
    """Another value than that of another option."""
    return Condition(
        lambda value, facts: value is not None and value != facts.get(other),
        f"{{}} other than `--{other}`",
    )


def beyond(other: str) -> Condition:
    """A number above that of another option."""
    return Condition(
        lambda value, facts: value is not None and value > (facts.get(other) or value),
        f"{{}} above `--{other}`",
    )


GIVEN = Condition(lambda value, _: value is not None and value is not False and value != "")
ABSENT = Condition(lambda value, _: value is None or value == "", "no {}")


@dataclass(frozen=True)
class Refusal:
    """Facts that are refused together.

    Args:
        when: (fact, condition) pairs; the entry holds where every fact is known and every
            condition met.
        reason: a clause that follows "since", with options in backquotes.
        instead: what to do about it, in the imperative, likewise.
    """

    when: tuple[tuple[str, Condition], ...]
    reason: str
    instead: str

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether these facts are refused."""
        return all(
            name in facts and condition.holds(facts[name], facts) for name, condition in self.when
        )

    def sentence(self, facts: Mapping[str, Any]) -> str:
        """What the user reads, for facts for which the entry holds."""
        subject = ""
        for name, condition in self.when:
            absent = condition is ABSENT
            link = " and " if absent or " with " in subject else " with "
            part = f"no --{name}" if absent else said(name, facts[name])
            subject = f"{subject}{link}{part}" if subject else part
        return f"{subject} is refused, since {self.reason}: {self.instead}.".replace("`", "")

    def shown(self) -> str:
        """The facts in Markdown."""
        return ", ".join(
            condition.shown.format(_shown(name, condition.values)) for name, condition in self.when
        )


def refusal(reason: str, instead: str, **when: Any) -> Refusal:
    """An entry of a table; a fact is asked for a value, for one of a tuple, or by a `Condition`."""
    conditions = (
        wanted
        if isinstance(wanted, Condition)
        else among(*(wanted if isinstance(wanted, tuple) else (wanted,)))
        for wanted in when.values()
    )
    return Refusal(tuple(zip(when, conditions, strict=True)), reason, instead)


def said(name: str, value: Any) -> str:
    """A fact as the user wrote it, without a secret."""
    if name in FACTS:
        return FACTS[name].format(value)
    if value is True or name == "hub_token":
        return f"--{name}"
    plain = not isinstance(value, str) or re.fullmatch(r"[\w.+-]+", value)
    return f"--{name} {value}" if plain else f'--{name} "{value}"'


def _shown(name: str, values: tuple[Any, ...]) -> str:
    if name in FACTS:
        return " or ".join(FACTS[name].format(value) for value in values or ("...",))
    first, *others = values or (True,)
    return " or ".join((f"`{said(name, first)}`", *(f"`{value}`" for value in others)))
