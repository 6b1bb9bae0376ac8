"""A folder sealed by the SHA-256 of its files, so that damage is found before anything is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from ..durable import dump_json, sync
from ..errors import UserError

SCHEMA_VERSION = 2
DIGESTS = "digests.json"


def seal(folder: Path, names: Collection[str]) -> None:
    """Flush the files ``names`` of ``folder`` to the disk and write their digests beside them."""
    digests = {name: _digest(folder / name) for name in names}
    (folder / DIGESTS).write_text(_text(digests), encoding="utf-8")
    for name in (*names, DIGESTS):
        sync(folder / name)
    sync(folder)


def verify(folder: Path, names: Collection[str], fix: str) -> None:
    """Check that ``folder`` holds exactly what :func:`seal` saw.

    Args:
        folder: a checkpoint.
        names: the files that belong to it.
        fix: what the user can do about a damaged one; ends every message.

    Raises:
        UserError: when it is no checkpoint, a file is missing, truncated or altered, or the schema
            version is unknown.
    """
    if not folder.exists():
        raise UserError(f"checkpoint {folder} does not exist: {fix}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a checkpoint folder: {fix}")
    if not any((folder / name).exists() for name in (DIGESTS, *names)):
        raise UserError(f"{folder} is not a checkpoint folder (it has no {DIGESTS}): {fix}")
    file = folder / DIGESTS
    with _read_as_sealed(file, fix):
        text = file.read_bytes().decode("utf-8")
        index = json.loads(text)
        version, digests = index["schema_version"], dict(index["sha256"])
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{file} has schema version {version!r}, but this version of bilora_diffusion reads"
            f" {SCHEMA_VERSION}: resume with the version that wrote it, or start a new run in"
            " another folder"
        )
    with _read_as_sealed(file, fix):
        if set(digests) != set(names) or text != _text(digests):
            raise ValueError("not what was written")
    for name, digest in digests.items():
        with _read_as_sealed(folder / name, fix):
            if _digest(folder / name) != digest:
                raise ValueError("not what was written")


@contextlib.contextmanager
def _read_as_sealed(file: Path, fix: str) -> Iterator[None]:
    """Within the context, whatever reading ``file`` raises becomes a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: {fix}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): {fix}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is truncated or altered: {fix}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(digests: dict[str, str]) -> str:
    own = hashlib.sha256(dump_json(digests).encode()).hexdigest()
    index = {"schema_version": SCHEMA_VERSION, "sha256": digests, "sha256_of_sha256": own}
    return dump_json(index)
