"""Checkpoints: written whole or not at all, verified on load, restored bit for bit.

``RUN/checkpoints/step-N/`` holds

    adapters.safetensors    every adapter's tensors (the auxiliary too)
    optimizer.safetensors   the optimizer's tensors, by their place in its ``state_dict``
    state.json              the rest of that, and the scheduler's, scaler's and extra state
    digests.json            schema version, and SHA-256 of the other three

A checkpoint is written to ``.tmp-step-N``, flushed, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from ..core.durable import (
    TEMPORARY,
    discard,
    dump_json,
    readable_as,
    remove_leftovers,
    sync,
)
from ..core.errors import TrainingError, UserError, translated
from ..core.files import finite

SCHEMA_VERSION = 4
CHECKPOINTS, DIGESTS = "checkpoints", "digests.json"
ADAPTERS, OPTIMIZER, STATE = "adapters.safetensors", "optimizer.safetensors", "state.json"
FILES = (ADAPTERS, OPTIMIZER, STATE)
DEFAULT_BYTES = 2_000_000_000
"""Bytes of all checkpoints of a run where no limit is given, but for the newest two."""
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run. Loaded tensors are on the CPU, in the dtypes they were saved in."""

    step: int  # optimizer steps taken
    tensors: dict[str, Tensor]  # of the adapters
    optimizer: dict[str, Any]  # its ``state_dict``, as of the next two
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None  # None without fp16
    extra: dict[str, Any]  # what else the run needs (config, method state), as JSON has it


def save(folder: Path, state: Checkpoint) -> Path:
    """Write ``folder/checkpoints/step-N`` and return it; call it in one process only.

    Whatever interrupts it, the folder then holds the earlier checkpoints and at most a whole one of
    this step. Leftovers of interrupted saves are deleted first.

    Raises:
        TrainingError: when the disk refuses (full, read-only); earlier checkpoints stay.
        TypeError: for a value that could not be restored exactly.
    """
    root = Path(folder) / CHECKPOINTS
    final = root / f"step-{state.step}"
    temporary = final.with_name(TEMPORARY + final.name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        sync(root.parent)
        remove_leftovers(root)
        temporary.mkdir()
        try:
            _write(temporary, state)
            if final.exists():  # of a run that went on from an earlier one before
                discard(final)
            os.rename(temporary, final)
            sync(root)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"checkpoint {final} could not be written ({reason}): make room or rights for it and "
            "resume, earlier checkpoints are untouched"
        ) from error
    return final


