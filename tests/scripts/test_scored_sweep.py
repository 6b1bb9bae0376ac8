"""``eval.sweep`` with scores on the miniature: it trains, samples, scores, and adds seeds later."""

import pytest

from eval import sweep
from eval.results import table
from tests.scripts.runs import ROOT

EXPERIMENT = "eval/experiments/pictures_duotone.yaml"
FLAGS = f"{EXPERIMENT} --variants LoRA --steps 2 --max_prompts 2 --processes 1"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Return ``run(flags)``, which runs the command and returns its output."""
    monkeypatch.chdir(ROOT)

    def call(flags, exit_code=0):
        places = f"--runs_dir {tmp_path / 'runs'} --output_dir {tmp_path / 'result'}"
        assert sweep.main(f"{FLAGS} {places} {flags}".split()) == exit_code
        return "".join(capfd.readouterr())

    return call


@pytest.mark.slow
def test_checkpoints_are_sampled_with_both_kinds_of_guidance_and_seeds_are_added(tmp_path, run):
    assert "pictures_duotone: 1 variant x 1 seed = 1 run" in run("--seeds 0")
    first = table.read(tmp_path / "result")
    points = {(row.group, row.item, row.step) for row in first.select("truth")}
    assert points == {("LoRA", "guidance 4", 2), ("LoRA", "base's guidance 2", 2)}
    # Guidance from the base model changes the images, and with them each score.
    by_adapter = first.select("i2t", "LoRA", "guidance 4")[-1].value
    by_base = first.select("i2t", "LoRA", "base's guidance 2")[-1].value
    assert by_adapter != by_base
    assert first.select("colors")
    # The report has the losses too, below the scores.
    assert first.figures == ["fronts.png", "curves.png", "sweep.png"]
    report = (tmp_path / "result" / "report.md").read_text()
    headings = [line for line in report.splitlines() if line.startswith("## ")]
    assert headings[0] == "## ground truth, guidance 4"
    assert headings[-2:] == ["## held-out loss", "## Training"]

    # The second seed needs no runs or images of the first, whose rows are kept.
    (tmp_path / "runs").rename(tmp_path / "moved")
    run("--seeds 1")
    second = table.read(tmp_path / "result")
    first_rows = [row for row in first.rows if not row.metric.startswith("equal_training")]
    assert [row for row in second.rows if row in first_rows] == first_rows
    for metric, item in (("truth", "base's guidance 2"), ("heldout_loss", "")):
        assert second.summary("LoRA", metric, item, step=2).count == 2
    assert second.settings["seeds"] == [0, 1]
    for file in (tmp_path / "result").iterdir():
        for folder in (tmp_path, ROOT):
            assert file.suffix == ".png" or str(folder) not in file.read_text()

    # Nothing is left to do: the rows and the provenance stay the same.
    run("--seeds 0,1")
    repeated = table.read(tmp_path / "result")
    assert sorted(repeated.rows, key=str) == sorted(second.rows, key=str)
    assert repeated.provenance == second.provenance

    # Rows of other prompts can't be added to this result.
    message = run("--seeds 0 --max_prompts 1", exit_code=2)
    assert "has a result with scores.num_prompts 2" in message


@pytest.mark.slow
def test_a_dry_run_prints_the_hours_and_the_memory_of_each_variant(tmp_path, run):
    printed = run("--seeds 0..4 --steps 900,1800 --dry_run --variants LoRA;LoRA-SAM")
    assert "18,000 steps, 5 hours for each second that a step takes" in printed
    assert "80 images with guidance 4, base's guidance 2" in printed
    assert printed.count("--output_dir") == 10
    for variant in ("LoRA:", "LoRA-SAM:"):
        memory = printed[printed.index(f"\n{variant}\n") :]
        assert "GB" in memory or "MB" in memory
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("guidance", "sentence"),
    [
        ("base:1", "guidance above 1"),
        ("0.5:1", "--guidance_from 0.5 is refused"),
        ("adapter:-3", "--guidance_scale is -3"),
    ],
)
def test_unsupported_guidance_is_refused_before_training(guidance, sentence, tmp_path, capsys):
    flags = f"{FLAGS} --seeds 0 --guidances adapter:4,{guidance} --runs_dir {tmp_path / 'runs'}"
    assert sweep.main([*flags.split(), "--output_dir", str(tmp_path / "result")]) == 2
    assert sentence in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("run.json"))
