"""A tuned comparison of real runs: two methods, two trials, and nothing that is done twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bilora_diffusion.run import runlog
from eval import table
from tests.scripts.conftest import ROOT

SPACE = """
options:
  max_train_steps: 2
  validation_loss_steps: 2
  train_batch_size: 1
  num_validation_images: 0
  output_kohya_format: false
  report_to: none
shared:
  learning_rate: {log: [1.0e-3, 1.0e-2]}
methods:
  LoRA: {method: lora}
  Bi-LoRA: {method: bilora, rho: {log: [0.1, 1]}}
"""


def tune(folder: Path) -> str:
    words = ["--space", str(folder / "space.yaml"), "--trials", "2", "--seeds", "0"]
    words += ["--test_seeds", "1..2", "--set", "dataset=mini-animals", "--jobs", "2"]
    words += ["--parts", "1/8,2/8"]
    words += ["--runs_dir", str(folder / "runs"), "--output_dir", str(folder / "out")]
    command = [sys.executable, "-m", "eval.tune", str(ROOT / "recipes" / "mini.yaml"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_tunes_and_judges_and_repeats_nothing(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    told = tune(tmp_path)
    result = table.read(tmp_path / "out")
    assert "4 runs to choose by" in told
    assert result.settings["paired"] == {"LoRA": None, "Bi-LoRA": True}
    primary = result.summary("Bi-LoRA", "chosen heldout_loss")
    assert primary is not None
    assert primary.pairs == 2
    runs = sorted((tmp_path / "runs").glob("*/*/run.json"))
    parts = [runlog.read_run(run.parent)["config"]["validation_part"] for run in runs]
    assert parts == ["2/8"] * 4 + ["1/8"] * 4  # tests come before trials
    before = [run.stat().st_mtime_ns for run in runs]
    rows = (tmp_path / "out" / "rows.csv").read_bytes()
    starts = {row.metric: row.value for row in result.rows if row.step == 0}
    assert starts["heldout_loss"] != starts["trial heldout_loss"]
    assert tune(tmp_path) == told
    assert [run.stat().st_mtime_ns for run in runs] == before
    assert (tmp_path / "out" / "rows.csv").read_bytes() == rows
