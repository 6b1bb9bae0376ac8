"""Checkpoints: written whole or not at all, verified on load, restored bit for bit.

``RUN/checkpoints/step-N/`` holds

    adapters.safetensors    every adapter's tensors (the auxiliary too)
    optimizer.safetensors   the optimizer's tensors, by their place in its ``state_dict``
    state.json              the rest of that, and the scheduler's, scaler's and extra state
    digests.json            schema version, and SHA-256 of the other three and of these

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
_PARTS = ("scheduler", "scaler", "extra")
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
    aside = final.with_name(TEMPORARY + final.name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        sync(root.parent)
        remove_leftovers(root)
        aside.mkdir()
        try:
            _write(aside, state)
            if final.exists():  # of a run that went on from an earlier one before
                discard(final)
            os.rename(aside, final)
            sync(root)
        finally:
            if aside.exists():
                shutil.rmtree(aside)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"checkpoint {final} could not be written ({reason}): make room or rights for it and "
            "resume, earlier checkpoints are untouched"
        ) from error
    return final


def _write(aside: Path, state: Checkpoint) -> None:
    rest, moments = split(state.optimizer)
    parts = {name: getattr(state, name) for name in _PARTS}
    # With NaN and infinities, of which Prodigy's state has one.
    text = json.dumps({"step": state.step, **parts, "optimizer": rest}, indent=2) + "\n"
    (aside / STATE).write_text(text, encoding="utf-8")
    for name, content in ((ADAPTERS, state.tensors), (OPTIMIZER, moments)):
        save_file(separate(content), aside / name, metadata={"format": "pt"})
    readable_as(aside / STATE, aside / ADAPTERS, aside / OPTIMIZER)
    (aside / DIGESTS).write_text(_index({n: _digest(aside / n) for n in FILES}), encoding="utf-8")
    for name in (*FILES, DIGESTS, "."):
        sync(aside / name)


def _index(digests: Mapping[str, str]) -> str:
    own = hashlib.sha256(dump_json(digests).encode()).hexdigest()
    index = {"schema_version": SCHEMA_VERSION, "sha256": digests, "sha256_of_sha256": own}
    return dump_json(index)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        UserError: when the folder is none, a file is missing, truncated or altered, or the schema
            version is unknown; it says what to resume from instead.
    """
    if not any((path / name).exists() for name in (DIGESTS, *FILES)):
        what = "is not a checkpoint folder" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {path} {what}: {_instead(path)}")
    with unaltered(path, DIGESTS):
        text = finite(path / DIGESTS).read_bytes().decode("utf-8")
        version, digests = (json.loads(text)[key] for key in ("schema_version", "sha256"))
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path / DIGESTS} has schema version {version!r}, but this version of"
                f" bilora_diffusion reads {SCHEMA_VERSION}: resume with the version that wrote it,"
                " or start a new run in another folder"
            )
        if set(digests) != set(FILES) or text != _index(digests):
            raise ValueError("not what was written")
    for name in FILES:
        with unaltered(path, name):
            if _digest(path / name) != digests[name]:
                raise ValueError("not what was written")
    with unaltered(path):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        # Cloned, since load_file returns views of the mapped file.
        tensors, moments = (
            {key: tensor.clone() for key, tensor in load_file(path / name).items()}
            for name in (ADAPTERS, OPTIMIZER)
        )
        parts = {name: state[name] for name in _PARTS}
        parts["optimizer"] = join(state["optimizer"], moments)
        return Checkpoint(step=state["step"], tensors=tensors, **parts)


def unaltered(path: Path, name: str = ".") -> AbstractContextManager[None]:
    """Context of reading a checkpoint, or one file of it: an error says what to do instead."""
    return translated(f"{path / name} can't be read", _instead(path))


