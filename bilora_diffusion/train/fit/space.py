"""Space of a fit: the options that are searched and their values, as words of a command line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.recipe import read_options
from ...errors import UserError, did_you_mean

RATE, METHOD = "learning_rate", "method"
RANKS = ("4", "8", "16")
FACTOR = 2.0
"""Between two rates."""
MOST_FOR_SAMPLE = 512
"""Samples of which each gets an auxiliary of its own: each costs an adapter's memory."""
MOST_VALUES = 64
Options = tuple[tuple[str, str], ...]
"""A configuration: what it sets, beside what the user gave; () is the command line as given."""


def words(options: Options) -> list[str]:
    """The options as arguments."""
    return [word for name, value in options for word in (f"--{name}", value)]


def title(options: Options) -> str:
    """The options as a reader sees them: "bilora (rho auto), learning_rate 0.0004, rank 8"."""
    values = dict(options)
    method, radius = values.pop(METHOD, None), values.pop("rho", None)
    values.pop("auxiliaries", None) if radius else None
    first = [f"{method} (rho {radius})" if radius else method] if method else []
    rest = {"rate" if name == RATE else name: value for name, value in values.items()}
    return ", ".join([*first, *(f"{name} {value}" for name, value in rest.items())])


def folder_name(options: Options) -> str:
    """A name for the folder of a run: the values, of letters that every file system knows."""
    text = "_".join(value for _, value in options) or "as_given"
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in text)[:100]


@dataclass(frozen=True)
class Space:
    """Options and the values that each may have.

    Args:
        values: of each option, in the order in which they are searched.
        read_by: the options of methods that a method reads; those that it does not are no
            difference between two configurations.
        method_options: all options of which `read_by` knows.
    """

    values: Mapping[str, tuple[str, ...]]
    read_by: Mapping[str, frozenset[str]]
    method_options: frozenset[str] = frozenset()

    def configuration(self, values: Mapping[str, str]) -> Options:
        """Values as a configuration, without the options that its method does not read."""
        read = self.read_by.get(values.get(METHOD, ""))
        return tuple(
            (name, value)
            for name, value in values.items()
            if read is None or name not in self.method_options or name in read
        )

    def all(self) -> list[Options]:
        """Every configuration once."""
        rows = itertools.product(*self.values.values())
        every = (self.configuration(dict(zip(self.values, row, strict=True))) for row in rows)
        return list(dict.fromkeys(every))

    @property
    def size(self) -> int:
        """Configurations at most."""
        return math.prod(map(len, self.values.values()))

    def starts(self) -> list[Options]:
        """The middle of the space for each method."""
        middle = {name: values[(len(values) - 1) // 2] for name, values in self.values.items()}
        methods = self.values.get(METHOD, ("",))
        each = [{**middle, METHOD: method} if method else middle for method in methods]
        return [self.configuration(values) for values in each]

    def along(self, name: str, start: Options) -> list[Options]:
        """A configuration with each value of one option."""
        return [self.configuration({**dict(start), name: value}) for value in self.values[name]]

    def axes(self) -> Iterator[str]:
        """The options with several values, the rate first; the method is none of them."""
        names = [name for name, values in self.values.items() if len(values) > 1 and name != METHOD]
        yield from sorted(names, key=lambda name: name != RATE)

    def beyond(self, start: Options, tried: Collection[Options]) -> Options | None:
        """The next rate beyond those tried, where a configuration is at an edge of them."""
        values = dict(start)
        rates = sorted({float(rate) for rate in self.values.get(RATE, ())})
        if len(rates) < 2:
            return None
        others = {k: v for k, v in values.items() if k != RATE}
        alike = [dict(options) for options in tried if RATE in dict(options)]
        near = [
            float(o[RATE]) for o in alike if {k: v for k, v in o.items() if k != RATE} == others
        ]
        rate, factor = float(values[RATE]), rates[-1] / rates[-2]
        if len(near) < 2 or min(near) < rate < max(near):
            return None
        further = rate * factor if rate == max(near) else rate / factor
        return self.configuration({**values, RATE: f"{further:.6g}"})


def default_values(
    given: Collection[str], rate: float, samples: int, supports_sample: bool
) -> dict[str, tuple[str, ...]]:
    """What is searched where no file says it; what the user gave is fixed, but for the rate.

    Args:
        given: names of the options that the user gave.
        rate: the given or usual one.
        samples: that are learned from.
        supports_sample: whether the run can have an auxiliary for each sample.
    """
    values: dict[str, tuple[str, ...]] = {}
    if METHOD not in given:
        values[METHOD] = ("lora", "bilora")
        values |= {} if "rho" in given else {"rho": ("auto",)}
        if samples <= MOST_FOR_SAMPLE and supports_sample and "auxiliaries" not in given:
            values["auxiliaries"] = ("sample",)
    values[RATE] = tuple(f"{rate * by:.6g}" for by in (1 / FACTOR, 1.0, FACTOR))
    if "rank" not in given:
        values["rank"] = RANKS
    return values


def read_values(path: Path, searchable: Collection[str], known: Collection[str]) -> dict[str, Any]:
    """Read a file of values: option -> value or list of values.

    Args:
        searchable: the options that may be searched.
        known: all options.

    Raises:
        UserError: it can't be read, names no such option, or has no values for it.
    """
    what = f'the space "{path}"'
    loaded = read_options(path, what, "--fit_space")
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f'{what} has no options: write lines like "rank: [4, 8]".')
    space: dict[str, tuple[str, ...]] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in searchable:
            if name in known:
                raise UserError(
                    f'{what} has "{key}", which is the same for all runs of a fit: give it on the'
                    " command line."
                )
            raise UserError(f'{what} has "{key}"{did_you_mean(name, searchable)}: --help has all.')
        if name in space:
            raise UserError(f'{what} gives {name} a second time, as "{key}": keep one of them.')
        space[name] = _values(value, f"{what}, {name}")
    return space


def _values(given: Any, what: str) -> tuple[str, ...]:
    values: Sequence[Any] = given if isinstance(given, list) else [given]
    if not values or not all(isinstance(value, bool | str) and value != "" for value in values):
        raise UserError(f"{what} has something else than values: write it like [4, 8].")
    if len(values) > MOST_VALUES:
        raise UserError(f"{what} has {len(values)} values: give at most {MOST_VALUES}.")
    texts = [str(value).lower() if isinstance(value, bool) else value for value in values]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise UserError(f"{what} has {twice} twice: keep one of them.")
    return tuple(texts)
