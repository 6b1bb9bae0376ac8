"""Models of transformers for scorers and captioners, from the hub or from a folder.

Weights are read as safetensors and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilora_diffusion.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TransformersParts:
    """A model of transformers with what belongs to it.

    Args:
        model: float32, eval mode.
        processor: for its images and texts.
        source: the hub id or the folder's name, for tables.
        revision: the hub's commit, or a digest of local files.
    """

    model: Any
    processor: Any
    source: str
    revision: str


def digest(*files: Path) -> str:
    """The first 12 hex digits of the SHA-256 of a file, or of the digests of several."""
    sums = []
    for path in files:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    whole = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    return whole[:12]


def transformers_parts(
    model_class: Any,
    processor_class: Any,
    scheme: str,
    source: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
) -> TransformersParts:
    """A model and its processor from a hub id or a folder, all from one commit.

    Args:
        model_class: of transformers; the configuration has to be of its type.
        scheme: "hf" or "blip"; for messages.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: no such id or folder, another kind of model, no safetensors, or files that are
            missing or do not fit.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils.hub import cached_file

    name = f"{scheme}:{source}"
    folder = existing_folder(name, source)
    if folder is not None:
        _check_transformers_folder(name, folder, revision)
    place = source if folder is None else str(folder)
    options: dict[str, Any] = {"revision": revision, "local_files_only": folder is not None}
    try:
        file = Path(str(cached_file(place, "config.json", **options)))
        options["revision"] = commit = hub_commit(file) or revision
        _check_type(name, file, model_class.config_class.model_type)
        processor = processor_class.from_pretrained(place, trust_remote_code=False, **options)
        model, info = model_class.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f'"{name}" cannot be loaded ({reason(error)}): check its name, its files and the'
            " connection to the hub."
        ) from error
    _check_loaded(name, processor, info)
    if folder is not None:
        source, commit = folder.resolve().name, digest(*sorted(folder.glob("*.safetensors")))
    return TransformersParts(model.to(device).eval(), processor, source, str(commit))


def _check_transformers_folder(name: str, folder: Path, revision: str | None) -> None:
    if revision is not None:
        raise UserError(
            f'revision "{revision}" has no effect on the folder of "{name}": drop it, or give a hub'
            " id."
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f'"{name}": the folder has no config.json: give one that save_pretrained made.'
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f'"{name}": the folder has no model.safetensors{pickle_hint(folder)}')


def _check_loaded(name: str, processor: Any, info: dict[str, Any]) -> None:
    check_vocabulary(name, processor.tokenizer)
    if info["missing_keys"]:  # transformers would score with random numbers in their place
        raise UserError(
            f'the weights of "{name}" are incomplete ({min(info["missing_keys"])} is missing): give'
            " another."
        )


def _check_type(name: str, file: Path, wanted: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != wanted:
        raise UserError(f'"{name}" is a model of type {found!r}, not {wanted!r}: give another.')


def check_vocabulary(name: str, tokenizer: Any) -> None:
    """Refuse the tokenizer that transformers makes, without a word, when its files are missing.

    Raises:
        UserError: it knows its special tokens and nothing else.
    """
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f'the tokenizer of "{name}" knows no words: put its files beside the weights.'
        )


def pickle_hint(folder: Path) -> str:
    """The end of a sentence about a folder without safetensors."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not pickles:
        return ": give a folder with config and weights."
    return f", and {pickles[0]} is a pickle, which can run code when it is read: convert it."


def existing_folder(name: str, source: str) -> Path | None:
    """``source`` as a folder, or None when it can only be a name.

    Raises:
        UserError: it is a file, or a path to nothing.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if path.is_file():
        raise UserError(f'"{name}" is a file: give the folder that holds it.')
    if source.startswith((".", "/", "~")) or not source or source.count("/") > 1:
        raise UserError(f'"{name}": there is no such folder: correct the path.')
    return None


def reason(error: BaseException) -> str:
    """The first line of an error's message, without its end mark."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__


def hub_commit(file: Path) -> str | None:
    """The commit of a file in the hub's cache; None for any other file."""
    from transformers.utils.hub import extract_commit_hash

    return extract_commit_hash(str(file), None)
