"""Checkpoints are restored bit for bit, survive a crash at any moment, and detect damage."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from bilora_diffusion.core.durable import TEMPORARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import checkpoint
from bilora_diffusion.run.checkpoint import (
    default_limit,
    latest,
    load,
    load_tensors,
    prune,
    resolve,
)
from bilora_diffusion.run.settings import require_same_settings
from bilora_diffusion.train.resume import require_same_work
from tests.run.recorded_runs import save

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
)


def bits_of(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def has_same_bytes(a, b):
    """Return whether two tensors are bit-identical, including NaN values."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def test_saved_values_are_restored_exactly(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "row": base[1], "across": base.t(), "empty": base[:0]}
    for dtype in DTYPES:
        # Any bit pattern: NaN payloads, subnormals, -0. A bool has only 0 and 1.
        bits = torch.randint(0, 2 if dtype is torch.bool else 256, (64,), dtype=torch.uint8)
        tensors[str(dtype)] = bits.view(dtype)
    moments = {"x": base.expand(2, 3, 4), "inner": {"qmap": base}, "k": 3}
    group = {"lr": 1e-3, "betas": [0.9, torch.tensor(0.5)], "growth_rate": float("inf"), "d": None}
    path = save(
        tmp_path,
        tensors=tensors,
        optimizer={"state": {0: moments, 11: {"step": base[0, 0]}}, "param_groups": [group]},
        scheduler={"_last_lr": [0.1 + 0.2, 5e-324, -0.0]},
        scaler={"scale": 65536.0},
        extra={"best": float("nan"), "names": ["é", "$"]},
    )
    loaded_checkpoint = load(path)
    # Loaded tensors must not depend on the file, as memory-mapped tensors would.
    with (path / checkpoint.ADAPTERS).open("r+b") as file:
        file.write(b"\0" * 200)
    assert loaded_checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert has_same_bytes(loaded_checkpoint.tensors[name], tensor), name
    state = loaded_checkpoint.optimizer["state"]
    assert list(state) == [0, 11]
    assert list(state[0]) == list(moments)
    assert state[0]["k"] == 3
    assert has_same_bytes(state[0]["x"], moments["x"])
    assert has_same_bytes(state[0]["inner"]["qmap"], base)
    assert has_same_bytes(state[11]["step"], base[0, 0])
    (loaded_group,) = loaded_checkpoint.optimizer["param_groups"]
    assert has_same_bytes(loaded_group["betas"].pop(), group["betas"].pop())
    assert loaded_group == group
    assert repr(loaded_checkpoint.scheduler) == "{'_last_lr': [0.30000000000000004, 5e-324, -0.0]}"
    assert loaded_checkpoint.step == 1
    assert loaded_checkpoint.scaler == {"scale": 65536.0}
    assert repr(loaded_checkpoint.extra) == "{'best': nan, 'names': ['é', '$']}"
    # Tensors that shared memory no longer do.
    loaded_checkpoint.tensors["a"].zero_()
    assert has_same_bytes(loaded_checkpoint.tensors["b"], base)


@pytest.mark.parametrize("value", [{1}, object(), torch.float32], ids=["set", "object", "dtype"])
def test_values_that_cannot_be_restored_are_refused(tmp_path, value):
    save(tmp_path, 1)
    for part in ("optimizer", "extra"):
        with pytest.raises(TypeError):
            save(tmp_path, 2, 0.0, **{part: {"x": value}})
    assert os.listdir(tmp_path / checkpoint.CHECKPOINTS) == ["step-1"]


def load_latest(folder):
    return load(latest(folder) or folder)


class Crash(BaseException):
    """Simulated crash of the machine: no later change reaches the disk."""


