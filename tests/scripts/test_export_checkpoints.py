"""`python -m bilora_diffusion.export RUN --step N`: what the run itself would have left there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bilora_diffusion.export import FILE_NAME, inspect, main
from bilora_diffusion.run import runlog
from tests.text.text_builders import SAVERS, rows_for, train_text, write_rows

Train = Callable[..., Path]


def same(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


KEPT = {"checkpoints_total_limit": 0}


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": 6, "use_dora": True, "use_ema": True, "ema_decay": 0.5},
        {"init_lora_weights": "pissa", "train_text_encoder": True, "text_encoder_lr": 1e-3},
    ],
    ids=["dora-ema", "pissa-text"],
)
def test_a_checkpoint_is_exported_as_its_run_would(
    train: Train, tmp_path: Path, values: dict[str, Any]
) -> None:
    run = train(tmp_path / "icons", max_train_steps=3, checkpointing_steps=1, **KEPT, **values)
    assert main([str(run), "--step", "3"]) == 0
    made = run / "exports" / "step-3"
    assert same(made / FILE_NAME, run / FILE_NAME)
    assert same(made / "icons-step-3.safetensors", run / "icons.safetensors")
    facts = [inspect(folder / FILE_NAME).metadata for folder in (made, run)]
    for key in ("bilora.steps", "bilora.original_alpha", "ss_network_dim", "sshs_model_hash"):
        assert facts[0].get(key) == facts[1].get(key)

    early = tmp_path / "early.safetensors"
    assert main([str(run), "--step", "1", "--to", "kohya", "--output", str(early)]) == 0
    assert inspect(early).format == "kohya"
    assert inspect(early).metadata["bilora.steps"] == "1"
    assert not same(early, run / "icons.safetensors")


@pytest.mark.parametrize("kind", ["causal", "classification"])
def test_a_text_checkpoint_is_exported_as_its_run_would(tmp_path: Path, kind: str) -> None:
    run = train_text(
        tmp_path / "run",
        model_name_or_path=SAVERS[kind](tmp_path / "base"),
        train_file=write_rows(tmp_path / "rows.jsonl", rows_for(kind, 16)),
        template="plain",
        checkpointing_steps=1,
        init_lora_weights="pissa" if kind == "causal" else "default",
        use_ema=True,
    )
    assert main([str(run), "--step", "2"]) == 0
    made = run / "exports" / "step-2"
    assert same(made / "adapter_model.safetensors", run / "adapter_model.safetensors")
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (made, run)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["run", "--step", "1", "--to", "kohya"]) == 2


def test_refusals(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", checkpointing_steps=1)
    whole = tmp_path / "whole"
    whole.mkdir()
    record = {"schema_version": runlog.SCHEMA_VERSION, "method": "full", "config": {}}
    (whole / "run.json").write_text(json.dumps(record))
    (run / "exports" / "step-1").mkdir(parents=True)
    (run / "exports" / "step-1" / FILE_NAME).write_text("")
    for arguments, said in (
        ([str(run), "--step", "7"], "1, 2"),
        ([str(run), "--step", "1"], "exists"),
        ([str(run), "--step", "1", "--output", "a.safetensors"], "--to"),
        ([str(whole), "--step", "1"], "--max_train_steps"),
        ([str(tmp_path), "--step", "1"], "run.json"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
