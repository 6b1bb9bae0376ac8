"""LoRA files that options name as FILE or FILE:STRENGTH, with hashes of their content."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError, read_or_refuse
from ..core.files import hash_of_file, is_file, is_folder, quoted
from ..core.lora_names import FILE_NAME, WEIGHTS

# Options that name a LoRA file, and whether a strength may follow it.
LORA_OPTIONS = {"init_from": False, "assistant_lora": True, "sampling_lora": True}
SAMPLING_OPTION = "sampling_lora"  # its file is active only while images are generated
# Largest absolute value of a strength.
MAX_STRENGTH = 100.0


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file that an option names.

    Attributes:
        option: name of the option.
        path: the file.
        strength: factor on the file's change of the weights; 1 if the option takes no strength.
        sha256: SHA-256 hash of the file's content, in hexadecimal digits.
    """

    option: str
    path: Path
    strength: float
    sha256: str


def read_lora_sources(options: Mapping[str, Any]) -> dict[str, LoraSource]:
    """Return the LoRA files that a run's options name, by the option's name.

    Raises:
        UserError: a file does not exist or can't be read, or a strength is not a usable number.
    """
    sources: dict[str, LoraSource] = {}
    for option in LORA_OPTIONS:
        value = options.get(option)
        if value:
            sources[option] = parse_lora_source(option, value)
    return sources


def parse_lora_source(option: str, value: str) -> LoraSource:
    """Find the file of an option's value, FILE or FILE:STRENGTH, and hash it.

    Raises:
        UserError: there is no such file, it can't be read, or the strength is not a usable number.
    """
    place, strength = value, 1.0
    if LORA_OPTIONS[option]:
        place, strength = split_strength(option, value)
    return find_lora_source(option, place, strength)


def find_lora_source(option: str, place: str, strength: float = 1.0) -> LoraSource:
    """Find a LoRA file and hash it.

    ``place`` is the file, or a folder with a LoRA file for diffusers or PEFT, such as a run folder.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    path = Path(place).expanduser()
    if is_folder(path):
        files = [path / name for name in (FILE_NAME, WEIGHTS) if is_file(path / name)]
        if not files:
            raise UserError(
                f"--{option} {quoted(place)} is a folder without {FILE_NAME} or {WEIGHTS}: give"
                " a LoRA file."
            )
        path = files[0]
    if not is_file(path):
        raise UserError(
            f"--{option} {quoted(place)} is not a file: correct the path, or download it."
        )
    sha256 = read_or_refuse(
        f"--{option} {quoted(str(path))}", "check its permissions", lambda: hash_of_file(path)
    )
    return LoraSource(option, path, strength, sha256)


def split_strength(option: str, value: str) -> tuple[str, float]:
    """Split FILE[:STRENGTH] into the path and the strength, which is 1 by default.

    Raises:
        UserError: the strength is not finite, or its absolute value exceeds `MAX_STRENGTH`.
    """
    place, colon, ending = value.rpartition(":")
    try:
        strength = float(ending)
    except ValueError:
        return value, 1.0  # the colon belongs to the path, or there is none
    if not colon:  # the whole value is a path that looks like a number
        return value, 1.0
    if not math.isfinite(strength) or abs(strength) > MAX_STRENGTH:
        raise UserError(
            f"--{option} {quoted(value)} has the strength {ending}: give a number from"
            f" {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, where 1 applies the file unchanged."
        )
    return place, strength


def lora_facts(sources: Mapping[str, LoraSource]) -> dict[str, Any]:
    """Return each file's hash and strength for the record, so that a resume can compare them.

    The path is recorded as the option's value and may change, since a file may move.
    """
    facts: dict[str, Any] = {}
    for option, source in sources.items():
        facts[f"{option}_sha256"] = source.sha256
        if LORA_OPTIONS[option]:
            facts[f"{option}_strength"] = source.strength
    return facts


def recorded_facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `lora_facts` of files used in training, from a run's recorded options."""
    facts: dict[str, Any] = {}
    for option in LORA_OPTIONS:
        if option == SAMPLING_OPTION:
            continue
        for ending in ("sha256", "strength"):
            name = f"{option}_{ending}"
            if name in options:
                facts[name] = options[name]
    return facts