def crash_at(monkeypatch, call):
    """Raise `Crash` instead of the ``call``-th change to the disk and instead of all later ones."""
    count = 0

    def guarded(real):
        def change(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= call:
                raise Crash
            return real(*args, **kwargs)

        return change

    changes = {
        os: ("mkdir", "rename", "replace", "fsync"),
        shutil: ("rmtree", "copymode"),
        checkpoint: ("save_file",),
        Path: ("unlink",),
    }
    for module, names in changes.items():
        for name in names:
            monkeypatch.setattr(module, name, guarded(getattr(module, name)))


def test_a_crash_at_any_change_leaves_the_old_or_the_new_checkpoint(tmp_path):
    outcomes = set()
    for call in range(1, 100):  # until a save has fewer changes than ``call``
        folder = tmp_path / str(call)
        save(folder, 1, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, call)
            try:
                completed = save(folder, 2, 2.0).exists()
            except Crash:
                completed = False
        loaded_checkpoint = load_latest(folder)
        outcomes.add(loaded_checkpoint.extra["value"])
        assert resolve(folder, f"step-{loaded_checkpoint.step}") == latest(folder)
        root = folder / checkpoint.CHECKPOINTS
        assert not (completed and loaded_checkpoint.step == 1)
        save(folder, 3, 3.0)  # cleans up
        assert {path.name for path in root.iterdir()} <= {"step-1", "step-2", "step-3"}
        assert load_latest(folder).extra["value"] == 3.0
        if completed:
            break
    assert completed
    assert call > 10
    assert outcomes == {1.0, 2.0}


@pytest.mark.parametrize("name", [*checkpoint.FILES, "digests.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = save(tmp_path, 10)
    content = (path / name).read_bytes()
    for damaged in (None, content[:-9], b"", content[:40] + b"x" + content[41:]):
        if damaged is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{path / name} can't be read .*earlier checkpoint"):
            load(path)
    (path / name).write_bytes(content)
    assert load(path).step == 10


def test_a_checkpoint_with_a_hash_of_its_hashes_is_read(tmp_path):
    """Versions up to 0.1.0 wrote such a hash."""
    index = save(tmp_path, 3) / "digests.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "sha256_of_sha256": "0" * 64}))
    assert load(index.parent).step == 3


def test_folders_that_are_not_readable_checkpoints_are_refused(tmp_path):
    path = save(tmp_path / "run")
    foreign = save(tmp_path / "other")
    index = json.loads((foreign / "digests.json").read_text())
    (foreign / "digests.json").write_text(json.dumps({**index, "schema_version": 1}))
    for folder, words in (
        (tmp_path / "run", "is not a checkpoint folder"),
        (path / checkpoint.STATE, "is not a checkpoint folder"),
        (path.parent / "step-7", "does not exist"),
        (foreign, "schema version 1, .* reads 4.*the version that wrote it"),
    ):
        with pytest.raises(UserError, match=f"{folder}.*{words}"):
            load(folder)


def test_latest_compares_step_numbers_and_ignores_other_names(tmp_path):
    assert latest(tmp_path) is None
    step_9, step_100, step_20 = (save(tmp_path, step) for step in (9, 100, 20))
    root = tmp_path / checkpoint.CHECKPOINTS
    for name in (f"{TEMPORARY}step-500", f"{TEMPORARY}deleted-step-600", "step-x", "step-7000.old"):
        (root / name).mkdir()
    (root / "step-800").write_text("a file")
    assert latest(tmp_path) == step_100
    assert prune(tmp_path, 2) == [9]
    assert not step_9.exists()
    assert step_100.exists()
    assert step_20.exists()


def test_by_default_as_many_checkpoints_are_kept_as_fit_into_two_gigabytes(tmp_path, monkeypatch):
    path = save(tmp_path, 5)
    size = sum(file.stat().st_size for file in path.iterdir())
    assert default_limit(path) == checkpoint.DEFAULT_BYTES // size
    monkeypatch.setattr(checkpoint, "DEFAULT_BYTES", size)
    assert default_limit(path) == 2  # at least the newest two


def test_checkpoint_names_and_paths_are_resolved(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert resolve(run, None) is None
    assert resolve(run, "auto") is None
    for value, fix in (("latest", "auto"), ("step-3", "holds none")):
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


def test_only_a_run_with_the_same_settings_is_resumed():
    saved = {"rank": 4, "rho": 0.05, "betas": (0.9, 0.99), "x": float("nan")}
    # JSON turns a tuple into a list, and a NaN into another object.
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


def test_moved_data_are_accepted_and_changed_data_are_refused():
    def run(place, training="a", heldout="b"):
        concept = {"concept": "dog", "dataset_name": place, "class_data_dir": f"{place}/class"}
        content = {"training": training, "held-out": heldout}
        records = {name: {"count": 1, "hash": value} for name, value in content.items()}
        return {
            "dataset_name": place,
            "train_file": f"{place}/rows.jsonl",
            "validation_dataset": f"{place}/held_out",
            "concepts": [concept],
            "rank": 4,
            "content": records,
        }

    def go_on(current, depends_on_heldout=True):
        saved = run("photos")
        options = current.keys() - {"content"}
        require_same_work(
            saved,
            current,
            options=options,
            free=set() if depends_on_heldout else {"validation_dataset"},
            depends_on_heldout=depends_on_heldout,
        )

    go_on(run("../other/photos"))
    with pytest.raises(UserError, match="rank was 4 and is 8"):
        go_on({**run("../other/photos"), "rank": 8})
    with pytest.raises(UserError, match=r'dataset_name was "photos" and is "../other/photos"'):
        go_on(run("../other/photos", training="c"))
    with pytest.raises(UserError, match="validation_dataset was"):
        go_on(run("../other/photos", heldout="c"))
    with pytest.raises(UserError, match="in the training data, some of"):
        go_on(run("photos", training="c"))
    go_on(run("../other/photos", heldout="c"), depends_on_heldout=False)


def test_only_tensors_with_the_same_names_and_shapes_are_loaded():
    current = {"a": torch.zeros(2, 3)}
    for saved in ({}, {"a": torch.ones(2, 3), "b": torch.ones(1)}, {"a": torch.ones(3, 2)}):
        with pytest.raises(UserError, match=r"'[ab]'.*resume with the"):
            load_tensors(current, saved)
        assert not current["a"].any()
    load_tensors(current, {"a": torch.ones(2, 3)})
    assert current["a"].all()
