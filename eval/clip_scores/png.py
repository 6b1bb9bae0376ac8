"""One image on disk: a PNG that says what it was made from."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bilora_diffusion.durable import write_bytes
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.pipeline import resolve

CHUNK = "parameters"
VERSIONS = "versions"
"""The one entry that informs and determines nothing."""
_DAMAGED = (OSError, SyntaxError, ValueError, struct.error)


def write(path: Path, image: Image.Image, parameters: Mapping[str, Any]) -> None:
    """Write an image and its parameters in one piece: a crash leaves the file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    information, content = PngInfo(), BytesIO()
    information.add_text(CHUNK, json.dumps(dict(parameters), sort_keys=True))
    image.save(content, format="PNG", pnginfo=information)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): make room, or give another"
            " output folder."
        ) from error


def matches(path: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether a whole PNG with exactly these parameters is there; every byte is checked."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[CHUNK])
            image.verify()  # reads to the end and compares each chunk's checksum
        return record | {VERSIONS: 0} == json.loads(json.dumps({**parameters, VERSIONS: 0}))
    except (*_DAMAGED, KeyError, TypeError):
        return False


def read(path: Path) -> Image.Image:
    """The image, RGB, read to the end.

    Raises:
        UserError: it is not there or damaged.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except _DAMAGED as error:
        raise UserError(
            f"{path} is missing or damaged: the same command makes it again."
        ) from error


def base_digest(base_model: str) -> str | None:
    """Identifies the weights of a pipeline's folder; None for a hub id.

    The folder's name is not enough: the miniature changes with the package, and two folders may
    have one name.
    """
    folder = Path(resolve(base_model)).expanduser()
    if not folder.is_dir():
        return None
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
            state.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: state)  # goes on with it
    return state.hexdigest()
