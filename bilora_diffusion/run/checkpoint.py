"""Checkpoints: written atomically, verified on load, restored bit for bit.

``RUN/checkpoints/step-N/`` contains

    adapters.safetensors    all trained weights, including the auxiliary's, the initial factors of
                            PiSSA and LoRA-GA, and the best weights so far with --keep_best
    optimizer.safetensors   the optimizer's tensors, by their paths in its ``state_dict`` state.json
    the rest of that ``state_dict``, the step, the states of the schedule and
                            of the gradient scaler, and other state of the run
    digests.json            the schema version, and the SHA-256 hashes of the other three files

A checkpoint is written to ``.tmp-step-N``, flushed, and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
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
from ..core.errors import TrainingError, UserError, as_user_error
from ..core.files import hash_of_file, regular_file

SCHEMA_VERSION = 4
CHECKPOINTS = "checkpoints"
ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
DIGESTS = "digests.json"
# Files whose hashes are in `DIGESTS`.
FILES = (ADAPTERS, OPTIMIZER, STATE)
# Default limit for the size of all checkpoints of a run, in bytes; at least two are kept.
DEFAULT_BYTES = 2_000_000_000
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run. Loaded tensors are on the CPU, in the dtypes they were saved in.

    Attributes:
        step: number of optimizer steps taken.
        tensors: trained weights and other tensors of the run, by name.
        optimizer: ``state_dict`` of the optimizer.
        scheduler: ``state_dict`` of the learning rate's schedule.
        scaler: ``state_dict`` of the gradient scaler; None if the run does not use fp16.
        extra: other state of the run, such as its configuration, the record of its data and the
            method's state, as JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    extra: dict[str, Any]


def save(folder: Path, state: Checkpoint) -> Path:
    """Write ``folder/checkpoints/step-N`` and return its path; call this in one process only.

    If it is interrupted, earlier checkpoints stay intact, and the new one is either complete or
    missing. Remains of interrupted saves are deleted first.

    Raises:
        TrainingError: the disk is full or read-only; earlier checkpoints stay.
        TypeError: a value can't be restored exactly.
    """
    root = Path(folder) / CHECKPOINTS
    final = root / f"step-{state.step}"
    temporary = final.with_name(TEMPORARY + final.name)
    try:
        # Each `sync` ensures that a new folder survives a power failure.
        root.mkdir(parents=True, exist_ok=True)
        sync(root.parent)
        remove_leftovers(root)
        temporary.mkdir()
        try:
            _write(temporary, state)
            # A folder can only be renamed to an unused name.
            if final.exists():
                discard(final)
            os.rename(temporary, final)
            sync(root)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"checkpoint {final} could not be written ({reason}): free some space or correct the"
            " permissions, then resume; earlier checkpoints are untouched"
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
    # Python's JSON supports infinities; Prodigy's state contains one.
    (folder / STATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, tensors in ((ADAPTERS, state.tensors), (OPTIMIZER, optimizer_tensors)):
        save_file(separate(tensors), folder / name, metadata={"format": "pt"})
    readable_as(folder / STATE, folder / ADAPTERS, folder / OPTIMIZER)
    hashes = {name: hash_of_file(folder / name) for name in FILES}
    index = dump_json({"schema_version": SCHEMA_VERSION, "sha256": hashes})
    (folder / DIGESTS).write_text(index, encoding="utf-8")
    for name in (*FILES, DIGESTS, "."):  # "." is the folder itself
        sync(folder / name)


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        UserError: the folder is not a checkpoint, a file is missing, truncated or altered, or the
            schema version is unknown.
    """
    if not any((path / name).exists() for name in (DIGESTS, *FILES)):
        problem = "is not a checkpoint folder" if path.exists() else "does not exist"
        raise UserError(
            f"checkpoint {path} {problem}: give RUN/checkpoints/step-N, or start without resuming"
        )
    with explain_checkpoint_errors(path, DIGESTS):
        # The other files are read only if the schema version is known.
        index = json.loads(regular_file(path / DIGESTS).read_bytes())
        version = index["schema_version"]
        hashes = index["sha256"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path / DIGESTS} has schema version {version!r}, but this version of"
            f" bilora_diffusion reads {SCHEMA_VERSION}: resume with the version that wrote it,"
            " or start a new run in another folder"
        )
    for name in FILES:
        with explain_checkpoint_errors(path, name):
            if hash_of_file(path / name) != hashes[name]:
                raise ValueError("its content has changed")
    # The content is unchanged, but another version of a library may be unable to read it.
    with explain_checkpoint_errors(path):
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
    # `load_file` returns views of the mapped file, which the run may replace.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def explain_checkpoint_errors(path: Path, name: str = ".") -> AbstractContextManager[None]:
    """Return a context that converts errors of reading a checkpoint's file to `UserError`."""
    return as_user_error(
        f"{path / name} can't be read", "resume from an earlier checkpoint, or start a new run"
    )


