"""Checkpoints: written whole or not at all, verified on load, restored bit for bit.

``RUN/checkpoints/step-N/`` holds

    adapters.safetensors    every adapter's tensors (the auxiliary too)
    optimizer.safetensors   the optimizer's tensors, by their place in its ``state_dict``
    state.json              the rest of that, and the scheduler's, scaler's and extra state
    digests.json            schema version, and SHA-256 of the other three (see ``digests``)

A checkpoint is written to ``.tmp-step-N``, flushed, and renamed. One of the same step is first
renamed to ``.replaced-step-N``, where every function here still finds it until the new one has its
name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..durable import TEMPORARY, discard, readable_as, remove_leftovers, sync
from ..errors import TrainingError, UserError
from .digests import seal, verify
from .state_codec import join, separate, split

CHECKPOINTS = "checkpoints"
ADAPTERS, OPTIMIZER, STATE = "adapters.safetensors", "optimizer.safetensors", "state.json"
FILES = (ADAPTERS, OPTIMIZER, STATE)
_PARTS = ("scheduler", "scaler", "extra")
_REPLACED = ".replaced-"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run. Loaded tensors are on the CPU, in the dtypes they were saved in.

    Attributes:
        step: optimizer steps taken.
        tensors: adapter tensors by name.
        optimizer: ``state_dict`` of the torch optimizer.
        scheduler: ``state_dict`` of the learning rate scheduler.
        scaler: ``state_dict`` of the gradient scaler, None without fp16.
        extra: what else the run needs (config, method state, position in the data), as JSON has it.
    """

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    extra: dict[str, Any]


def save(folder: Path, state: Checkpoint) -> Path:
    """Write ``folder/checkpoints/step-N``; call it in one process only.

    Whatever interrupts it, the folder then holds the earlier checkpoints and either the old or the
    new one of this step. Leftovers of interrupted saves are deleted first.

    Returns:
        The checkpoint's folder.

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
        _recover(root)
        aside.mkdir()
        try:
            _write(aside, state)
            _swap(aside, final)
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
    seal(aside, FILES)


def _swap(aside: Path, final: Path) -> None:
    """Name ``aside`` ``final``; as no folder can be renamed onto a full one, the old steps back."""
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    os.rename(aside, final)
    sync(final.parent)
    if replaced.exists():
        discard(replaced)


def _recover(root: Path) -> None:
    """Finish what a crash interrupted: unfinished folders go, a replaced one left alone returns."""
    remove_leftovers(root)
    for replaced in root.glob(_REPLACED + "*"):
        final = root / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            discard(replaced)
        else:
            os.rename(replaced, final)
    sync(root)


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        UserError: when the folder is none, a file is missing, truncated or altered, or the schema
            version is unknown; it says what to resume from instead.
    """
    path = _found(Path(path))
    fix = _instead(path)
    verify(path, FILES, fix)
    with unaltered(path):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        # Cloned, since load_file returns views of the mapped file.
        tensors, moments = (
            {key: tensor.clone() for key, tensor in load_file(path / name).items()}
            for name in (ADAPTERS, OPTIMIZER)
        )
        parts = {name: state[name] for name in _PARTS}
        parts["optimizer"] = join(state["optimizer"], moments)
        for name, part in parts.items():
            if not (isinstance(part, dict) or (part is None and name == "scaler")):
                raise TypeError(f"{name} is a {type(part).__name__}")
        if type(state["step"]) is not int or state["step"] < 0:
            raise TypeError(f"the step is {state['step']!r}")
        return Checkpoint(step=state["step"], tensors=tensors, **parts)


@contextlib.contextmanager
def unaltered(path: Path) -> Iterator[None]:
    """Within the context, what a checkpoint holds is taken to be what `save` has written.

    Raises:
        UserError: it turns out not to be.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error.strerror}): {_instead(path)}"
        ) from error
    except (
        *(SafetensorError, ValueError, LookupError, TypeError, AttributeError),
        *(ArithmeticError, RecursionError),
    ) as error:
        raise UserError(f"checkpoint {path} was altered: {_instead(path)}") from error


def _instead(path: Path) -> str:
    """What to do about an unusable checkpoint: the newest other one beside or inside it, if any."""
    others = {**_steps(path.parent), **_steps(path / CHECKPOINTS)}
    usable = [others[step] for step in sorted(others) if others[step] != path]
    spoilt = _NAME.fullmatch(path.name) and path.exists()
    if usable:
        return f"resume from {usable[-1]} instead" + (f", or delete {path.name}" if spoilt else "")
    if spoilt:
        return f"delete {path.name} and start afresh, there is no other checkpoint beside it"
    return "give the folder of a checkpoint (RUN/checkpoints/step-N), or start without resuming"


def _steps(root: Path) -> dict[int, Path]:
    """Checkpoints in ``root`` by step, under whichever name the last rename left them."""
    found: dict[int, Path] = {}
    for entry in root.iterdir() if root.is_dir() else ():
        waiting = entry.name.startswith(_REPLACED)
        match = _NAME.fullmatch(entry.name.removeprefix(_REPLACED))
        if match and entry.is_dir() and not (waiting and int(match[1]) in found):
            found[int(match[1])] = entry
    return found


def steps(folder: Path) -> list[int]:
    """The steps of which run ``folder`` holds checkpoints, in order."""
    return sorted(_steps(Path(folder) / CHECKPOINTS))


def _found(path: Path) -> Path:
    """``path``, or where it is while it is being replaced."""
    if path.exists() or not path.name:
        return path
    replaced = path.with_name(_REPLACED + path.name)
    return replaced if replaced.is_dir() else path


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
    """The checkpoint that ``--resume_from_checkpoint VALUE`` means.

    Args:
        folder: the run folder.
        value: "latest" (there must be one), "auto" (the latest, or None to start afresh), the name
            of a checkpoint in ``folder`` ("step-100"), or the path of a checkpoint of any run;
            None gives None.

    Raises:
        UserError: when there is none; those that exist are listed.
    """
    root = Path(folder) / CHECKPOINTS
    if value is None:
        return None
    if value in ("latest", "auto"):
        newest = latest(folder)
        if newest is None and value == "latest":
            raise UserError(
                f"there is no checkpoint in {root}: use --resume_from_checkpoint auto to start "
                "afresh when there is none"
            )
        return newest
    for candidate in (root / value, Path(value)):
        path = _found(candidate)
        if path.is_dir():
            return path
    names = ", ".join(f"step-{step}" for step in sorted(_steps(root)))
    existing = f"{root} holds {names}" if names else f"{root} holds none, use auto to start afresh"
    raise UserError(f"checkpoint {str(value)!r} does not exist: {existing}")
