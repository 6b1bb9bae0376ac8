"""What an argument names: a run folder, a LoRA file, a file on the hub, or the base model alone."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bilora_diffusion import methods
from bilora_diffusion.errors import UserError, did_you_mean
from bilora_diffusion.export import FILE_NAME, inspect
from bilora_diffusion.lora_names import ADAPTER_METADATA
from bilora_diffusion.run import runlog

BASE = "base"
_ACTING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""What of PEFT's configuration changes how the tensors act."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What an argument names.

    Args:
        kind: "base", "run", "file" or "hub".
        name: what to call it where the method says nothing or is not enough.
        method: of training, where known.
        digest: of the weights and what changes how they act; "" for the base model.
        weights: a LoRA file, or the folder of whole models; None for the base model.
        base_model: hub id or folder of the pipeline that was trained, where known.
    """

    kind: str
    name: str
    method: str | None = None
    digest: str = ""
    weights: Path | None = None
    base_model: str | None = None


def find(argument: str) -> Source:
    """What ``argument`` names.

    Raises:
        UserError: nothing is there, it holds no LoRA, a run left no weights, or the hub refuses.
    """
    if argument == BASE:
        return Source(BASE, "base model")
    path = Path(argument).expanduser()
    if path.is_dir():
        return _folder(path, argument)
    if path.is_file():
        return _file(path, "file", _file_name(path))
    repository, _, weight_name = argument.partition(":")
    parts = repository.split("/")
    if argument.startswith((".", "/", "~")) or "\\" in argument or len(parts) > 2:
        raise UserError(f'there is no run folder and no file "{argument}": correct the path.')
    if len(parts) < 2:
        raise UserError(
            f'"{argument}" is no run folder, LoRA file or hub id (owner/name)'
            f"{did_you_mean(argument, [BASE])}: correct it."
        )
    owner = Path(parts[0])
    if owner.is_dir():  # a folder of ours, not an account: the hub is not asked
        near = [f"{owner.name}/{found.name}" for found in owner.iterdir() if found.is_dir()]
        hint = did_you_mean(repository, near)
        raise UserError(f'there is no run folder and no file "{argument}"{hint}: correct the path.')
    return _hub(repository, weight_name or None)


def _folder(folder: Path, argument: str) -> Source:
    name = folder.resolve().name
    if not (folder / runlog.RUN).is_file():
        if (folder / FILE_NAME).is_file():
            return _file(folder / FILE_NAME, "file", name)
        raise UserError(
            f"{argument} is no run folder (it has neither {runlog.RUN} nor {FILE_NAME}): give one,"
            " or name a .safetensors file in it."
        )
    record = runlog.read_run(folder)
    method = methods.get(str(record.get("method")))
    config: dict[str, Any] = record.get("config") or {}
    wanted = _wanted(method.exports_weights, bool(config.get("train_text_encoder")))
    if missing := [part for part in wanted if not (folder / part).exists()]:
        raise UserError(
            f'{argument} is a run without {missing[0]} (its status is "{record.get("status")}"):'
            " let it finish, or go on with --resume_from_checkpoint latest."
        )
    if record.get("status") != "finished":
        logger.warning(
            '%s has the status "%s": its weights are those of an earlier end.',
            argument,
            record.get("status"),
        )
    base = config.get("pretrained_model_name_or_path")
    if method.exports_weights:
        return Source("run", name, method.name, _digest_models(folder, wanted), folder, base)
    file = folder / FILE_NAME
    return Source("run", name, method.name, _digest_lora(file), file, base)


def _wanted(whole: bool, text: bool) -> Sequence[str]:
    if not whole:
        return (FILE_NAME,)
    return runlog.WHOLE_MODELS if text else runlog.WHOLE_MODELS[:1]


def _file_name(path: Path) -> str:
    """The file's stem, or its folder's name where the file has the name that all have."""
    return path.resolve().parent.name if path.name == FILE_NAME else path.stem


def _file(path: Path, kind: str, name: str, base_model: str | None = None) -> Source:
    if path.suffix.lower() in _PICKLES:
        raise UserError(f"{path.name} may run code when it is read: give a .safetensors file.")
    metadata = inspect(path).metadata
    method = metadata.get("bilora.method")
    if base_model is None and method is not None:
        # Other tools write the name of a checkpoint file here, which nothing can be loaded by.
        base_model = metadata.get("ss_sd_model_name")
    return Source(kind, name, method, _digest_lora(path), path, base_model)


def _hub(repository: str, weight_name: str | None) -> Source:
    import httpx
    from huggingface_hub import HfApi, ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # Its retries are told in a hundred lines, and what came of them in the one below.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    shown = repository if weight_name is None else f"{repository}:{weight_name}"
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise UserError(f'"{shown}" names no .safetensors file: only such files are read.')
    try:
        try:
            path = hf_hub_download(repository, weight_name or FILE_NAME)
        except EntryNotFoundError:
            if weight_name is not None:
                raise
            path = hf_hub_download(repository, _only(repository, HfApi().list_repo_files))
        try:
            base: Any = ModelCard.load(repository).data.get("base_model")
        except (EntryNotFoundError, ValueError):
            base = None
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f'"{shown}" is neither here nor can it be had from the hub ({reason}): check the name,'
            " the connection and, for a private one, `hf auth login`."
        ) from error
    if isinstance(base, list):
        base = base[0] if base else None
    return _file(Path(path), "hub", repository.split("/")[-1], base or None)


def _only(repository: str, list_files: Any) -> str:
    files = [name for name in list_files(repository) if name.endswith(".safetensors")]
    if len(files) != 1:
        inside = ", ".join(files) or "none"
        raise UserError(
            f"{repository} has no {FILE_NAME} and {len(files)} other .safetensors files"
            f" ({inside}): name one as {repository}:FILE.safetensors."
        )
    return files[0]


def _digest_lora(path: Path) -> str:
    state = hashlib.sha256()
    metadata = inspect(path).metadata
    try:
        described = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
        acting = {k: v for k, v in described.items() if k.rpartition(".")[2] in _ACTING}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} has damaged metadata: write or download it again.") from error
    state.update(json.dumps(acting, sort_keys=True).encode())
    _digest_tensors(state, [("", path)])
    return state.hexdigest()


def _digest_models(folder: Path, names: Iterable[str]) -> str:
    state = hashlib.sha256()
    for name in names:
        files = sorted((folder / name).glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder / name} has no .safetensors file: train again.")
        _digest_tensors(state, [(name, file) for file in files])
    return state.hexdigest()


def _digest_tensors(state: Any, files: Iterable[tuple[str, Path]]) -> None:
    """Add name, dtype, shape and bytes of each tensor, one at a time; metadata plays no part."""
    for prefix, path in files:
        try:
            with safe_open(path, framework="pt") as content:
                for key in sorted(content.keys()):
                    tensor = content.get_tensor(key).contiguous()
                    shape = tuple(tensor.shape)
                    state.update(f"{prefix}/{key} {tensor.dtype} {shape}\n".encode())
                    state.update(tensor.reshape(-1).view(torch.uint8).numpy())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}): write or download it again."
            ) from error
