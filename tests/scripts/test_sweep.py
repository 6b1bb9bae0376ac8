"""A sweep of real runs: killed and started again, and with a cell that fails."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bilora_diffusion.run import runlog
from eval import table
from tests.scripts.runs import ROOT, two_icons


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two steps on two icons, measured on two others."""
    values = {
        **{name: str(value) for name, value in two_icons(tmp_path / "images").items()},
        **{"validation_loss_steps": 1, "num_validation_images": 0, "max_train_steps": 2},
        **{"train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3},
        "report_to": "none",
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def start(recipe: Path, *words: str) -> subprocess.Popen[str]:
    folder = recipe.parent
    own = ["--runs_dir", str(folder / "runs"), "--output_dir", str(folder / "results")]
    return subprocess.Popen(
        [sys.executable, "-m", "eval.sweep", str(recipe), *words, *own],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(runs: Path) -> dict[str, tuple[int, str]]:
    """Finished cells: when their record was last written, and its digest."""
    found = {}
    for file in sorted(runs.glob("*/run.json")):
        if runlog.read_run(file.parent)["status"] == "finished":
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[file.parent.name] = (file.stat().st_mtime_ns, digest)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_sweep_repeats_nothing_and_a_failing_cell_is_told(recipe: Path) -> None:
    runs, results = recipe.parent / "runs", recipe.parent / "results"
    words = ["--over", "method=lora,bilora", "seed=0,1"]
    first = start(recipe, *words)
    while not (before := finished(runs)) and first.poll() is None:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert before
    assert not results.exists() or not list(results.iterdir())

    again = start(recipe, *words)
    told, errors = again.communicate()
    assert again.returncode == 0, errors
    after = finished(runs)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before

    result = table.read(results)
    assert result.groups == ["method=lora", "method=bilora"]
    assert result.settings["paired"] == {"method=lora": None, "method=bilora": True}
    final = result.summary("method=bilora", "final heldout_loss")
    assert final is not None
    assert final.pairs == 2
    steps = [point.step for point in result.over_training("method=lora", "heldout_loss")]
    assert steps == [0, 1, 2]
    assert result.provenance is not None
    assert result.provenance.versions["torch"]
    assert (results / "report.md").read_text() in told
    for file in results.iterdir():
        assert file.suffix == ".png" or str(recipe.parent) not in file.read_text()

    # One more arm, whose weights leave the range of numbers at the first step.
    arms = recipe.parent / "arms.yaml"
    hot = "{method: lora, learning_rate: 1e4, lora_alpha: 1e6, adam_weight_decay: 1e4}"
    arms.write_text(f"method=lora: {{method: lora}}\nhot: {hot}\n")
    third = start(recipe, "--arms", str(arms), "--over", "seed=0", "--control", "method=lora")
    told, errors = third.communicate()
    assert third.returncode == 1, errors
    assert "error: 1 of 2 cells failed: hot-seed0-" in errors
    assert "not finite" in errors.splitlines()[-1]
    assert "| hot | 0/1 | n/a |" in told
    assert {name: finished(runs)[name] for name in after} == after
