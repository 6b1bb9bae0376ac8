"""Finding, pruning and comparing checkpoints; damage is named, with a way out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bilora_diffusion.durable import TEMPORARY
from bilora_diffusion.errors import UserError
from bilora_diffusion.run import checkpoint
from bilora_diffusion.run.checkpoint import check_same_run, latest, load, prune, resolve
from tests.run.checkpoints import save


@pytest.mark.parametrize("name", [*checkpoint.FILES, "digests.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "missing", "longer"])
def test_damage_names_the_file_and_the_way_out(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 9)
    path = save(tmp_path, 10)
    file = path / name
    content = file.read_bytes()
    damaged = {
        "truncated": content[:-1],
        "emptied": b"",
        "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "longer": content + b"\n",
        "missing": b"",
    }[damage]
    file.write_bytes(damaged)
    if damage == "missing":
        file.unlink()
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert str(file) in message
    assert ("missing" if damage == "missing" else "truncated or altered") in message
    assert f"resume from {path.parent / 'step-9'} instead, or delete step-10" in message
    assert load(path.parent / "step-9").step == 9


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


def test_the_only_checkpoint_is_damaged(tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / checkpoint.STATE).unlink()
    with pytest.raises(UserError, match=r"state\.json is missing: delete step-1 and start afresh"):
        load(path)


def test_unknown_schema_version(tmp_path: Path) -> None:
    path = save(tmp_path)
    index = json.loads((path / "digests.json").read_text())
    (path / "digests.json").write_text(json.dumps({**index, "schema_version": 2}))
    with pytest.raises(UserError, match=r"digests\.json has schema version 2, .* reads 1: resume"):
        load(path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    good = save(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder is not a checkpoint folder"):
        load(tmp_path / "folder")
    with pytest.raises(UserError, match=f"not a checkpoint folder .*resume from {good} instead"):
        load(tmp_path / "run")
    with pytest.raises(UserError, match="is a file, not a checkpoint folder"):
        load(good / checkpoint.STATE)
    with pytest.raises(UserError, match=f"step-7 does not exist: resume from {good} instead$"):
        load(good.parent / "step-7")


def test_latest_is_numeric_and_ignores_the_rest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for step in (9, 100, 20):
        save(tmp_path, step)
    root = tmp_path / checkpoint.CHECKPOINTS
    for name in (f"{TEMPORARY}step-500", f"{TEMPORARY}deleted-step-600", "step-x", "step-7000.old"):
        (root / name).mkdir()
    (root / "step-800").write_text("a file")
    assert latest(tmp_path) == root / "step-100"


def test_a_checkpoint_that_is_being_replaced_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 4, 1.0)
    waiting = path.with_name(".replaced-step-4")
    path.rename(waiting)
    assert latest(tmp_path) == resolve(tmp_path, "step-4") == resolve(tmp_path, path) == waiting
    assert load(path).extra == load(waiting).extra == {"value": 1.0}
    save(tmp_path, 5)
    assert path.is_dir()
    assert not waiting.exists()


def test_prune(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (2, 10, 9)]
    assert prune(tmp_path, None) == prune(tmp_path, 3) == []
    assert prune(tmp_path, 1) == [paths[0], paths[2]]
    assert os.listdir(tmp_path / checkpoint.CHECKPOINTS) == ["step-10"]
    with pytest.raises(UserError, match="is 0, but at least 1"):
        prune(tmp_path, 0)


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert resolve(run, None) is None
    assert resolve(run, "auto") is None
    with pytest.raises(UserError, match=r"no checkpoint in .*use --resume_from_checkpoint auto"):
        resolve(run, "latest")
    with pytest.raises(UserError, match=r"'step-3' does not exist: .* holds none"):
        resolve(run, "step-3")
    save(run, 3)
    path = save(run, 20)
    assert resolve(run, "auto") == resolve(run, "latest") == resolve(run, "step-20") == path
    assert resolve(tmp_path / "other", path) == resolve(tmp_path / "other", str(path)) == path
    monkeypatch.chdir(run)
    assert resolve(tmp_path / "other", "checkpoints/step-3") == Path("checkpoints/step-3")
    with pytest.raises(
        UserError, match=r"'checkpoint-20' does not exist: .* holds step-3, step-20$"
    ):
        resolve(run, "checkpoint-20")


def test_check_same_run() -> None:
    saved = {"rank": 4, "rho": 0.05, "betas": (0.9, 0.99), "data": {"name": "mini", "seed": 0}}
    check_same_run(saved, json.loads(json.dumps(saved)))
    check_same_run(saved, {**saved, "rank": 8, "data": {}}, {"rank", "data"})
    check_same_run(saved, {**saved, "data": {"name": "x", "seed": 0}}, {"data.name"})
    check_same_run({"x": float("nan")}, {"x": float("nan")})
    with pytest.raises(UserError, match=r'rho was 0\.05 and is 0\.1; data\.name was "mini" and'):
        check_same_run(saved, {**saved, "rho": 0.1, "data": {"name": "x", "seed": 0}})
    with pytest.raises(
        UserError, match=r"b was 1 and is true; .* d was 1 and is null; and 1 more\)"
    ):
        check_same_run({"b": 1, "c": 1, "d": 1}, {"a": True, "b": True, "c": 2, "d": None})
    with pytest.raises(UserError, match="rank was 4 and is not set"):
        check_same_run({"rank": 4}, {})
