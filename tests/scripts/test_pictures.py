"""benchmarks/pictures.py on the miniature: trained, sampled, interrupted, and seeds added later."""

import importlib
import json
import subprocess
import sys

import pytest

from bilora_diffusion.core.errors import UserError
from eval import table
from tests.scripts.runs import ROOT

FLAGS = "--preset mini-duotone --variants LoRA --steps 2 --max_prompts 2 --processes 1"


def run(folder, flags, code=0):
    """Everything that the command prints."""
    places = f"--runs_dir {folder / 'runs'} --output_dir {folder / 'result'}"
    command = f"{sys.executable} benchmarks/pictures.py {FLAGS} {places} {flags}".split()
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == code, process.stderr
    return process.stdout + process.stderr


@pytest.mark.slow
def test_checkpoints_are_sampled_with_both_kinds_of_guidance_and_seeds_are_added(tmp_path):
    assert "1 variant x 1 seed = 1 run of 2 steps" in run(tmp_path, "--seeds 0")
    first = table.read(tmp_path / "result")
    points = {(row.group, row.item, row.step) for row in first.select("truth")}
    assert points == {("LoRA", "guidance 4", 2), ("LoRA", "base's guidance 2", 2)}
    # The base model's prediction changes the images, and so each score.
    by_adapter = first.select("i2t", "LoRA", "guidance 4")[-1].value
    by_base = first.select("i2t", "LoRA", "base's guidance 2")[-1].value
    assert by_adapter != by_base
    assert first.select("colors")
    assert first.select("heldout_loss")

    # The second seed needs neither runs nor images of the first.
    (tmp_path / "runs").rename(tmp_path / "moved")
    run(tmp_path, "--seeds 0,1")
    second = table.read(tmp_path / "result")
    assert [row for row in second.rows if row.seed == 0] == list(first.rows)
    assert second.summary("LoRA", "truth", "base's guidance 2", step=2).count == 2
    published = (tmp_path / "result" / "pictures.json").read_text()
    assert len(json.loads(published)["rows"]) == len(second.rows)
    for folder in (tmp_path, ROOT):
        assert str(folder) not in published

    # Rows of other prompts can't stand beside these.
    message = run(tmp_path, "--seeds 0 --max_prompts 1", code=2)
    assert "has a result with images 2" in message


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--variants", "LoRA;Lora", '--variants has "Lora": choose from LoRA; Bi-LoRA;'),
        ("--guidances", "best:4", '--guidances has "best:4": write adapter:4 or base:2.'),
        ("--steps", "a", "--steps: write whole numbers"),
    ],
)
def test_a_wrong_word_is_one_sentence(flag, value, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("pictures")
    assert pictures.main([flag, value, "--output_dir", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_the_regret_of_a_rule_is_what_the_best_step_has_more():
    rules = importlib.import_module("benchmarks.step_rules")
    # Step 20 is best for all captions, the loss is lowest at 10, and the last step is 30.
    low = [0.5] * 16
    high = [0.75] * 16
    truths = {10: low, 20: high, 30: low}
    regrets = rules.regrets(truths, {10: 1.0, 20: 2.0, 30: 3.0})
    assert regrets == {rules.LAST: 0.25, rules.BY_CAPTIONS: 0.0, rules.BY_LOSS: 0.25}
    # Parts are every second caption: one part alone prefers step 10, and the other ones lose by it.
    misled = {10: [0.9, 0.5] * 8, 20: [0.5, 0.9] * 8}
    assert rules.regrets(misled, {})[rules.BY_CAPTIONS] == pytest.approx(0.4)
    assert rules.BY_LOSS not in rules.regrets(misled, {10: 1.0})
    assert rules.regrets({1: [0.5] * 8}, {}) == {}


def test_one_table_has_the_differences_of_all_sets(tmp_path):
    picture_table = importlib.import_module("benchmarks.picture_table")
    folders = [ROOT / "results" / name for name in ("pictures_icons", "pictures_animals")]
    picture_table.main(f"{folders[0]} {folders[1]} --output_dir {tmp_path}".split())
    lines = (tmp_path / "report.md").read_text().splitlines()
    for folder in folders:
        result = table.read(folder)
        summary = result.summary("Bi-LoRA, per sample", "truth", "guidance 4", step=300)
        assert summary is not None
        assert summary.difference is not None
        percent = f"{100 * summary.difference:+.2f}"
        line = next(line for line in lines if percent in line)
        assert line.startswith(f"| {result.settings['preset']} | Bi-LoRA, per sample |")
    assert (tmp_path / "fronts.png").is_file()


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("pictures_icons", "pictures_icons"), "is the second result of mini-icons"),
        (("lora_bilora",), "is a result of sweep: name results of pictures.py"),
    ],
)
def test_one_table_takes_one_result_of_each_set(names, sentence):
    picture_table = importlib.import_module("benchmarks.picture_table")
    with pytest.raises(UserError, match=sentence):
        picture_table.read_results([ROOT / "results" / name for name in names])
