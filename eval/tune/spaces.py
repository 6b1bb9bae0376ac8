"""What is searched: options, fixed or with a range, shared by all methods or a method's own.

    options: {max_train_steps: 300, validation_loss_steps: 25}
    shared:
      learning_rate: {log: [1e-4, 3e-3]}
      rank: {choice: [2, 4, 8]}
    methods:
      LoRA: {method: lora}
      Bi-LoRA: {method: bilora, rho: {log: [0.05, 5]}}

``log`` and ``uniform`` are distributions between two ends, ``choice`` is one of a few values, and
of ``grid`` every value is tried, with every value of the other grids. What a method says of an
option goes before what is shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion.config.recipe import read_options
from bilora_diffusion.errors import UserError, did_you_mean
from bilora_diffusion.seeds import seed_of

from ..sweep.axes import OWN, SEED, Values

GRID = "grid"
PARTS = ("options", "shared", "methods")
KINDS = ("log", "uniform", "choice", GRID)
DIGITS = 3
"""Significant digits of a drawn number, so that a command line can be read."""


@dataclass(frozen=True)
class Range:
    """What an option is drawn from.

    Args:
        kind: "log", "uniform", "choice" or "grid".
        values: the two ends, or what is chosen from.
    """

    kind: str
    values: tuple[Any, ...]

    def at(self, place: float) -> Any:
        """The value at ``place`` in [0, 1) of the distribution function."""
        if self.kind in ("choice", GRID):
            return self.values[int(place * len(self.values))]
        low, high = map(float, self.values)
        if self.kind == "log":
            drawn = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
        else:
            drawn = low + place * (high - low)
        return f"{drawn:.{DIGITS}g}"


@dataclass(frozen=True)
class Space:
    """A file of ranges, read.

    Args:
        options: of every run.
        shared: option -> value or range, for all methods.
        methods: label -> the same, for one method.
    """

    options: Values
    shared: Values
    methods: Mapping[str, Values]

    def of(self, methods: Sequence[str]) -> Space:
        """The space of some of its methods.

        Raises:
            UserError: it names no such method.
        """
        for label in methods:
            if label not in self.methods:
                raise UserError(
                    f'--methods has "{label}"{did_you_mean(label, self.methods)}, which the space'
                    f" does not name: use some of {', '.join(self.methods)}."
                )
        return replace(self, methods={label: self.methods[label] for label in methods})

    def grid_size(self, what: str) -> int | None:
        """How many trials the grids of each method make; None without grids.

        Raises:
            UserError: one method would be tried more often than another.
        """
        sizes = {
            method: math.prod(
                len(value.values)
                for value in {**self.shared, **own}.values()
                if isinstance(value, Range) and value.kind == GRID
            )
            for method, own in self.methods.items()
        }
        (first, size), *others = sizes.items()
        for other, its in others:
            if its != size:
                raise UserError(
                    f"{what} has a grid of {size} for {first} and of {its} for {other}: give each"
                    " method equally many."
                )
        return None if size == 1 else size

    def configuration(self, method: str, search_seed: int, trial: int) -> dict[str, Any]:
        """The options of one trial.

        A shared range gives the same value to all methods in the same trial, so that no method is
        luckier than another with it. A draw depends on nothing but the seed of the search, whose
        range it is, the option and the trial.
        """
        own = self.methods[method]
        drawn: dict[str, Any] = {}
        left = trial - 1
        for name, value in {**self.shared, **own}.items():
            if isinstance(value, Range) and value.kind == GRID:
                left, place = divmod(left, len(value.values))
                value = value.values[place]
            elif isinstance(value, Range):
                owner = method if name in own else ""
                value = value.at(seed_of(search_seed, "tune", owner, name, trial) / 2**63)
            drawn[name] = value
        return drawn


def load(path: Path) -> Space:
    """Read a file of ranges.

    Raises:
        UserError: it can't be read, or is none.
    """
    what = f'--space "{path}"'
    loaded = read_options(path, f'the space "{path}"', "--space")
    if not isinstance(loaded, dict) or not loaded.get("methods"):
        raise UserError(
            f'{what} names no methods: write lines like "methods: {{LoRA: {{method: lora}}}}".'
        )
    if unknown := [name for name in loaded if name not in PARTS]:
        raise UserError(
            f'{what} has "{unknown[0]}"{did_you_mean(unknown[0], PARTS)}: use {", ".join(PARTS)}.'
        )
    parts = {name: _mapping(loaded.get(name), f"{what}: {name}") for name in PARTS}
    for name, value in (fixed := _options(parts["options"], f"{what}: options")).items():
        if isinstance(value, Range):
            raise UserError(f'{what}: options has a range for "{name}": put it into shared.')
    methods = {
        label: _options(own, f'{what}: "{label}"') for label, own in parts["methods"].items()
    }
    return Space(fixed, _options(parts["shared"], f"{what}: shared"), methods)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"{what} is no mapping: write it like {{method: lora}}.")
    return value or {}


def _options(given: Any, what: str) -> dict[str, Any]:
    options = {}
    for name, value in _mapping(given, what).items():
        name = name.replace("-", "_")
        if name in (SEED, *OWN):
            raise UserError(f"{what} sets {name}, which the search decides: leave it out.")
        options[name] = _range(value, f"{what}, {name}") if isinstance(value, dict) else value
        if not isinstance(options[name], bool | str | Range):
            raise UserError(f"{what}, {name} is neither a value nor a range: write one of them.")
    return options


def _range(given: dict[str, Any], what: str) -> Range:
    kind, values = next(iter(given.items()), ("", None))
    if len(given) != 1 or kind not in KINDS or not isinstance(values, list):
        raise UserError(
            f"{what} is no range: write {{log: [1e-4, 1e-2]}}, {{uniform: [0, 0.2]}} or {{choice:"
            " [2, 4, 8]} or {grid: [2, 4, 8]}."
        )
    if kind not in ("choice", GRID):
        _check_ends(kind, values, what)
    if not values or not all(isinstance(value, bool | str) for value in values):
        raise UserError(f"{what} has something else than single values: list these.")
    return Range(kind, tuple(values))


def _check_ends(kind: str, values: list[Any], what: str) -> None:
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    least = 0 if kind == "log" else -math.inf
    if not least < low < high < math.inf:
        above = " above 0" if kind == "log" else ""
        raise UserError(f"{what} has no two ends: give a lower and a higher number{above}.")
