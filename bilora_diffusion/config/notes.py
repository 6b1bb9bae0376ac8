"""What is said about options before training: those without effect, and defaults worth a word.

An option that has no effect beside others is set aside with one line, as diffusers' script warns of
it or passes over it; refused is only what would give a wrong result (`refusals`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .conditions import said
from .fields import default_of, option_of

logger = logging.getLogger(__name__)


def set_aside(
    fields: Mapping[str, dataclasses.Field[Any]], values: Mapping[str, Any], given: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """Take back the options that have no effect, so that the run's record does not claim them.

    Args:
        fields: every option by name.
        values: theirs, completed.
        given: names of the options that the user gave.

    Returns:
        The values that hold, and a sentence for each option that was taken back.
    """
    kept, notes = dict(values), []
    for name, field in fields.items():
        default = default_of(field)
        if name not in given or values[name] == default:
            continue
        idle = next((idle for idle in option_of(field).idle if idle.when(values)), None)
        if idle is not None:
            kept[name] = values[idle.becomes] if idle.becomes else default
            fix = idle.fix.replace("`", "")
            notes.append(f"{said(name, values[name])} has no effect {idle.where}: {fix}.")
    return kept, notes


def tell(notes: Sequence[str]) -> None:
    """Log each note as a warning, in the main process only."""
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            logger.warning("%s", note)
