"""Cache of measurements beside the result, so that the same command goes on from there.

cache = Cache(folder, {"digest": subject.digest, "images": fingerprint})
value = cache.item(["sharpness", 0.05], measure)       # measured once
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilora_diffusion.core.durable import strict_json, write_text

FOLDER = "kept"


class Cache:
    """Values by key, each on the disk before the next one is made.

    One file of JSON lines in ``FOLDER`` for all that depends on the same: two commands that measure
    different subjects into one folder do not meet. What a kill tore off, or is damaged, is measured
    again.

    Args:
        folder: of the result.
        about: all that the values depend on beside their keys, as JSON can hold it: weights, base
            model, data, settings.
    """

    def __init__(self, folder: Path, about: Any) -> None:
        self._path = folder / FOLDER / f"{_digest(about)}.jsonl"
        self._values: dict[str, Any] = {}
        lines = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        # A whole line ends with a newline, so what follows the last one is torn off, or empty.
        whole_lines = [line for line in lines[:-1] if self._read(line)]
        if [*whole_lines, b""] != lines:
            text = b"".join(line + b"\n" for line in whole_lines)
            write_text(self._path, text.decode("utf-8"))

    def __contains__(self, key: Any) -> bool:
        return _digest(key) in self._values

    def get(self, key: Any) -> Any:
        """Value that :meth:`put` was given; None if nothing."""
        return self._values.get(_digest(key))

    def put(self, key: Any, value: Any) -> Any:
        """Keep a value that JSON can hold; returns it as it will be read back.

        A number that is not finite becomes None.
        """
        plain = strict_json({"key": key, "value": value})[0]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._values[_digest(key)] = plain["value"]
        return plain["value"]

    def item(self, key: Any, make: Callable[[], Any]) -> Any:
        """Value that is cached under a key, or that ``make`` returns now."""
        return self.get(key) if key in self else self.put(key, make())

    def _read(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            self._values[_digest(entry["key"])] = entry["value"]
        except (ValueError, KeyError, TypeError):
            return False
        return True


def _digest(value: Any) -> str:
    text = json.dumps(strict_json(value)[0], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
