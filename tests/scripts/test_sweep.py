"""A sweep of real runs: killed and started again, with a cell that fails, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from bilora_diffusion import mini
from bilora_diffusion.run import runlog
from eval import sweep
from tests.scripts.conftest import ROOT

RECIPE = """
dataset: {images}/train
validation_dataset: {images}/heldout
pretrained_model_name_or_path: mini
instance_prompt: a ToK icon
validation_loss_steps: 1
num_validation_images: 0
max_train_steps: 2
train_batch_size: 1
gradient_accumulation_steps: 1
learning_rate: 1.0e-3
report_to: none
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two steps on two icons, measured on two others."""
    for name, source in (("train", mini.train_dir()), ("heldout", mini.heldout_dir())):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for picture in sorted(source.glob("**/*.png"))[:2]:
            (folder / picture.name).write_bytes(picture.read_bytes())
        assert len(list(folder.iterdir())) == 2
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.format(images=tmp_path / "images"))
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
    said, errors = again.communicate()
    assert again.returncode == 0, errors
    after = finished(runs)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before

    record = json.loads((results / "sweep.json").read_text())
    assert [arm["label"] for arm in record["arms"]] == ["method=lora", "method=bilora"]
    assert record["arms"][1]["paired"] is True
    assert record["arms"][1]["final"]["difference"]["seeds"] == 2
    assert [point["step"] for point in record["arms"][0]["curve"]] == [0, 1, 2]
    assert record["provenance"]["versions"]["torch"]
    table = (results / "sweep.md").read_text()
    assert table in said
    for name in ("sweep.json", "sweep.csv", "sweep.md"):
        assert str(recipe.parent) not in (results / name).read_text()
    with Image.open(results / "sweep.png") as picture:
        assert picture.width > 1000

    # One more arm, whose weights leave the range of numbers at the first step.
    arms = recipe.parent / "arms.yaml"
    hot = "{method: lora, learning_rate: 1e4, lora_alpha: 1e6, adam_weight_decay: 1e4}"
    arms.write_text(f"method=lora: {{method: lora}}\nhot: {hot}\n")
    hot = start(recipe, "--arms", str(arms), "--over", "seed=0", "--control", "method=lora")
    said, errors = hot.communicate()
    assert hot.returncode == 1, errors
    assert "error: 1 of 2 cells failed: hot-seed0-" in errors
    assert "not finite" in errors.splitlines()[-1]
    assert "| hot | 0/1 | missing |" in said
    assert {name: finished(runs)[name] for name in after} == after


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--over", "metod=lora"], 'unknown flag "--metod" (did you mean "--method"?)'),
        (["--over", "method=lora,bilor"], 'did you mean "bilora"?'),
        (["--over", "method=lora,bilora", "--control", "method=full"], "is none of the arms"),
        (["--ovr", "seed=0"], 'unexpected "--ovr" (did you mean "--over"?)'),
        (["--script", "train.py"], 'there is no script "train.py"'),
        (["--arms", "nowhere.yaml"], 'the arms file "nowhere.yaml"'),
        (["--metric"], "expected one argument"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "recipes" / "mini.yaml")
    folders = ["--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "results")]
    assert sweep.main([recipe, *words, *folders]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_recipe_and_a_folder_that_is_a_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(tmp_path / "none.yaml")]) == 2
    assert "there is no recipe" in capsys.readouterr().err
    (tmp_path / "file").touch()
    recipe = str(ROOT / "recipes" / "mini.yaml")
    assert sweep.main([recipe, "--runs_dir", str(tmp_path / "file")]) == 2
    assert "is no folder that can be written" in capsys.readouterr().err


def test_a_dry_run_lists_the_cells_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "recipes" / "mini.yaml")
    words = ["--over", "method=lora,bilora", "seed=0..1", "rho=0.01,0.1", "--dry_run"]
    assert sweep.main([recipe, *words, "--runs_dir", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "3 arms x 2 seeds = 6 cells" in said
    assert said.count("accelerate.commands.launch") == 6
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "sweep", interrupted)
    assert sweep.main(["recipe.yaml"]) == 130
    assert capsys.readouterr().err == (
        "interrupted: the same command goes on where this one stopped.\n"
    )
