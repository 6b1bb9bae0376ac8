"""Checkpoints: written whole or not at all, verified on load, restored bit for bit.

``RUN/checkpoints/step-N/`` holds

    adapters.safetensors    every adapter's tensors (the auxiliary too)
    optimizer.safetensors   the tensors of the optimizer, scheduler, scaler and extra state
    state.json              everything else of them (see ``state_codec``)
    digests.json            schema version, and SHA-256 of the other three

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
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..durable import TEMPORARY, discard, dump_json, remove_leftovers, sync
from ..errors import TrainingError, UserError
from .digests import seal, verify
from .state_codec import Tensors, decode, encode, separate

CHECKPOINTS = "checkpoints"
ADAPTERS, OPTIMIZER, STATE = "adapters.safetensors", "optimizer.safetensors", "state.json"
FILES = (ADAPTERS, OPTIMIZER, STATE)
_PARTS = ("optimizer", "scheduler", "scaler", "extra")
_REPLACED = ".replaced-"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load` returns; tensors are on the CPU, in the dtypes they were saved in.

    Attributes:
        step: optimizer steps taken when it was saved.
        tensors: adapter tensors by name.
        optimizer: ``state_dict`` of the torch optimizer.
        scheduler: ``state_dict`` of the learning rate scheduler.
        scaler: ``state_dict`` of the gradient scaler, None without fp16.
        extra: what else the run needs (config, method state, position in the data).
    """

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    extra: dict[str, Any]


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    optimizer: dict[str, Any],
    scheduler: dict[str, Any],
    scaler: dict[str, Any] | None,
    extra: dict[str, Any],
) -> Path:
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
    final, aside = root / f"step-{step}", root / f"{TEMPORARY}step-{step}"
    parts: dict[str, dict[str, Any] | None] = dict(
        zip(_PARTS, (optimizer, scheduler, scaler, extra), strict=True)
    )
    try:
        root.mkdir(parents=True, exist_ok=True)
        sync(root.parent)
        _recover(root)
        aside.mkdir()
        try:
            _write(aside, step, tensors, parts)
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


def _write(
    aside: Path,
    step: int,
    adapters: Mapping[str, Tensor],
    parts: Mapping[str, dict[str, Any] | None],
) -> None:
    found = Tensors()
    state = {name: encode(part, name, found) for name, part in parts.items()}
    (aside / STATE).write_text(dump_json({"step": step, **state}), encoding="utf-8")
    for name, content in ((ADAPTERS, adapters), (OPTIMIZER, found.named)):
        save_file(separate(content.items()), aside / name, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read: use the rights of the others.
        shutil.copymode(aside / STATE, aside / name)
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
        adapters = {name: tensor.clone() for name, tensor in load_file(path / ADAPTERS).items()}
        inner = {name: tensor.clone() for name, tensor in load_file(path / OPTIMIZER).items()}
        parts = {name: decode(state[name], inner) for name in _PARTS}
        for name, part in parts.items():
            if not (isinstance(part, dict) or (part is None and name == "scaler")):
                raise TypeError(f"{name} is a {type(part).__name__}")
        if type(state["step"]) is not int or state["step"] < 0:
            raise TypeError(f"the step is {state['step']!r}")
        return Checkpoint(step=state["step"], tensors=adapters, **parts)


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


def prune(folder: Path, limit: int | None) -> list[Path]:
    """Delete all but the newest ``limit`` checkpoints (None: keep all).

    Returns:
        What was deleted, oldest first.

    Raises:
        UserError: when ``limit`` is below 1.
    """
    if limit is None:
        return []
    if limit < 1:
        raise UserError(f"the limit of checkpoints is {limit}, but at least 1 must be kept")
    steps = _steps(Path(folder) / CHECKPOINTS)
    doomed = [steps[step] for step in sorted(steps)[:-limit]]
    for path in doomed:
        discard(path)
    return doomed


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


def check_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Set[str] = frozenset()
) -> None:
    """Refuse to continue a checkpoint under another config.

    Args:
        saved: config the checkpoint was made with.
        current: config of this run; nested mappings are compared key by key.
        ignore: keys that may differ; nested ones as "outer.inner".

    Raises:
        UserError: names up to three differing keys with both values.
    """
    old, new = _flat(saved, ignore), _flat(current, ignore)
    pairs = [(key, old.get(key, "not set"), new.get(key, "not set")) for key in {**old, **new}]
    wrong = [f"{key} was {before} and is {now}" for key, before, now in pairs if before != now]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"the checkpoint is of another config ({'; '.join(wrong[:3])}{more}): use the same "
            "values to resume, or start a new run in another --output_dir"
        )


def _flat(config: Mapping[str, Any], ignore: Set[str], prefix: str = "") -> dict[str, str]:
    """Dotted keys to JSON texts: tuples equal lists, NaN equals NaN, and True is not 1."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in ignore:
            continue
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, ignore, f"{name}."))
        else:
            flat[name] = json.dumps(value, default=str)
    return flat