def _instead(path: Path) -> str:
    """Way out of an unusable checkpoint: the newest other one beside or inside it, if any."""
    others = {**_steps(path.parent), **_steps(path / CHECKPOINTS)}
    usable = [others[step] for step in sorted(others) if others[step] != path]
    spoilt = _NAME.fullmatch(path.name) and path.exists()
    if usable:
        return f"resume from {usable[-1]} instead" + (f", or delete {path.name}" if spoilt else "")
    if spoilt:
        return f"delete {path.name} and start afresh, there is no other checkpoint beside it"
    return "give the folder of a checkpoint (RUN/checkpoints/step-N), or start without resuming"


def _steps(root: Path) -> dict[int, Path]:
    """Checkpoints in ``root`` by step."""
    entries = [entry for entry in root.glob("step-*") if entry.is_dir()]
    return {int(match[1]): e for e in entries if (match := _NAME.fullmatch(e.name))}


def steps(folder: Path) -> list[int]:
    """The steps of which run ``folder`` holds checkpoints, in order."""
    return sorted(_steps(Path(folder) / CHECKPOINTS))


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in run ``folder``, None without one."""
    steps = _steps(Path(folder) / CHECKPOINTS)
    return steps[max(steps)] if steps else None


def prune(folder: Path, limit: int) -> None:
    """Delete all but the newest ``limit`` checkpoints, of which there is at least 1."""
    kept = _steps(Path(folder) / CHECKPOINTS)
    for step in sorted(kept)[:-limit]:
        discard(kept[step])


def resolve(folder: Path, value: str | Path | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint VALUE`` means in run ``folder``.

    Args:
        value: "latest" (there must be one), "auto" (the latest, or None to start afresh), the name
            of a checkpoint in ``folder`` ("step-100"), or the path of a checkpoint of any run;
            None gives None.

    Raises:
        UserError: when there is none; those that exist are listed.
    """
    root = Path(folder) / CHECKPOINTS
    if value is None or value == "auto":
        return None if value is None else latest(folder)
    newest = latest(folder) if value == "latest" else None
    for path in (newest,) if newest else (root / value, Path(value)):
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

    def shown(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key], default=str) if key in values else "not set"

    rows = [(k, shown(saved, k), shown(current, k)) for k in {**saved, **current} if k not in free]
    wrong = [f"{key} was {was} and is {is_now}" for key, was, is_now in rows if was != is_now]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"the checkpoint is of another config ({'; '.join(wrong[:3])}{more}): use the same "
            "values to resume, or start a new run in another --output_dir"
        )


@torch.no_grad()
def load_tensors(current: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into the parameters that they were taken from.

    Raises:
        UserError: a parameter is missing, superfluous, or of another shape.
    """
    for name in sorted(current.keys() | saved.keys()):
        shapes = [str(tuple(t[name].shape)) if name in t else "none" for t in (saved, current)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"the parameter '{name}' has shape {shapes[0]} in the checkpoint and {shapes[1]} in"
                " the model: resume with the run's own flags."
            )
    for name, parameter in current.items():
        parameter.copy_(saved[name])


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON of a ``state_dict``, and its tensors by path, such as "state/0/exp_avg".

    Null stands in a tensor's place. Tuples come back as lists.

    Raises:
        TypeError: for a value that would not come back.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, *path: str) -> Any:
        if isinstance(value, Tensor):
            tensors["/".join(path)] = value
            return None
        if isinstance(value, Mapping):
            return {str(key): plain(item, *path, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, *path, str(number)) for number, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{'/'.join(path)} is a {type(value).__name__}, which JSON can't hold")

    return plain(state), tensors


def join(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that `split` took apart; ``rest`` is changed."""
    for path, tensor in tensors.items():
        place: Any = rest
        *way, last = path.split("/")
        for key in way:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = tensor
    return {**rest, "state": {int(number): own for number, own in rest["state"].items()}}


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory.

    Raises:
        TypeError: for a tensor of a subclass (sharded, quantized), of which a part would be lost.
    """
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter):
            raise TypeError(f"{name} is a {type(tensor).__name__}, not a plain tensor")
    layout: Any = {"copy": True, "memory_format": torch.contiguous_format}
    return {name: tensor.detach().to("cpu", **layout) for name, tensor in tensors.items()}
