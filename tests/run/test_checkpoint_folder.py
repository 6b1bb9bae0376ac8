"""Finding, pruning and comparing checkpoints; damage is named, with a way out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bilora_diffusion.durable import TEMPORARY
from bilora_diffusion.errors import UserError
from bilora_diffusion.run import checkpoint
from bilora_diffusion.run.checkpoint import latest, load, prune, resolve
from bilora_diffusion.run.matching import load_tensors, require_same_settings
from tests.run.checkpoints import save


@pytest.mark.parametrize("name", [*checkpoint.FILES, "digests.json"])
def test_damage_names_the_file_and_the_way_out(tmp_path: Path, name: str) -> None:
    save(tmp_path, 9)
    path = save(tmp_path, 10)
    file = path / name
    content = file.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    for damaged in (content[:-1], b"", flipped, content + b"\n", None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load(path)
        assert f"{file} is {'missing' if damaged is None else 'truncated or altered'}" in str(
            error.value
        )
        assert str(path.parent / "step-9") in str(error.value)
        file.write_bytes(content)
    assert load(path).step == 10


def test_every_flipped_bit_of_the_small_files_is_found(tmp_path: Path) -> None:
    path = save(tmp_path)
    for name in ("digests.json", "state.json"):
        content = (path / name).read_bytes()
        for position in range(0, len(content), 5):
            for bit in (1, 128):
                flipped = bytearray(content)
                flipped[position] ^= bit
                (path / name).write_bytes(flipped)
                with pytest.raises(UserError, match=name):
                    load(path)
        (path / name).write_bytes(content)
    load(path)


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
        good / checkpoint.STATE: ("is a file",),
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


def test_a_checkpoint_that_is_being_replaced_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 4, 1.0)
    waiting = path.with_name(".replaced-step-4")
    path.rename(waiting)
    assert latest(tmp_path) == resolve(tmp_path, "step-4") == resolve(tmp_path, path) == waiting
    assert load(path).extra == load(waiting).extra == {"value": 1.0}
    save(tmp_path, 5)
    assert sorted(os.listdir(path.parent)) == ["step-4", "step-5"]


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
