"""benchmarks/pictures.py on the miniature: trained, sampled, interrupted, and seeds added later."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from bilora_diffusion.core.errors import UserError
from eval import sweep_plan, table
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

    # The second seed needs neither runs nor images of the first, and the first one stays.
    (tmp_path / "runs").rename(tmp_path / "moved")
    run(tmp_path, "--seeds 1")
    second = table.read(tmp_path / "result")
    assert [row for row in second.rows if row.seed == 0] == list(first.rows)
    assert second.summary("LoRA", "truth", "base's guidance 2", step=2).count == 2
    published = (tmp_path / "result" / "pictures.json").read_text()
    assert len(json.loads(published)["rows"]) == len(second.rows)
    for folder in (tmp_path, ROOT):
        assert str(folder) not in published

    # Nothing is left to do, and the result is the same, with its provenance.
    run(tmp_path, "--seeds 0,1")
    repeated = table.read(tmp_path / "result")
    assert repeated.rows == second.rows
    assert repeated.provenance == second.provenance

    # Rows of other prompts can't stand beside these.
    message = run(tmp_path, "--seeds 0 --max_prompts 1", code=2)
    assert "has a result with images 2" in message


ICONS = ROOT / "results" / "pictures_icons"


def test_runs_that_can_not_stand_beside_recorded_ones_are_refused():
    record = importlib.import_module("benchmarks.picture_record").Record(ICONS)
    entries = record.result.subjects
    settings = {"preset": "mini-icons", "steps": [100, 300, 500, 1000]}
    first = entries[0]
    planned = [sweep_plan.Run(first.label, first.group, first.seed, ())]
    record.require_alike(settings, planned)
    assert list(record.subjects) == [entry.label for entry in entries]

    with pytest.raises(UserError, match=r"has a result with steps \[100, 300, 500, 1000\]"):
        record.require_alike({**settings, "steps": [1000]}, planned)
    # The same variant and seed under another name, which has a hash of the options
    rival = [sweep_plan.Run("lora-seed0-0", first.group, first.seed, ())]
    with pytest.raises(UserError, match=f"has LoRA with seed 0 .*{first.label}"):
        record.require_alike(settings, rival)


def test_an_extended_result_names_what_differs_in_its_provenance():
    record = importlib.import_module("benchmarks.picture_record").Record(ICONS)
    recorded = record.result.provenance
    later = replace(recorded, commit="0" * 40, command="python -m benchmarks.pictures")
    assert record.provenance(later, is_extended=False) == recorded
    extended = record.provenance(later, is_extended=True)
    assert extended.command == later.command
    assert extended.commit == recorded.commit
    assert extended.differing == ["commit"]


def test_a_run_without_a_sampled_checkpoint_is_refused_before_anything_is_trained(tmp_path):
    checks = importlib.import_module("benchmarks.picture_checks")
    checks.require_checkpoints(tmp_path / "new", [500, 2000])
    (tmp_path / "checkpoints" / "step-2000").mkdir(parents=True)
    checks.require_checkpoints(tmp_path, [2000, 4000])
    with pytest.raises(UserError, match="has no checkpoint of step 500: remove that folder"):
        checks.require_checkpoints(tmp_path, [500, 2000])


@pytest.mark.parametrize(
    ("guidance", "sentence"),
    [("base:1", "guidance above 1"), ("adapter:-3", "--guidance_scale is -3")],
)
def test_guidance_that_a_model_does_not_take_is_refused_first(guidance, sentence, tmp_path, capsys):
    flags = f"{FLAGS} --seeds 0 --guidances adapter:4,{guidance} --runs_dir {tmp_path / 'runs'}"
    pictures = importlib.import_module("benchmarks.pictures")
    assert pictures.main([*flags.split(), "--output_dir", str(tmp_path / "result")]) == 2
    assert sentence in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("run.json"))


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
    # Captions beyond the last whole part are not read.
    longer = {step: [*values, 99.0 * step] for step, values in misled.items()}
    assert rules.regrets(longer, {}) == rules.regrets(misled, {})


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


def test_one_table_of_unlike_guidances_has_no_figure(tmp_path, capsys):
    picture_table = importlib.import_module("benchmarks.picture_table")
    folders = [ICONS, ROOT / "results" / "pictures_duotone_guidance"]
    picture_table.main(f"{folders[0]} {folders[1]} --output_dir {tmp_path}".split())
    assert capsys.readouterr().out == f"written: {tmp_path}/report.md\n"
    assert "![" not in (tmp_path / "report.md").read_text()


def test_one_table_of_prompts_without_pictures(tmp_path):
    """As of SDXL on the paper's prompts, whose ground truth is not known."""
    picture_table = importlib.import_module("benchmarks.picture_table")
    result = table.read(ICONS)
    rows = [row for row in result.rows if row.metric in ("i2t", "nearest")]
    lines = [line for line in result.summaries if line.metric in ("i2t", "nearest")]
    results = {"mini-icons": replace(result, rows=rows, summaries=lines)}
    labels = picture_table.guidance_labels(results)
    assert labels == ["guidance 4", "base's guidance 2"]
    text = picture_table.page(results, "", picture_table.draw_fronts(results, labels, tmp_path))
    assert "## ground truth" not in text
    assert "Which step?" not in text
    assert "![fronts](fronts.png)" in text


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
