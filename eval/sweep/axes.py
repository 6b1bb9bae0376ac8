"""The words of ``--over``, ``--set`` and the file of variants, read, or refused for their form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilora_diffusion.config.recipe import read_options
from bilora_diffusion.core.errors import UserError

SEED = "seed"
MOST_VALUES = 10_000
OWN = ("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
Values = Mapping[str, Any]


def settings(words: Sequence[str], flag: str) -> dict[str, str]:
    """``name=value`` words as a mapping."""
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not (name and equals and value.strip()):
            raise UserError(f'{flag} has "{word}": write name=value.')
        if name in OWN:
            raise UserError(f'{flag} has "{name}", which the sweep decides: leave it out.')
        if name in values:
            raise UserError(f'{flag} gives "{name}" twice: keep one.')
        values[name] = value
    return values


def axes(words: Sequence[str]) -> dict[str, list[str]]:
    """``--over`` words: ``name=v1,v2`` or ``name=a..b`` (whole numbers, b included)."""
    given = settings(words, "--over").items()
    return {name: listed(text, f'--over has "{name}={text}"') for name, text in given}


def listed(text: str, shown: str) -> list[str]:
    """The values of ``v1,v2`` or ``a..b`` (whole numbers, b included).

    Args:
        shown: the beginning of a sentence about them.
    """
    values: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        ends = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})", part)
        span = range(int(ends[1]), int(ends[2]) + 1) if ends else ()
        if not part or (ends and not span):
            raise UserError(f"{shown}: write v1,v2 or a..b with a <= b.")
        if len(span) > MOST_VALUES:
            raise UserError(
                f"{shown}, which is {len(span)} runs or more: give at most {MOST_VALUES} values."
            )
        values += map(str, span) if ends else [part]
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UserError(f"{shown}, with {twice} twice: keep one.")
    return values


def load_variants(path: Path) -> dict[str, dict[str, Any]]:
    """A file of variants: a mapping from label to a mapping of options."""
    loaded = read_options(path, f'the file of variants "{path}"', "--arms")
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(
            f'--arms "{path}" holds no variants: write lines like "lora: {{method: lora}}".'
        )
    variants: dict[str, dict[str, Any]] = {}
    for label, options in loaded.items():
        options = {} if options is None else options
        scalar = isinstance(options, dict) and all(
            isinstance(value, bool | str) for value in options.values()
        )
        if not scalar:
            raise UserError(
                f'--arms "{path}": "{label}" is not a mapping of options to single values: write it'
                f' like "{label}: {{method: lora}}".'
            )
        named = {str(name).replace("-", "_"): value for name, value in options.items()}
        if wrong := [name for name in named if name in (SEED, *OWN)]:
            raise UserError(
                f'--arms "{path}": "{label}" sets {wrong[0]}, which is the same for all variants:'
                " leave it out, and give seeds by --over seed=0..4."
            )
        variants[str(label)] = named
    return variants
