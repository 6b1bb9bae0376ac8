"""Latents and prompt embeddings on disk, so that a second run on the same images encodes nothing.

One file of safetensors for each, named by a hash of all that it depends on: what was encoded, by
which weights, and on what. So nothing is ever out of date, and the folder may be deleted any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.durable import replacing
from ..core.seeds import digest, digest_texts
from .config import DreamBoothConfig

FORMAT = "2"
"""Changes where the same key stands for other numbers, so that earlier files are passed over."""
_SHA256 = re.compile("[0-9a-f]{64}")
logger = logging.getLogger(__name__)


class DiskCache:
    """Tensors by key, in files that several processes may read and write at a time.

    Args:
        folder: where they lie; it is made when the first one is put there. None caches nothing.
        about: what all of them depend on beside their keys.
    """

    def __init__(self, folder: Path | None = None, *about: str) -> None:
        self.folder, self._about, self._writable = folder, (FORMAT, *about), True

    def get(self, *key: str) -> dict[str, Tensor] | None:
        """Tensors under a key; None if there are none, or the file is damaged or another's."""
        if self.folder is None:
            return None
        name, file = self._file(self.folder, key)
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {part: content.get_tensor(part) for part in content.keys()}  # noqa: SIM118
                marks = content.metadata()
        except (OSError, SafetensorError, ValueError):
            return None
        # safetensors itself sees no wrong bit, and a file may have been renamed.
        return tensors if marks == _marks(name, tensors) else None

    def put(self, tensors: Mapping[str, Tensor], *key: str) -> None:
        """Cache tensors under a key. A folder that can't be written is warned of once."""
        if self.folder is None or not self._writable:
            return
        name, file = self._file(self.folder, key)
        contiguous = {part: values.contiguous() for part, values in tensors.items()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Under a name of its own: another process may be writing the same.
            with replacing(file, f".{uuid.uuid4().hex}") as aside:
                save_file(contiguous, aside, metadata=_marks(name, contiguous))
        except (OSError, SafetensorError) as error:
            self._writable = False
            logger.warning(
                "%s can't be written (%s), so the next run encodes again: make room there, or give"
                " another --disk_cache.",
                self.folder,
                error,
            )

    def _file(self, folder: Path, key: tuple[str, ...]) -> tuple[str, Path]:
        name = digest_texts((*self._about, *key))
        return name, folder / name[:2] / f"{name}.safetensors"


def _marks(name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Metadata of a file: a hash of its name and content."""
    parts = sorted(tensors)  # the file keeps no order
    content = digest(*(tensors[part] for part in parts))
    return {"hash": digest_texts([name, *parts, content])}


def of_prompts(
    cfg: DreamBoothConfig, family: Any, pipeline: Any, device: torch.device
) -> DiskCache:
    """The cache of what the text encoders of a run make of prompts."""
    if cfg.cache is None:
        return DiskCache()
    names = [name for name in family.encoders if getattr(pipeline, name) is not None]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in names]
    parts = names + tokenizers
    quantized = cfg.quantize if family.flow else "none"  # SDXL's encoders are not quantized
    # All that decides an embedding: settings, the encoders and their weights, the machine.
    facts = [family.pipeline, str(family.max_sequence_length), quantized]
    facts += [str(getattr(pipeline, name).dtype) for name in names]
    try:
        facts.append(hash_files(pipeline.origin.folder / part for part in parts))
    except OSError:
        return DiskCache()  # reading the encoders will be refused with the reason
    index = dict(pipeline.config)
    index.pop("_name_or_path", None)  # where it lies decides nothing
    facts.append(repr(index))
    facts += _machine(cfg, device)
    return DiskCache(cfg.cache / "prompts", *facts)


def of_latents(cfg: DreamBoothConfig, space: Any, vae: Any, device: torch.device) -> DiskCache:
    """The cache of what the autoencoder of a run makes of images."""
    if cfg.cache is None:
        return DiskCache()
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    state = vae.state_dict()
    # All that decides a latent: how images are read, the model and its weights, the machine.
    facts = [str(space.samples_posterior), cfg.image_interpolation_mode, version("pillow")]
    facts += [type(vae).__name__, json.dumps(config, default=str, sort_keys=True)]
    facts += [*state, digest(*state.values())]
    facts += _machine(cfg, device)
    return DiskCache(cfg.cache / "latents", *facts)


def hash_files(folders: Iterable[Path]) -> str:
    """Hash what the files of folders hold and what they are called, whatever their dates.

    A file in the hub's cache is known by its blob, which is named by its content already.

    Raises:
        OSError: a file can't be read.
    """
    texts = []
    for place in folders:
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            blob = path.resolve()  # in the hub's cache a file is a link to its blob
            content = blob.name
            if blob.parent.name != "blobs" or not _SHA256.fullmatch(content):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            texts += [place.name, str(path.relative_to(place)), content]
    return digest_texts(texts)


def _machine(cfg: DreamBoothConfig, device: torch.device) -> list[str]:
    """Facts of the machine that decide the last digits of what is encoded."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = torch.backends.cpu.get_cpu_capability()
    versions = [torch.__version__, version("diffusers"), version("transformers")]
    return [*versions, device.type, processor, str(cfg.allow_tf32)]