def _find_steps(root: Path) -> dict[int, Path]:
    """Return the checkpoint folders in ``root`` by step."""
    folders: dict[int, Path] = {}
    for entry in root.glob("step-*"):
        match = _NAME.fullmatch(entry.name)
        if match is not None and entry.is_dir():
            folders[int(match[1])] = entry
    return folders


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in the run ``folder``, in order."""
    return sorted(_find_steps(Path(folder) / CHECKPOINTS))


def latest(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step in the run ``folder``; None if there is none."""
    folders = _find_steps(Path(folder) / CHECKPOINTS)
    if not folders:
        return None
    return folders[max(folders)]


def default_limit(path: Path) -> int:
    """Return how many checkpoints to keep by default, at least 2, from the size of one of them."""
    # All have the same size, since the optimizer has its moments from the first step on.
    size = sum(file.stat().st_size for file in path.iterdir())
    return max(2, DEFAULT_BYTES // size)


def prune(folder: Path, limit: int) -> list[int]:
    """Delete all checkpoints except the newest ``limit``, which is at least 1.

    Returns:
        Steps of the deleted checkpoints.
    """
    folders = _find_steps(Path(folder) / CHECKPOINTS)
    old_steps = sorted(folders)[:-limit]
    for step in old_steps:
        discard(folders[step])
    return old_steps


def later_steps(folder: Path, chosen: Path) -> list[int]:
    """Return the steps of the run's checkpoints that come after a chosen checkpoint, in order.

    Raises:
        UserError: the chosen checkpoint is damaged.
    """
    newest = latest(folder)
    if newest is None or newest.resolve() == chosen.resolve():
        return []
    with explain_checkpoint_errors(chosen, STATE):
        chosen_step = json.loads((chosen / STATE).read_bytes())["step"]
        return [step for step in steps(folder) if step > chosen_step]


def resolve(folder: Path, value: str | Path | None) -> Path | None:
    """Return the checkpoint that ``--resume_from_checkpoint VALUE`` names in the run ``folder``.

    Args:
        folder: the run folder.
        value: "auto" (the newest checkpoint, or a new start if there is none), "latest" (as in
            diffusers: there must be a checkpoint), the name of a checkpoint in ``folder``
            ("step-100"), or the path of a checkpoint of any run; None for a new start.

    Returns:
        The checkpoint; None for a new start.

    Raises:
        UserError: the checkpoint does not exist; the message lists the existing ones.
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
    advice = f"{root} holds {names}"
    if not names:
        advice = f"{root} holds none, use auto to start from the beginning"
    raise UserError(f"checkpoint {str(value)!r} does not exist: {advice}")


@torch.no_grad()
def load_tensors(current: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into the parameters with the same names.

    Raises:
        UserError: a parameter is missing, unexpected, or has another shape.
    """
    # All shapes are compared before any tensor is copied, so a refused checkpoint changes nothing.
    for name in sorted(current.keys() | saved.keys()):
        saved_shape = _describe_shape(saved, name)
        current_shape = _describe_shape(current, name)
        if saved_shape != current_shape:
            raise UserError(
                f"the parameter '{name}' has shape {saved_shape} in the checkpoint and"
                f" {current_shape} in the model: resume with the run's original flags."
            )
    for name, parameter in current.items():
        parameter.copy_(saved[name])


def _describe_shape(tensors: Mapping[str, Tensor], name: str) -> str:
    if name not in tensors:
        return "none"
    return str(tuple(tensors[name].shape))


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a ``state_dict`` into JSON values and tensors; `join` is the inverse.

    Returns:
        The JSON values, with None for each tensor and lists for tuples; and the tensors by path,
        such as "state/0/exp_avg".

    Raises:
        TypeError: JSON can't represent a value.
    """
    tensors: dict[str, Tensor] = {}

    def convert(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return None
        if isinstance(value, Mapping):
            return {str(key): convert(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [convert(item, f"{path}/{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path} is a {type(value).__name__}, which JSON can't hold")

    # JSON's keys are strings, but an optimizer's keys are the numbers of its parameters.
    json_values = {str(key): convert(value, str(key)) for key, value in state.items()}
    return json_values, tensors


def join(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Rebuild an optimizer's ``state_dict`` from the results of `split`, modifying ``state``."""
    for path, tensor in tensors.items():
        # A path such as "param_groups/0/betas/1" consists of dictionary keys and list indices.
        container: Any = None
        item: Any = state
        key: Any = None
        for part in path.split("/"):
            container = item
            key = int(part) if isinstance(container, list) else part
            item = container[key]
        container[key] = tensor
    # JSON's keys are strings, but an optimizer's keys are the numbers of its parameters.
    moments_by_number = {int(number): moments for number, moments in state["state"].items()}
    return {**state, "state": moments_by_number}


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU, since safetensors refuses tensors that share memory.

    Raises:
        TypeError: a tensor belongs to a subclass (sharded or quantized), so the copy would be
            incomplete.
    """
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter):
            raise TypeError(f"{name} is a {type(tensor).__name__}, not a plain tensor")
    layout = torch.contiguous_format
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=layout)
        for name, tensor in tensors.items()
    }
