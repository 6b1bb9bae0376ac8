"""What is kept between two starts of the same command: whole measurements, and answers so far."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bilora_diffusion.durable import dump_json, strict_json, write_text
from bilora_diffusion.seeds import digest_texts

from ..records import typed
from .schema import Measured

FOLDER = "pieces"


def identity(about: Mapping[str, Any]) -> str:
    """A digest of all that a measurement depends on."""
    return digest_texts([json.dumps(about, sort_keys=True)])


class Store:
    """One file per run and benchmark, in ``FOLDER`` of the output folder.

    A file that was made under other circumstances, or is damaged, counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, about: Mapping[str, Any]) -> Measured | None:
        """What was measured under these circumstances; None if it was not."""
        try:
            record = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
            if record["identity"] != identity(about):
                return None
            return typed(Measured, record["measured"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, name: str, about: Mapping[str, Any], measured: Measured) -> None:
        """Keep a measurement."""
        record = {"identity": identity(about), "about": dict(about), "measured": asdict(measured)}
        write_text(self._folder / f"{name}.json", dump_json(strict_json(record)[0]))

    def journal(self, name: str, about: Mapping[str, Any]) -> Journal:
        """What is kept item by item under these circumstances."""
        return Journal(self._folder / f"{name}.jsonl", identity(about))


class Journal:
    """Values by key, each on the disk before the next one is made.

    Args:
        path: a file of JSON lines; one that begins with another identity is replaced.
        name: the identity.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.values: dict[str, Any] = {}
        head = json.dumps({"identity": name})
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if lines[:1] != [head]:
            write_text(path, head + "\n")
            return
        for line in lines[1:]:
            entry = json.loads(line)
            self.values[entry["key"]] = entry["value"]
        # what a kill tore off is written over
        write_text(path, "\n".join(lines) + "\n")

    def add(self, key: str, value: Any) -> None:
        """Keep a value."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.values[key] = value
