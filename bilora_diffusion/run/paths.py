"""Texts without the places of files on this machine, for whatever is shared or published."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SCHEMES = ("open_clip", "hf", "blip")
"""Of models in a folder (``hf:FOLDER``); another word before a colon may begin an address."""
_START = "|".join([r"(?<![\w./:~-])", *(rf"(?<=\b{scheme}:)" for scheme in _SCHEMES)])
_ABSOLUTE = re.compile(rf"(?:{_START})~?/(?:[^\s'\"<>|:,;()\[\]]+/)*([^\s'\"<>|:,;()\[\]/]+)/?")


def without_paths(text: str) -> str:
    """``text`` with each absolute path cut to its place in this repository, or to its last name."""
    for root in (ROOT, Path.cwd()):
        if root != Path(root.anchor):
            text = text.replace(f"{root}/", "")
    return _ABSOLUTE.sub(r"\1", text)
