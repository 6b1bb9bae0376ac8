"""A sweep of real runs: killed and started again, with a run that fails."""

import json
import signal
import time

import pytest

from bilora_diffusion.run import runlog
from eval import sweep, table
from tests.scripts.runs import started, two_icons

HOT = {"method": "lora", "learning_rate": 1e4, "lora_alpha": 1e6, "adam_weight_decay": 1e4}
"""Its weights leave the range of numbers at the first step."""
VARIANTS = {"lora": {"method": "lora"}, "bilora": {"method": "bilora"}, "hot": HOT}
OPTIONS = {
    "validation_loss_steps": 1,
    "num_validation_images": 0,
    "max_train_steps": 2,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
}


def finished(runs):
    """Finished runs: when their record was last written, and what it holds."""
    return {
        file.parent.name: (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(runs.glob("*/run.json"))
        if runlog.read_run(file.parent)["status"] == "finished"
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_sweep_repeats_nothing_and_a_failing_run_is_told(tmp_path, capfd):
    images = {name: str(value) for name, value in two_icons(tmp_path / "images").items()}
    recipe, file = tmp_path / "tiny.yaml", tmp_path / "three.yaml"
    recipe.write_text(json.dumps({**images, **OPTIONS}))  # YAML reads JSON
    file.write_text(json.dumps({"recipe": str(recipe), "variants": VARIANTS, "seeds": "0"}))
    words, runs = [str(file), "--runs_dir", str(tmp_path / "runs")], tmp_path / "runs" / "three"
    process = started("-m", "eval.sweep", *words)
    while not (before := finished(runs)) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert before
    assert not list((runs / "sweep").iterdir())

    assert sweep.main(words) == 1
    errors = capfd.readouterr().err
    after = finished(runs)
    assert len(after) == 2
    assert {name: after[name] for name in before} == before
    result = table.read(runs / "sweep")
    assert result.groups == ["lora", "bilora", "hot"]
    assert result.settings["paired"] == {"lora": None, "bilora": True}
    assert result.provenance.versions["torch"]
    assert "error: 1 of 3 runs failed: hot-seed0-" in errors
    assert "not finite" in errors.splitlines()[-1]
