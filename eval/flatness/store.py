"""What was measured of one set of weights, kept beside the result so that it is measured once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bilora_diffusion.durable import dump_json, strict_json, write_text
from bilora_diffusion.seeds import digest_texts

FOLDER = "measured"
VERSION = 1


class Store:
    """Parts by what they were measured with; written whole after each part.

    Args:
        folder: of the result.
        about: identifies weights, base model, images and loss, as JSON can hold it.
    """

    def __init__(self, folder: Path, about: Any) -> None:
        self._file = folder / FOLDER / f"{_digest(about)}.json"
        self._parts: dict[str, Any] = self._read()

    def get(self, part: Any) -> Any:
        """What :meth:`put` was given; None if nothing."""
        return self._parts.get(_digest(part))

    def put(self, part: Any, value: Any) -> Any:
        """Keep a value that JSON can hold; returns it as it will be read back."""
        kept, _ = strict_json(value)
        self._parts[_digest(part)] = kept
        self._file.parent.mkdir(parents=True, exist_ok=True)
        record = {"version": VERSION, "parts": self._parts}
        write_text(self._file, dump_json(record))
        return kept

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads(self._file.read_text(encoding="utf-8"))
            parts = record["parts"] if record["version"] == VERSION else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # nothing of use was kept, so that it is measured again
        return parts if isinstance(parts, dict) else {}


def _digest(value: Any) -> str:
    return digest_texts([json.dumps(strict_json(value)[0], sort_keys=True)])