def _write(folder: Path, state: Checkpoint) -> None:
    optimizer_rest, optimizer_tensors = split(state.optimizer)
    content = {
        "step": state.step,
        "scheduler": state.scheduler,
        "scaler": state.scaler,
        "extra": state.extra,
        "optimizer": optimizer_rest,
    }
    # Python's JSON writes NaN and infinities, and Prodigy's state has one.
    (folder / STATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, tensors in ((ADAPTERS, state.tensors), (OPTIMIZER, optimizer_tensors)):
        save_file(separate(tensors), folder / name, metadata={"format": "pt"})
    readable_as(folder / STATE, folder / ADAPTERS, folder / OPTIMIZER)
    hashes = {name: _hash_file(folder / name) for name in FILES}
    index = dump_json({"schema_version": SCHEMA_VERSION, "sha256": hashes})
    (folder / DIGESTS).write_text(index, encoding="utf-8")
    for name in (*FILES, DIGESTS, "."):
        sync(folder / name)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        UserError: when the folder is none, a file is missing, truncated or altered, or the schema
            version is unknown.
    """
    if not any((path / name).exists() for name in (DIGESTS, *FILES)):
        problem = "is not a checkpoint folder" if path.exists() else "does not exist"
        raise UserError(
            f"checkpoint {path} {problem}: give RUN/checkpoints/step-N, or start without resuming"
        )
    with unaltered(path, DIGESTS):
        index = json.loads(finite(path / DIGESTS).read_bytes())
        version, hashes = index["schema_version"], index["sha256"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path / DIGESTS} has schema version {version!r}, but this version of"
            f" bilora_diffusion reads {SCHEMA_VERSION}: resume with the version that wrote it,"
            " or start a new run in another folder"
        )
    for name in FILES:
        with unaltered(path, name):
            if _hash_file(path / name) != hashes[name]:
                raise ValueError("not what was written")
    # From here on the content is what was written, but a library of another version may refuse it.
    with unaltered(path):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        optimizer = join(state["optimizer"], _load_tensors(path / OPTIMIZER))
        return Checkpoint(
            step=state["step"],
            tensors=_load_tensors(path / ADAPTERS),
            optimizer=optimizer,
            scheduler=state["scheduler"],
            scaler=state["scaler"],
            extra=state["extra"],
        )


def _load_tensors(path: Path) -> dict[str, Tensor]:
    # Cloned: load_file returns views of the mapped file.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def unaltered(path: Path, name: str = ".") -> AbstractContextManager[None]:
    """Context of reading a checkpoint or one of its files; an error names it and the way out."""
    return translated(
        f"{path / name} can't be read", "resume from an earlier checkpoint, or start a new run"
    )


def _find_steps(root: Path) -> dict[int, Path]:
    """Checkpoint folders in ``root`` by step."""
    folders: dict[int, Path] = {}
    for entry in root.glob("step-*"):
        match = _NAME.fullmatch(entry.name)
        if match is not None and entry.is_dir():
            folders[int(match[1])] = entry
    return folders


def steps(folder: Path) -> list[int]:
    """Steps of which run ``folder`` holds checkpoints, in order."""
    return sorted(_find_steps(Path(folder) / CHECKPOINTS))


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in run ``folder``; None without one."""
    folders = _find_steps(Path(folder) / CHECKPOINTS)
    return folders[max(folders)] if folders else None


def default_limit(path: Path) -> int:
    """How many checkpoints of the size of this one a run keeps by default; at least 2."""
    # All of a run are equally large, since the optimizer has its moments from the first step on.
    size = sum(file.stat().st_size for file in path.iterdir())
    return max(2, DEFAULT_BYTES // size)


def prune(folder: Path, limit: int) -> list[int]:
    """Delete all but the newest ``limit`` checkpoints, of which there is at least 1.

    Returns:
        The steps of the deleted ones.
    """
    folders = _find_steps(Path(folder) / CHECKPOINTS)
    old_steps = sorted(folders)[:-limit]
    for step in old_steps:
        discard(folders[step])
    return old_steps


def resolve(folder: Path, value: str | Path | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint VALUE`` means in run ``folder``.

    Args:
        value: "latest" (there must be one), "auto" (the latest, or None to start afresh), the name
            of a checkpoint in ``folder`` ("step-100"), or the path of a checkpoint of any run;
            None gives None.

    Raises:
        UserError: there is none; the sentence lists those that exist.
    """
    if value is None:
        return None
    newest = latest(folder)
    if value == "auto" or (value == "latest" and newest is not None):
        return newest
    root = Path(folder) / CHECKPOINTS
    for path in (root / value, Path(value)):
        if path.is_dir():
            return path
    names = ", ".join(f"step-{step}" for step in steps(folder))
    existing = f"{root} holds {names}" if names else f"{root} holds none, use auto to start afresh"
    raise UserError(f"checkpoint {str(value)!r} does not exist: {existing}")


def require_same_settings(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: Set[str] = frozenset()
) -> None:
    """Refuse to go on under other settings. Tuples equal lists, NaN equals NaN, True is not 1.

    Args:
        saved: settings that the checkpoint was made with.
        current: those of this run.
        free: keys that may differ.

    Raises:
        UserError: names up to three differing keys with both values.
    """
    differences: list[str] = []
    for key in {**saved, **current}:
        saved_text, current_text = _describe_setting(saved, key), _describe_setting(current, key)
        if key not in free and saved_text != current_text:
            differences.append(f"{key} was {saved_text} and is {current_text}")
    if differences:
        listed = "; ".join(differences[:3])
        if len(differences) > 3:
            listed += f"; and {len(differences) - 3} more"
        raise UserError(
            f"the checkpoint is of another config ({listed}): use the same values to resume, or"
            " start a new run in another --output_dir"
        )


def _describe_setting(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], default=str) if key in settings else "not set"


@torch.no_grad()
def load_tensors(current: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into the parameters that they were taken from.

    Raises:
        UserError: a parameter is missing, superfluous, or of another shape.
    """
    for name in sorted(current.keys() | saved.keys()):
        saved_shape, current_shape = _describe_shape(saved, name), _describe_shape(current, name)
        if saved_shape != current_shape:
            raise UserError(
                f"the parameter '{name}' has shape {saved_shape} in the checkpoint and"
                f" {current_shape} in the model: resume with the run's own flags."
            )
    for name, parameter in current.items():
        parameter.copy_(saved[name])


def _describe_shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "none"


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON of a ``state_dict``, and its tensors by path, such as "state/0/exp_avg".

    Null stands in a tensor's place. Tuples come back as lists.

    Raises:
        TypeError: for a value that would not come back.
    """
    tensors: dict[str, Tensor] = {}

    def convert(value: Any, *keys: str) -> Any:
        path = "/".join(keys)
        if isinstance(value, Tensor):
            tensors[path] = value
            return None
        if isinstance(value, Mapping):
            return {str(key): convert(item, *keys, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [convert(item, *keys, str(index)) for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path} is a {type(value).__name__}, which JSON can't hold")

    return convert(state), tensors


def join(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The ``state_dict`` that `split` took apart; ``state`` is changed."""
    for path, tensor in tensors.items():  # "param_groups/0/betas/1": keys, and places in lists
        *keys, last_key = path.split("/")
        container: Any = state
        for key in keys:
            container = container[int(key) if isinstance(container, list) else key]
        container[int(last_key) if isinstance(container, list) else last_key] = tensor
    # JSON's keys are texts; an optimizer numbers its parameters.
    return {**state, "state": {int(number): moments for number, moments in state["state"].items()}}


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory.

    Raises:
        TypeError: for a tensor of a subclass (sharded, quantized), of which a part would be lost.
    """
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter):
            raise TypeError(f"{name} is a {type(tensor).__name__}, not a plain tensor")
    layout = torch.contiguous_format
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=layout)
        for name, tensor in tensors.items()
    }
