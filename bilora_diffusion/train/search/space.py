"""Space of a search: the searched options and their values, as on a command line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...config.command_line import read_options
from ...core.errors import UserError, did_you_mean
from ...core.values import RANKS
from ...methods import names, reads

RATE, METHOD = "learning_rate", "method"
# Ranks that are searched by default, with the double of the second.
LOWEST_RANK, MIDDLE_RANK = 4, 8
# Option -> the values that are searched.
Values = Mapping[str, tuple[str, ...]]
# A configuration: (option, value) pairs that replace those of the command line; () is the command
# line as it is.
Candidate = tuple[tuple[str, str], ...]


def bilora_form(measure: str) -> Candidate:
    """Bi-LoRA as a search tries it: in the form that is best by what the search goes by.

    By samples no form is better than the paper's on all sets: where shapes must change, an
    auxiliary for each sample, whose held-out loss is the lowest, loses subjects (docs/results.md).
    """
    return ((METHOD, "bilora"),)


def arguments(candidate: Candidate) -> list[str]:
    """The options of a candidate as words of a command line."""
    words = []
    for name, value in candidate:
        words += [f"--{name}", value]
    return words


def title(candidate: Candidate) -> str:
    """Title of a candidate for a reader: "bilora (rho auto), rate 0.0004, rank 8"."""
    values = dict(candidate)
    method = values.pop(METHOD, "")
    # Options of the form of Bi-LoRA come after the method, in parentheses.
    form_parts = []
    for name in ("rho", "auxiliaries"):
        if name in values:
            form_parts.append(f"{name} {values.pop(name)}")
    form = ", ".join(form_parts)
    if method and form:
        form = f"({form})"
    parts = [f"{method} {form}".strip()]
    for name, value in values.items():
        label = "rate" if name == RATE else name
        parts.append(label if value == "true" else f"{label} {value}")
    return ", ".join(filter(None, parts)) or "as given"


@dataclass(frozen=True)
class Space:
    """Options and the values that each may have, in the order in which they are searched.

    Attributes:
        values: values of each option.
        extends_rates: True if the search may go on beyond the rates; False for a list of the user.
    """

    values: Values
    extends_rates: bool = True

    def candidate(self, values: Mapping[str, str]) -> Candidate:
        """Values as a candidate, without the options that its method does not read."""
        method = values.get(METHOD, "")
        ignored: set[str] = set()
        if method in names():
            for other_method in names():
                ignored |= reads(other_method) - reads(method)
        return tuple(pair for pair in values.items() if pair[0] not in ignored)

    def grid(self, limit: float) -> list[Candidate]:
        """All candidates, each once; none if there are more than `limit` combinations."""
        # Counted first, since the product of a large space may not fit into memory.
        if math.prod(len(values) for values in self.values.values()) > limit:
            return []
        rows = itertools.product(*self.values.values())
        candidates = [self.candidate(dict(zip(self.values, row, strict=True))) for row in rows]
        # Combinations that differ only in an option that their method does not read are equal.
        return list(dict.fromkeys(candidates))

    def starts(self) -> list[Candidate]:
        """The middle of the space, for each method."""
        # Of two middle values the lower one.
        middle = {name: values[(len(values) - 1) // 2] for name, values in self.values.items()}
        return self.variants(METHOD, tuple(middle.items()))

    def variants(self, name: str, start: Candidate) -> list[Candidate]:
        """A candidate with each value of an option; the candidate itself if the space lacks it."""
        if not self.values.get(name):
            return [self.candidate(dict(start))]
        return [self.candidate({**dict(start), name: value}) for value in self.values[name]]

    def axes(self) -> list[str]:
        """The options with several values but the method, the rate first."""
        axes = [name for name, values in self.values.items() if len(values) > 1 and name != METHOD]
        # So the other options are compared at a rate that suits them.
        return sorted(axes, key=lambda name: name != RATE)

    def next_rates(
        self, starts: Iterable[Candidate], tried: Collection[Candidate]
    ) -> list[Candidate]:
        """The next rate beyond the tried ones, for each start whose rate is at their edge.

        It goes up or down by the factor between the two highest rates of the space. There is none
        in a space whose rates are not extended.
        """
        candidates: list[Candidate] = []
        if not self.extends_rates:
            return candidates
        for start in starts:
            rate = float(dict(start)[RATE])
            other_options = {**dict(start), RATE: ""}
            tried_rates = set()
            for candidate in tried:
                if {**dict(candidate), RATE: ""} == other_options:
                    tried_rates.add(float(dict(candidate)[RATE]))
            # A single rate is at no edge, since nothing shows in which direction the loss falls.
            if len(tried_rates) > 1 and rate in (min(tried_rates), max(tried_rates)):
                second, highest = sorted(set(map(float, self.values[RATE])))[-2:]
                is_up = rate == max(tried_rates)
                factor = highest / second if is_up else second / highest
                # A text of six digits, so that equal rates make equal candidates.
                candidates.append(self.candidate({**other_options, RATE: f"{rate * factor:.6g}"}))
        return candidates


def default_values(
    typed: Collection[str], rate: float, rank: int, bilora: Mapping[str, str]
) -> Values:
    """The space of a search without a file. All typed options but the rate are fixed.

    Args:
        typed: options on the command line.
        rate: learning rate of the command or its recipe, the middle of the rates.
        rank: rank of the recipe, or the default.
        bilora: options with which Bi-LoRA is tried.
    """
    values: dict[str, tuple[str, ...]] = {}
    if METHOD not in typed:
        values[METHOD] = ("lora", "bilora")
        for name, value in bilora.items():
            values[name] = (value,)
    # A typed rate is varied too, since the best rate differs by method and rank.
    values[RATE] = tuple(f"{rate * factor:.6g}" for factor in (0.5, 1.0, 2.0))
    # The default of images, 4, is the lowest of the three ranks and not the middle one.
    middle = MIDDLE_RANK if rank == LOWEST_RANK else rank
    ranks = {max(1, middle // 2), middle, min(2 * middle, RANKS.maximum)}
    values["rank"] = tuple(str(rank) for rank in sorted(ranks))
    return {name: row for name, row in values.items() if name == RATE or name not in typed}


def read_values(path: Path, searchable: Collection[str]) -> Values:
    """Read a file of values: option -> value or list of values.

    Args:
        path: file.
        searchable: options that can be searched.

    Raises:
        UserError: the file has no options, one that can't be searched, or something else than
            values.
    """
    file = f'the space "{path}"'
    loaded = read_options(path, file, "--fit_space")
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f'{file} has no options: write lines like "rank: [4, 8]".')
    space = {}
    for name, content in loaded.items():
        values = content if isinstance(content, list) else [content]
        if name not in searchable:
            raise UserError(
                f'{file} has "{name}"{did_you_mean(name, searchable)}, which is no option or the'
                " same for all runs of a fit: name options of methods, adapters or the optimizer."
            )
        if not values or not all(isinstance(v, bool | str) and v != "" for v in values):
            raise UserError(f"{file}, {name} has something else than values: write [4, 8].")
        # True in the file is "true" on a command line.
        words = []
        for value in values:
            words.append(str(value).lower() if isinstance(value, bool) else value)
        space[name] = tuple(dict.fromkeys(words))
    return space
