"""A sweep of real runs that is killed and started again, and has a run that fails."""

import json
import signal
import time

import pytest

from bilora_diffusion.run import runlog
from eval import sweep
from eval.results import table
from tests.scripts.runs import started, two_icons

HOT = {"method": "lora", "learning_rate": 1e4, "lora_alpha": 1e6, "adam_weight_decay": 1e4}
"""Options of a run whose weights overflow in the first step."""
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
    """Return the modification time and the content of each finished run's record, by run name."""
    records = {}
    for file in runs.glob("*/run.json"):
        if runlog.read_run(file.parent)["status"] == "finished":
            records[file.parent.name] = (file.stat().st_mtime_ns, file.read_bytes())
    return records


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_sweep_repeats_no_run_and_a_failed_run_is_reported(tmp_path, capfd):
    recipe = tmp_path / "tiny.yaml"
    options = {**two_icons(tmp_path / "images"), **OPTIONS}
    recipe.write_text(json.dumps(options, default=str))  # YAML reads JSON
    experiment = tmp_path / "three.yaml"
    values = {"recipe": str(recipe), "variants": VARIANTS, "seeds": "0"}
    experiment.write_text(json.dumps(values))
    runs = tmp_path / "runs" / "three"
    argv = f"{experiment} --runs_dir {tmp_path / 'runs'}".split()
    process = started("-m", "eval.sweep", *argv)
    while not finished(runs) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(runs)
    assert before
    assert not list((runs / "sweep").iterdir())

    assert sweep.main(argv) == 1
    errors = capfd.readouterr().err
    after = finished(runs)
    assert len(after) == 2
    assert before.items() <= after.items()
    result = table.read(runs / "sweep")
    assert result.groups == ["lora", "bilora", "hot"]
    assert result.settings["paired"] == {"lora": None, "bilora": True}
    assert result.provenance.versions["torch"]
    assert "error: 1 of 3 runs failed: hot-seed0-" in errors
    assert "not finite" in errors.splitlines()[-1]
