"""Comparison of a run's recorded options with the options of the run that resumes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from ..core.errors import UserError


def without_options(settings: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """Return the settings without ``names``, which each concept's options lose too."""
    remainder = {name: value for name, value in settings.items() if name not in names}
    if "concepts" in remainder:
        concepts = remainder["concepts"]
        remainder["concepts"] = [without_options(options, names) for options in concepts]
    return remainder


def require_same_settings(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: Set[str] = frozenset()
) -> None:
    """Check that a run resumes with the same settings.

    Args:
        saved: settings that the checkpoint was saved with.
        current: settings of this run.
        free: keys that may differ.

    Raises:
        UserError: a setting differs; the message names it.
    """
    differences = describe_differences(saved, current, free)
    if differences:
        raise UserError(
            f"the checkpoint has another config ({differences}): use the same values to resume,"
            " or start a new run in another --output_dir"
        )


def describe_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: Set[str] = frozenset()
) -> str:
    """Return up to three settings that differ, with both values; "" if all are equal.

    Settings are compared as JSON: a tuple equals a list, NaN equals NaN, and True is not 1.

    Args:
        saved: settings of the earlier run.
        current: settings of this run.
        free: keys that may differ.
    """
    differences: list[str] = []
    for key in {**saved, **current}:
        saved_text = _describe_setting(saved, key)
        current_text = _describe_setting(current, key)
        if key not in free and saved_text != current_text:
            differences.append(f"{key} was {saved_text} and is {current_text}")
    listed = "; ".join(differences[:3])
    if len(differences) > 3:
        listed += f"; and {len(differences) - 3} more"
    return listed


def _describe_setting(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "not set"
    return json.dumps(settings[key], default=str)
