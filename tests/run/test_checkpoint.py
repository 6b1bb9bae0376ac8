"""Checkpoints come back bit for bit and survive a crash at any moment; damage is named."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bilora_diffusion.durable import TEMPORARY
from bilora_diffusion.errors import UserError
from bilora_diffusion.run import checkpoint
from bilora_diffusion.run.checkpoint import (
    latest,
    load,
    load_tensors,
    prune,
    require_same_settings,
    resolve,
)
from tests.run.checkpoints import save


def same(a: Any, b: Any) -> bool:
    """Equality of types, keys and their order, float bits and tensor bytes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)
    if isinstance(a, float):
        return (a != a and b != b) or struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return same(list(a.keys()), list(b.keys())) and all(same(a[key], b[key]) for key in a)
    return a == b


def test_whatever_is_saved_comes_back_exactly(tmp_path: Path) -> None:
    bits = torch.arange(-64, 64, dtype=torch.int8)  # NaN payloads, subnormals, -0
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64)
    tensors = {str(dtype): bits.view(dtype) for dtype in dtypes} | {"a/b": torch.empty(0, 3)}
    base = torch.arange(12.0).reshape(3, 4)
    tensors |= {"base": base, "same": base, "row": base[1], "across": base.t()}
    odd = [True, 10**30, -0.0, 5e-324, float("nan"), float("-inf"), "$", (1, [None]), base[1:]]
    parts = {
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, 1.5: odd, "$": {"$": odd}},
        "scheduler": OrderedDict(b=1, a={2: (), "a/b": {}}),
        "scaler": {},
        "extra": {"milestones": Counter({3: 2}), "nested": OrderedDict([(2, "x"), ("y", base)])},
    }
    path = save(tmp_path, 10**9, tensors=tensors, **parts)
    found = load(path)
    with (path / checkpoint.ADAPTERS).open("r+b") as file:  # on which nothing loaded depends
        file.write(b"\0" * 200)
    assert (found.step, set(found.tensors)) == (10**9, set(tensors))
    assert all(same(found.tensors[name], value) for name, value in tensors.items())
    for name, part in parts.items():
        assert same(getattr(found, name), part), name
    found.tensors["base"].zero_()
    assert same(found.tensors["same"], base)


@pytest.mark.parametrize("value", [np.float64(1.0), {1}, torch.eye(2).to_sparse()])
def test_what_cannot_come_back_exactly_is_refused(tmp_path: Path, value: Any) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError, match="extra/x"):
        save(tmp_path, 2, extra={"x": value})
    assert os.listdir(tmp_path / checkpoint.CHECKPOINTS) == ["step-1"]


def load_latest(folder: Path) -> checkpoint.Checkpoint:
    path = latest(folder)
    assert path is not None
    return load(path)


