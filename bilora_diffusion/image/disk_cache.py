"""A cache of latents and prompt embeddings on disk, for later runs on the same images.

Each entry is a safetensors file. Its name is a hash of everything that its content depends on: the
input, the weights and the machine. A file is therefore never out of date, and the folder can be
deleted at any time.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.durable import replacing
from ..core.files import hash_of_file
from ..core.seeds import digest, digest_texts
from .config import DreamBoothConfig

# Increase this number when the values under a key change, so that earlier files are not read.
FORMAT = "2"
_SHA256 = re.compile("[0-9a-f]{64}")
logger = logging.getLogger(__name__)


class DiskCache:
    """A cache of tensors by key; several processes can read and write its files at the same time.

    Args:
        folder: folder of the files, created with the first file; None caches nothing.
        facts: texts that all tensors depend on, in addition to their keys.
    """

    def __init__(self, folder: Path | None = None, facts: Sequence[str] = ()) -> None:
        self.folder = folder
        self._facts = [FORMAT, *facts]
        self._is_writable = True

    def get(self, *key: str) -> dict[str, Tensor] | None:
        """Return the tensors under a key; None if the file is missing, damaged or renamed."""
        if self.folder is None:
            return None
        name, file = self._file(self.folder, key)
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {part: content.get_tensor(part) for part in content.keys()}  # noqa: SIM118
                metadata = content.metadata()
        except (OSError, SafetensorError, ValueError):
            return None
        # safetensors does not detect flipped bits.
        if metadata != _metadata(name, tensors):
            return None
        return tensors

    def put(self, tensors: Mapping[str, Tensor], *key: str) -> None:
        """Cache tensors under a key. If that fails, warn once and cache nothing more."""
        if self.folder is None or not self._is_writable:
            return
        name, file = self._file(self.folder, key)
        contiguous = {part: values.contiguous() for part, values in tensors.items()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # The temporary name is unique, since another process may be writing the same tensors.
            with replacing(file, f".{uuid.uuid4().hex}") as aside:
                save_file(contiguous, aside, metadata=_metadata(name, contiguous))
        except (OSError, SafetensorError) as error:
            self._is_writable = False
            logger.warning(
                "%s can't be written (%s), so the next run will encode again: free space there, or"
                " give another --disk_cache.",
                self.folder,
                error,
            )

    def _file(self, folder: Path, key: Sequence[str]) -> tuple[str, Path]:
        """Return the name and the path of a key's file."""
        name = digest_texts([*self._facts, *key])
        # Files are spread over 256 folders, so that no folder has too many.
        return name, folder / name[:2] / f"{name}.safetensors"


def _metadata(name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a file: a hash of its name and content."""
    parts = sorted(tensors)  # tensors that are read from a file have another order
    content = digest(*(tensors[part] for part in parts))
    return {"hash": digest_texts([name, *parts, content])}


def prompt_cache(
    cfg: DreamBoothConfig, family: Any, pipeline: Any, device: torch.device
) -> DiskCache:
    """Return the cache of a run's prompt embeddings."""
    if cfg.cache is None:
        return DiskCache()
    encoders = [name for name in family.encoders if getattr(pipeline, name) is not None]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    # SDXL's frozen encoders are not quantized.
    quantization = cfg.quantize if family.flow else "none"
    # Everything that determines an embedding: settings, encoders, their weights and the machine.
    facts = [family.pipeline, str(family.max_sequence_length), quantization]
    facts += [str(getattr(pipeline, name).dtype) for name in encoders]
    try:
        facts.append(hash_files(pipeline.origin.folder / part for part in encoders + tokenizers))
    except OSError:
        return DiskCache()  # loading the encoders will report the error
    index = dict(pipeline.config)
    index.pop("_name_or_path", None)  # the pipeline's path does not matter
    facts.append(repr(index))
    facts += _machine_facts(cfg, device)
    return DiskCache(cfg.cache / "prompts", facts)


def latent_cache(cfg: DreamBoothConfig, space: Any, vae: Any, device: torch.device) -> DiskCache:
    """Return the cache of a run's latents."""
    if cfg.cache is None:
        return DiskCache()
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    state = vae.state_dict()
    # Everything that determines a latent: how images are read, the autoencoder and the machine.
    facts = [str(space.samples_posterior), cfg.image_interpolation_mode, version("pillow")]
    facts += [type(vae).__name__, json.dumps(config, default=str, sort_keys=True)]
    facts += [*state, digest(*state.values())]
    facts += _machine_facts(cfg, device)
    return DiskCache(cfg.cache / "latents", facts)


def hash_files(folders: Iterable[Path]) -> str:
    """Return a hash of the names and contents of all files in some folders.

    Weight files in the hub's cache are not read: each is a link to a blob that is named by its
    SHA-256 hash.

    Raises:
        OSError: a file can't be read.
    """
    texts = []
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files):
            blob = path.resolve()
            content_hash = blob.name
            if blob.parent.name != "blobs" or not _SHA256.fullmatch(content_hash):
                content_hash = hash_of_file(path)
            texts += [folder.name, str(path.relative_to(folder)), content_hash]
    return digest_texts(texts)


def _machine_facts(cfg: DreamBoothConfig, device: torch.device) -> list[str]:
    """Return the properties of machine and libraries that change the last digits of an encoding."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = torch.backends.cpu.get_cpu_capability()
    versions = [torch.__version__, version("diffusers"), version("transformers")]
    return [*versions, device.type, processor, str(cfg.allow_tf32)]
