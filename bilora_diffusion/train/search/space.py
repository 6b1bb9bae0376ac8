"""Space of a fit: the options that are searched and their values, as words of a command line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...config.recipe import read_options
from ...core.choices import SAMPLE
from ...core.errors import UserError, did_you_mean
from ...core.values import RANKS
from ...methods import get, names, reads

RATE, METHOD = "learning_rate", "method"
LOWEST_RANK, MIDDLE_RANK = 4, 8  # of the ranks that are searched by default
Values = Mapping[str, tuple[str, ...]]
Options = tuple[tuple[str, str], ...]
"""A configuration: what it sets, beside what the user gave; () is the command line as given."""


def bilora_form() -> Options:
    """Bi-LoRA with the options that little data asks for."""
    return ((METHOD, "bilora"), *get("bilora").search_options.items())


def words(options: Options) -> list[str]:
    """The options as arguments."""
    return [word for name, value in options for word in (f"--{name}", value)]


def title(options: Options) -> str:
    """The options as a reader sees them: "bilora (rho auto), rate 0.0004, rank 8"."""
    values = {"rate" if name == RATE else name: value for name, value in options}
    method = values.pop(METHOD, "")
    form = ", ".join(f"{n} {values.pop(n)}" for n in ("rho", "auxiliaries") if n in values)
    first = f"{method} ({form})" if method and form else method or form
    rest = (name if value == "true" else f"{name} {value}" for name, value in values.items())
    return ", ".join(filter(None, (first, *rest))) or "as given"


@dataclass(frozen=True)
class Space:
    """Options and the values that each may have."""

    values: Values  # in the order in which they are searched

    def configuration(self, values: Mapping[str, str]) -> Options:
        """Values as a configuration, without the options that its method does not read."""
        method = values.get(METHOD, "")
        idle = {o for n in names() for o in reads(n) - reads(method)} if method in names() else ()
        return tuple(pair for pair in values.items() if pair[0] not in idle)

    def all(self, most: float) -> list[Options]:
        """Every configuration once; none if there are more than ``most``."""
        few = math.prod(map(len, self.values.values())) <= most
        rows = itertools.product(*self.values.values()) if few else ()
        return [*{self.configuration(dict(zip(self.values, row, strict=True))): 0 for row in rows}]

    def starts(self) -> list[Options]:
        """The middle of the space for each method."""
        middle = {name: values[(len(values) - 1) // 2] for name, values in self.values.items()}
        return self.along(METHOD, tuple(middle.items()))

    def along(self, name: str, start: Options) -> list[Options]:
        """A configuration with each value of one option; alone where the space lacks that."""
        rows = [{name: value} for value in self.values.get(name, ())] or [{}]
        return [self.configuration({**dict(start), **row}) for row in rows]

    def axes(self) -> list[str]:
        """The options with several values, the rate first; the method is none of them."""
        several = (name for name, values in self.values.items() if len(values) > 1)
        return sorted((name for name in several if name != METHOD), key=lambda name: name != RATE)

    def beyond(self, starts: Iterable[Options], tried: Collection[Options]) -> Iterator[Options]:
        """The next rate beyond those tried, where a configuration is at an edge of them."""
        for start in starts:
            rate, others = float(dict(start)[RATE]), {**dict(start), RATE: ""}
            near = {float(dict(o)[RATE]) for o in tried if {**dict(o), RATE: ""} == others}
            if len(near) > 1 and rate in (min(near), max(near)):
                second, most = sorted(set(map(float, self.values[RATE])))[-2:]
                further = rate * (most / second if rate == max(near) else second / most)
                yield self.configuration({**others, RATE: f"{further:.6g}"})


def default_values(typed: Collection[str], rate: float, rank: int, supports_sample: bool) -> Values:
    """The space of a fit without a file; what the user typed is fixed, but for the rate.

    Args:
        typed: options on the command line.
        rate: learning rate of the command or its recipe, the middle of the rates.
        rank: rank of the recipe, or the default.
        supports_sample: whether each sample can have its own auxiliary.
    """
    form = {name: (value,) for name, value in bilora_form() if supports_sample or value != SAMPLE}
    forms = form | {METHOD: ("lora", "bilora")}
    rates = tuple(f"{rate * by:.6g}" for by in (0.5, 1.0, 2.0))
    # Below 4, the default of images, nothing is searched: it is the lowest of its three ranks.
    middle = MIDDLE_RANK if rank == LOWEST_RANK else rank
    ranks = {max(1, middle // 2), middle, min(2 * middle, RANKS.most)}
    values = {**({} if METHOD in typed else forms), RATE: rates}
    values["rank"] = tuple(str(rank) for rank in sorted(ranks))
    return {name: own for name, own in values.items() if name == RATE or name not in typed}


def read_values(path: Path, searchable: Collection[str]) -> Values:
    """Read a file of values, option -> value or list of values, of ``searchable`` options."""
    what = f'the space "{path}"'
    loaded = read_options(path, what, "--fit_space")
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f'{what} has no options: write lines like "rank: [4, 8]".')
    space = {}
    for name, given in loaded.items():
        values = given if isinstance(given, list) else [given]
        if name not in searchable:
            raise UserError(
                f'{what} has "{name}"{did_you_mean(name, searchable)}, which is no option or the'
                " same for all runs of a fit: name options of methods, adapters or the optimizer."
            )
        if not values or not all(isinstance(v, bool | str) and v != "" for v in values):
            raise UserError(f"{what}, {name} has something else than values: write [4, 8].")
        space[name] = (*{str(v).lower() if isinstance(v, bool) else v: 0 for v in values},)
    return space
