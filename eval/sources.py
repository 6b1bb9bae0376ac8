"""What one word names: a run folder, a file of an adapter, one on the hub, or the base model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bilora_diffusion import methods
from bilora_diffusion.lora_names import ADAPTER_METADATA
from bilora_diffusion.errors import UserError, did_you_mean
from bilora_diffusion.export import FILE_NAME, inspect
from bilora_diffusion.run.folder import RUN, read_run

from .provenance import without_paths
from .subjects import BASE, Subject

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ACTING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""What of PEFT's configuration changes how the tensors act."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
logger = logging.getLogger(__name__)


def find(word: str) -> Subject:
    """What ``word`` names, with its weights and their digest.

    Its label is what to call it, its group its method's title.

    Raises:
        UserError: nothing is there, it holds no adapter, a run left no weights, or the hub refuses.
    """
    if word == BASE:
        return Subject(BASE, "base model", BASE, BASE)
    path = Path(word).expanduser()
    if path.is_dir():
        return _folder(path, word)
    if path.is_file():
        # the folder's name where the file has the name that all have
        name = path.resolve().parent.name if path.name == FILE_NAME else path.stem
        return _file(path, "file", name, word)
    repository, _, weight_name = word.partition(":")
    parts = repository.split("/")
    if word.startswith((".", "/", "~")) or "\\" in word or len(parts) > 2:
        raise UserError(f'there is no run folder and no file "{word}": correct the path.')
    if len(parts) < 2:
        raise UserError(
            f'"{word}" is no run folder, LoRA file or hub id (owner/name)'
            f"{did_you_mean(word, [BASE])}: correct it."
        )
    owner = Path(parts[0])
    if owner.is_dir():  # a folder of ours, not an account: the hub is not asked
        near = [f"{owner.name}/{entry.name}" for entry in owner.iterdir() if entry.is_dir()]
        hint = did_you_mean(repository, near)
        raise UserError(f'there is no run folder and no file "{word}"{hint}: correct the path.')
    return _hub(repository, weight_name or None, word)


def run(folder: Path, word: str) -> Subject:
    """A run folder as it is, without a look at its weights.

    Raises:
        UserError: it is none, or an unknown method's.
    """
    record = read_run(folder)
    config: Mapping[str, Any] = record.get("config") or {}
    method = methods.get(str(record.get("method")))
    base = config.get("pretrained_model_name_or_path") or config.get("model_name_or_path")
    return Subject(
        label=folder.resolve().name,
        group=method.title,
        source=without_paths(word),
        method=method.name,
        seed=record.get("seed"),
        base_model=base,
        folder=folder,
        record=record,
    )


def _folder(folder: Path, word: str) -> Subject:
    name = folder.resolve().name
    if (folder / RUN).is_file():
        return _weights_of(run(folder, word))
    if (folder / FILE_NAME).is_file():
        return _file(folder / FILE_NAME, "file", name, word)
    if (folder / PEFT_FILE).is_file():
        return _peft(folder, name, word)
    raise UserError(
        f"{word} is no run folder (it has no {RUN}) and holds neither {FILE_NAME} nor {PEFT_FILE}:"
        " give one, or name a .safetensors file in it."
    )


def _weights_of(subject: Subject) -> Subject:
    assert subject.folder is not None
    folder, status = subject.folder, subject.record.get("status")
    needed = _needed(subject)
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise UserError(
            f'{folder} is a run without {missing[0]} (its status is "{status}"): let it finish, or'
            " go on with --resume_from_checkpoint latest."
        )
    if not subject.finished:
        logger.warning(
            '%s has the status "%s": its weights are those of an earlier end.', folder, status
        )
    if needed == (FILE_NAME,):
        return _with(subject, folder / FILE_NAME, _digest_lora(folder / FILE_NAME))
    if PEFT_FILE in needed:
        return _with(subject, folder, _digest_peft(folder))
    return _with(subject, folder, _digest_models(folder, needed))


def _needed(subject: Subject) -> tuple[str, ...]:
    """What a run of its kind leaves."""
    whole = methods.get(str(subject.method)).exports_weights
    if subject.is_text:
        return ("model",) if whole else (PEFT_FILE, PEFT_CONFIG)
    if not whole:
        return (FILE_NAME,)
    encoders = ("text_encoder", "text_encoder_2") if subject.option("train_text_encoder") else ()
    return ("unet", *encoders)


def _with(subject: Subject, weights: Path, digest: str) -> Subject:
    return Subject(**{**vars(subject), "weights": weights, "digest": digest})


def _file(path: Path, kind: str, name: str, word: str, base_model: str | None = None) -> Subject:
    if path.suffix.lower() in _PICKLES:
        raise UserError(f"{path.name} may run code when it is read: give a .safetensors file.")
    metadata = inspect(path).metadata
    method = metadata.get("bilora.method")
    if base_model is None and method is not None:
        # Other tools write the name of a checkpoint file here, which nothing can be loaded by.
        base_model = metadata.get("ss_sd_model_name")
    known = method in methods.names()
    return Subject(
        label=name,
        group=(methods.get(str(method)).title if known else method) or name,
        kind=kind,
        source=without_paths(word),
        method=method,
        digest=_digest_lora(path),
        base_model=base_model,
        weights=path,
    )


def _peft(folder: Path, name: str, word: str) -> Subject:
    config = _peft_config(folder)
    base = config.get("base_model_name_or_path")
    return Subject(
        label=name,
        group=name,
        kind="file",
        source=without_paths(word),
        digest=_digest_peft(folder),
        base_model=base or None,
        weights=folder,
        about={"revision": config["revision"]} if config.get("revision") else {},
    )


def _peft_config(folder: Path) -> dict[str, Any]:
    path = folder / PEFT_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"{type(config)} is no mapping")
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no PEFT adapter (it has no {PEFT_CONFIG}): give another.") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: write it again.") from error
    return config


def _hub(repository: str, weight_name: str | None, word: str) -> Subject:
    import httpx
    from huggingface_hub import HfApi, ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # Its retries are told in a hundred lines, and what came of them in the one below.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise UserError(f'"{word}" names no .safetensors file: only such files are read.')
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
            f'"{word}" is neither here nor can it be had from the hub ({reason}): check the name,'
            " the connection and, for a private one, `hf auth login`."
        ) from error
    if isinstance(base, list):
        base = base[0] if base else None
    return _file(Path(path), "hub", repository.split("/")[-1], word, base or None)


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
    metadata = inspect(path).metadata
    try:
        described = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
        acting = {k: v for k, v in described.items() if k.rpartition(".")[2] in _ACTING}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} has damaged metadata: write or download it again.") from error
    return _digest([("", path)], acting)


def _digest_peft(folder: Path) -> str:
    acting = {k: v for k, v in _peft_config(folder).items() if k in _ACTING}
    return _digest([("", folder / PEFT_FILE)], acting)


def _digest_models(folder: Path, names: Sequence[str]) -> str:
    files = []
    for name in names:
        parts = sorted((folder / name).glob("*.safetensors"))
        if not parts:
            raise UserError(f"{folder / name} has no .safetensors file: train again.")
        files += [(name, part) for part in parts]
    return _digest(files)


def _digest(files: Sequence[tuple[str, Path]], acting: Mapping[str, Any] | None = None) -> str:
    """Of name, dtype, shape and bytes of each tensor, one at a time; other metadata plays no part.

    Returns:
        64 hexadecimal digits.
    """
    state = hashlib.sha256()
    if acting is not None:
        state.update(json.dumps(acting, sort_keys=True).encode())
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
    return state.hexdigest()
