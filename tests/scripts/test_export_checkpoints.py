"""`python -m bilora_diffusion.export RUN --step N`, whose files test_training.py compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bilora_diffusion.export import FILE_NAME, inspect, main
from bilora_diffusion.run import runlog
from tests.scripts.runs import train


def test_an_early_step_in_a_format_and_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, early = train(tmp_path / "run", checkpointing_steps=1), tmp_path / "early.safetensors"
    assert main([str(run), "--step", "1", "--to", "kohya", "--output", str(early)]) == 0
    facts, last = inspect(early), inspect(run / "run.safetensors")
    assert (facts.format, facts.metadata["bilora.steps"]) == ("kohya", "1")
    assert facts.metadata["sshs_model_hash"] != last.metadata["sshs_model_hash"]

    (tmp_path / "whole").mkdir()
    record = {"schema_version": runlog.SCHEMA_VERSION, "method": "full", "config": {}}
    (tmp_path / "whole" / "run.json").write_text(json.dumps(record))
    (run / "exports" / "step-1").mkdir(parents=True)
    (run / "exports" / "step-1" / FILE_NAME).write_text("")
    capsys.readouterr()
    for arguments, said in (
        ([str(run), "--step", "7"], "1, 2"),
        ([str(run), "--step", "1"], "exists"),
        ([str(run), "--step", "1", "--output", "a.safetensors"], "--to"),
        ([str(tmp_path / "whole"), "--step", "1"], "--max_train_steps"),
        ([str(tmp_path), "--step", "1"], "run.json"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
