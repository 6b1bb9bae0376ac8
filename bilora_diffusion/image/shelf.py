"""Latents and prompt embeddings on disk, so that a second run on the same images encodes nothing.

One file of safetensors for each, named by all that it depends on: what was encoded, by which
weights, and on what. So nothing is ever out of date, and the folder may be deleted at any time.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import identity
from ..durable import replacing
from ..seeds import digest_texts

FORMAT = "1"
"""Changes where the same key stands for other numbers, so that files of before are passed over."""
logger = logging.getLogger(__name__)


class Shelf:
    """Tensors by key, in files that several processes may read and write at a time.

    Args:
        folder: where they lie; it is made when the first one is put there. None keeps nothing.
        about: what all of them depend on beside their keys.
    """

    def __init__(self, folder: Path | None, *about: str) -> None:
        self.folder, self._about, self._takes = folder, (FORMAT, *about), True

    def get(self, *key: str) -> dict[str, Tensor] | None:
        """What was put under a key; None where nothing was, or the file is damaged."""
        if self.folder is None:
            return None
        name = self._name(key)
        try:
            with safe_open(self._file(self.folder, name), framework="pt") as file:
                tensors = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
                known = file.metadata() or {}
        except (OSError, SafetensorError, ValueError):
            return None
        # safetensors itself sees no wrong bit, and a file may have been renamed.
        return tensors if known == _marks(name, tensors) else None

    def put(self, tensors: Mapping[str, Tensor], *key: str) -> None:
        """Keep tensors under a key. What can't be written is said once, and nothing more is."""
        if self.folder is None or not self._takes:
            return
        name = self._name(key)
        file = self._file(self.folder, name)
        whole = {part: values.contiguous() for part, values in tensors.items()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Under a name of its own: another process may be writing the same.
            with replacing(file, f".{uuid.uuid4().hex}") as aside:
                save_file(whole, aside, metadata=_marks(name, whole))
        except (OSError, SafetensorError) as error:
            self._takes = False
            logger.warning(
                "%s can't be written (%s), so the next run encodes again: make room there, or give"
                " another --disk_cache.",
                *(self.folder, error),
            )

    def _name(self, key: tuple[str, ...]) -> str:
        return digest_texts((*self._about, *key))

    @staticmethod
    def _file(folder: Path, name: str) -> Path:
        return folder / name[:2] / f"{name}.safetensors"


def _marks(name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    return {"key": name, "xxh3": identity.of_tensors(tensors)}
