"""benchmarks/pictures.py on the miniature: trained, sampled, interrupted, and seeds added later."""

import importlib
import json
import subprocess
import sys

import pytest

from bilora_diffusion.core.errors import UserError
from eval import table
from tests.scripts.runs import ROOT

COMMAND = (
    *(sys.executable, "benchmarks/pictures.py", "--preset", "mini-duotone"),
    *("--variants", "LoRA", "--steps", "2", "--max_prompts", "2"),
    *("--processes", "1"),
)


def run(folder, *words, code=0):
    places = ("--runs_dir", folder / "runs", "--output_dir", folder / "result")
    command = [*map(str, (*COMMAND, *places, *words))]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == code, process.stderr
    return process.stdout + process.stderr


@pytest.mark.slow
def test_checkpoints_are_sampled_with_both_kinds_of_guidance_and_seeds_are_added(tmp_path):
    assert "1 variant x 1 seed = 1 run of 2 steps" in run(tmp_path, "--seeds", "0")
    first = table.read(tmp_path / "result")
    points = {(row.group, row.item, row.step) for row in first.select("truth")}
    assert points == {("LoRA", "guidance 4", 2), ("LoRA", "base's guidance 2", 2)}
    # The base model's prediction changes the images, and so each score.
    adapter, base = (
        first.select("i2t", "LoRA", item)[-1].value for item in ("guidance 4", "base's guidance 2")
    )
    assert adapter != base
    assert first.select("colors")
    assert first.select("heldout_loss")

    # The second seed needs neither runs nor images of the first.
    (tmp_path / "runs").rename(tmp_path / "moved")
    run(tmp_path, "--seeds", "0,1")
    second = table.read(tmp_path / "result")
    assert [row for row in second.rows if row.seed == 0] == list(first.rows)
    line = second.summary("LoRA", "truth", "base's guidance 2", step=2)
    assert line.count == 2
    posted = (tmp_path / "result" / "pictures.json").read_text()
    assert len(json.loads(posted)["rows"]) == len(second.rows)
    assert str(tmp_path) not in posted
    assert str(ROOT) not in posted

    # Rows of other prompts can't stand beside these.
    message = run(tmp_path, "--seeds", "0", "--max_prompts", "1", code=2)
    assert "has a result with images 2" in message


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--variants", "LoRA;Lora"), '--variants has "Lora": choose from LoRA; Bi-LoRA;'),
        (("--guidances", "best:4"), '--guidances has "best:4": write adapter:4 or base:2.'),
        (("--steps", "a"), "--steps: write whole numbers"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("pictures")
    assert pictures.main([*words, "--output_dir", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_the_regret_of_a_rule_is_what_the_best_step_has_more():
    rules = importlib.import_module("benchmarks.step_rules")
    # Step 20 is best for all captions, the loss is lowest at 10, and the last step is 30.
    low, high = [0.5] * 16, [0.75] * 16
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
    picture_table.main([*map(str, folders), "--output_dir", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    for folder in folders:
        result = table.read(folder)
        line = result.summary("Bi-LoRA, per sample", "truth", "guidance 4", step=300)
        row = next(row for row in report.splitlines() if f"{100 * line.difference:+.2f}" in row)
        assert row.startswith(f"| {result.settings['preset']} | Bi-LoRA, per sample |")
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
