"""Runs with ``--log_dynamics``: the training is unchanged, and snapshots survive a kill."""

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.run import snapshots
from tests.scripts.runs import assert_same_run, column, copied, train

SHORT: dict[str, Any] = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "log_dynamics": True,
    "dynamics_steps": 1,
}


def snapshot_files(folder):
    """Return the content of each snapshot, by its step."""
    return {step: path.read_bytes() for step, path in snapshots.steps(folder).items()}


@pytest.mark.slow
def test_recording_changes_nothing_and_a_resumed_run_repeats_its_snapshots(tmp_path):
    shared = {**SHORT, "method": "lora-sam", "max_train_steps": 4, "checkpointing_steps": 2}
    uncut = train(tmp_path / "whole", **shared)
    off = train(tmp_path / "off", **{**shared, "log_dynamics": None, "dynamics_steps": None})
    assert_same_run(uncut, off, "grad_norm", "sharpness")
    assert not (off / "dynamics").exists()

    parts = copied(uncut, tmp_path / "parts")
    shutil.rmtree(parts / "checkpoints" / "step-4")
    assert list(snapshot_files(parts)) == [0, 1, 2, 3, 4]
    for step in (3, 4):  # as a kill may leave them; the resumed run must replace them
        snapshots.steps(parts)[step].write_bytes(b"torn")
    train(parts, **shared, resume_from_checkpoint="latest")
    assert snapshot_files(parts) == snapshot_files(uncut)
    assert column(parts, "dynamics") == column(uncut, "dynamics")
    assert len(column(uncut, "dynamics")) == 4

    restarted = train(parts, **{**shared, "max_train_steps": 1}, overwrite_output_dir=True)
    assert list(snapshot_files(restarted)) == [0, 1]


@pytest.mark.slow
def test_snapshots_hold_the_trained_factors(tmp_path):
    options = {"init_lora_weights": "pissa", "use_dora": True}
    run = train(tmp_path / "run", **SHORT, **options, max_train_steps=2, checkpointing_steps=2)
    saved = load_file(run / "checkpoints" / "step-2" / "adapters.safetensors")
    last = snapshots.read(snapshots.steps(run)[2])
    assert set(last.factors) == {PRIMARY, AUXILIARY}
    for adapter, layers in last.factors.items():
        for layer in layers:
            target, path = layer.name.split(".", 1)
            key = f"{target}/{adapter}/{path}"
            # A factor of a convolution is saved with its kernel's axes.
            assert torch.equal(layer.A, saved[f"{key}.lora_A.weight"].flatten(1))
            assert torch.equal(layer.B, saved[f"{key}.lora_B.weight"].flatten(1))
    first, second = column(run, "dynamics")
    assert first["ascent_gain"] == 0  # B2 is zero
    assert second["ascent_gain"] != 0
    assert 0 < second["column_overlap"] < 1
    assert second["norm_auxiliary"] == pytest.approx(column(run, "auxiliary_norm")[1], rel=1e-5)
