"""Where latents and prompt embeddings lie between runs."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from ..files import is_folder, quoted

AUTO, NO = "auto", "no"
NAME = "bilora-diffusion"


def folder(value: str) -> Path | None:
    """The folder that a ``--disk_cache`` means, which need not exist; None for none."""
    if value == NO:
        return None
    if value != AUTO:
        return Path(value).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / NAME


def check(value: str) -> None:
    """Refuse a folder that was asked for and can't be written; one by default is only missed.

    Raises:
        UserError: a file lies there, or it may not be written.
    """
    place = folder(value)
    if place is None or value == AUTO:
        return
    existing, shown = place, f"--disk_cache {quoted(value)}"
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not is_folder(existing):
        what = "is a file" if existing == place else f"lies below {existing}, which is a file"
        raise UserError(f"{shown} {what}: give a folder, auto, or no.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{shown} is not writable: change its permissions, give another, or no.")