class Crash(BaseException):
    """The moment the machine stops: nothing after it reaches the disk."""


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the ``call``-th change of the disk, and all after it, not happen."""
    count = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= call:
                raise Crash
            return real(*args, **kwargs)

        return change

    changes = {os: ("mkdir", "rename", "replace", "fsync"), shutil: ("rmtree", "copymode")}
    for module, names in {**changes, checkpoint: ("save_file",)}.items():
        for name in names:
            monkeypatch.setattr(module, name, guarded(getattr(module, name)))


def test_a_crash_at_every_change_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    outcomes = set()
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save(folder, 1, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, call)
            try:
                completed = save(folder, 2, 2.0).exists()
            except Crash:
                completed = False
        found = load_latest(folder)
        outcomes.add(found.extra["value"])
        assert resolve(folder, f"step-{found.step}") == latest(folder)
        root = folder / checkpoint.CHECKPOINTS
        assert not (completed and found.step == 1)
        save(folder, 3, 3.0)  # cleans up
        assert {path.name for path in root.iterdir()} <= {"step-1", "step-2", "step-3"}
        assert load_latest(folder).extra["value"] == 3.0
        if completed:
            break
    assert completed
    assert call > 10
    assert outcomes == {1.0, 2.0}


@pytest.mark.parametrize("name", [*checkpoint.FILES, "digests.json"])
def test_damage_names_the_file_and_the_way_out(tmp_path: Path, name: str) -> None:
    save(tmp_path, 9)
    path = save(tmp_path, 10)
    file = path / name
    content = file.read_bytes()
    places = range(0, len(content), 5) if name.endswith("json") else [len(content) - 9]
    flips = (content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in places)
    for damaged in (None, content[:-1], b"", content + b"\n", *flips):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load(path)
        assert f"{file} is {'missing' if damaged is None else 'truncated or altered'}" in str(
            error.value
        )
        assert str(path.parent / "step-9") in str(error.value)
    file.write_bytes(content)
    assert load(path).step == 10


def test_what_is_no_checkpoint_is_refused_with_one_that_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    good = save(run)
    (tmp_path / "folder").mkdir()
    foreign = save(tmp_path / "other")
    index = json.loads((foreign / "digests.json").read_text())
    (foreign / "digests.json").write_text(json.dumps({**index, "schema_version": 2}))
    for path, parts in {
        tmp_path / "folder": ("not a checkpoint folder",),
        run: ("not a checkpoint folder", str(good)),
        good / checkpoint.STATE: ("not a checkpoint folder",),
        good.parent / "step-7": ("does not exist", str(good)),
        foreign: ("schema version 2", "reads 1"),
    }.items():
        with pytest.raises(UserError) as error:
            load(path)
        for part in (str(path), *parts):
            assert part in str(error.value)


def test_latest_is_numeric_and_ignores_the_rest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    paths = [save(tmp_path, step) for step in (9, 100, 20)]
    root = tmp_path / checkpoint.CHECKPOINTS
    for name in (f"{TEMPORARY}step-500", f"{TEMPORARY}deleted-step-600", "step-x", "step-7000.old"):
        (root / name).mkdir()
    (root / "step-800").write_text("a file")
    assert latest(tmp_path) == paths[1]
    prune(tmp_path, 2)
    assert not paths[0].exists()
    assert paths[1].exists()
    assert paths[2].exists()


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert resolve(run, None) is None
    assert resolve(run, "auto") is None
    for value, fix in {"latest": "auto", "step-3": "holds none"}.items():
        with pytest.raises(UserError, match=fix):
            resolve(run, value)
    save(run, 3)
    path = save(run, 20)
    assert resolve(run, "auto") == resolve(run, "latest") == resolve(run, "step-20") == path
    assert resolve(tmp_path / "other", path) == resolve(tmp_path / "other", str(path)) == path
    monkeypatch.chdir(run)
    assert resolve(tmp_path / "other", "checkpoints/step-3") == Path("checkpoints/step-3")
    with pytest.raises(UserError, match=r"checkpoint-20.* holds step-3, step-20"):
        resolve(run, "checkpoint-20")


def test_only_a_run_of_the_same_settings_goes_on() -> None:
    saved = {"rank": 4, "rho": 0.05, "betas": (0.9, 0.99), "x": float("nan")}
    require_same_settings(saved, {**saved, "betas": [0.9, 0.99], "x": float("nan")})
    require_same_settings(saved, {**saved, "rank": 8}, free={"rank"})
    for current, parts in (
        ({**saved, "rho": 0.1}, ("rho was 0.05 and is 0.1",)),
        ({**saved, "rank": True}, ("rank was 4 and is true",)),
        ({}, ("rank was 4 and is not set", "1 more")),
    ):
        with pytest.raises(UserError) as error:
            require_same_settings(saved, current)
        for part in (*parts, "--output_dir"):
            assert part in str(error.value)


def test_only_tensors_of_the_same_names_and_shapes_are_taken() -> None:
    current = {"a": torch.zeros(2, 3)}
    for saved in ({}, {"a": torch.ones(2, 3), "b": torch.ones(1)}, {"a": torch.ones(3, 2)}):
        with pytest.raises(UserError, match=r"'[ab]'.*resume with the"):
            load_tensors(current, saved)
        assert not current["a"].any()
    load_tensors(current, {"a": torch.ones(2, 3)})
    assert current["a"].all()
