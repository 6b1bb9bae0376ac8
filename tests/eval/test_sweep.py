"""eval.sweep from its command line to its result, with recorded runs instead of trained ones."""

import json
from typing import Any

import pytest

from bilora_diffusion.core.files import ROOT
from bilora_diffusion.core.statistics import mean_interval
from bilora_diffusion.run.runlog import RunLog
from eval import sweep
from eval.results import table
from eval.sweep.runs import Outcome, Runner

RECIPE = ROOT / "recipes" / "mini.yaml"
# Variant -> seed -> (held-out loss, training loss) before the first step and after each step
CURVES = {
    "lora": {
        0: [(0.10, 0.20), (0.08, 0.16), (0.09, 0.12)],
        1: [(0.10, 0.20), (0.07, 0.16), (0.08, 0.12)],
    },
    "bilora": {
        0: [(0.10, 0.20), (0.07, 0.18), (0.08, 0.14)],
        1: [(0.10, 0.20), (0.08, 0.18), (0.06, 0.14)],
    },
}


@pytest.fixture
def sweep_over(tmp_path, monkeypatch):
    """Return ``sweep_over(curves)``, which returns a sweep's exit code and result.

    The runs have the losses in ``curves``; an empty list is a failed run. All variants have the
    seeds of the variant "lora".
    """

    def run_sweep(curves):
        def record_all(self, runs):
            return [record_run(self.runs_dir, run, curves) for run in runs]

        monkeypatch.setattr(Runner, "run_all", record_all)
        variants = {}
        for rank, name in enumerate(curves, start=2):
            variants[name] = {"method": "lora", "rank": rank}
        content = {"recipe": str(RECIPE), "variants": variants, "seeds": list(curves["lora"])}
        file = tmp_path / "two.yaml"
        file.write_text(json.dumps(content))  # YAML reads JSON
        exit_code = sweep.main([str(file), "--runs_dir", str(tmp_path / "runs")])
        return exit_code, table.read(tmp_path / "runs" / "two" / "sweep")

    return run_sweep


def record_run(runs_dir, run, curves):
    curve = curves[run.variant][run.seed]
    if not curve:
        return Outcome(run.name, run.variant, run.seed, "failed", 2, "the loss is not finite")
    log = RunLog(runs_dir / run.name)
    log.start({}, method="lora", seed=run.seed, resume_step=None)
    for step, (heldout, training) in enumerate(curve):
        if step:
            log.metric(step, digest=str(run.seed), seconds=0.1 * step)
        log.metric(step, heldout_loss=heldout, train_grid_loss=training)
    # As for a run with --keep_best
    best: dict[str, Any] = {"best_step": 1} if run.variant == "kept" else {}
    log.close("finished", steps=len(curve) - 1, **best)
    return Outcome(run.name, run.variant, run.seed, "finished")


def test_variants_are_compared_seed_by_seed(sweep_over, tmp_path, capsys):
    exit_code, result = sweep_over(CURVES)
    assert exit_code == 0
    assert result.summary("lora", "final heldout_loss").mean == pytest.approx(0.085)
    final = result.summary("bilora", "final heldout_loss")
    assert final.difference == pytest.approx(-0.015)
    assert final.difference_interval == pytest.approx(mean_interval([-0.02, -0.01]))
    assert (final.lower, final.pairs) == (2, 2)
    best = result.summary("bilora", "best heldout_loss")
    assert best.difference == pytest.approx(-0.01)  # 0.07 - 0.08 and 0.06 - 0.07
    assert result.summary("bilora", "seconds_per_step").mean == pytest.approx(0.15)  # median
    # The slowest run sets the level; the others reach it between two points.
    level = {"training_loss": pytest.approx(0.14), "set_by": "bilora"}
    assert result.settings["equal_training"] == level
    equal = result.summary("lora", "equal_training heldout_loss")
    assert equal.mean == pytest.approx((0.085 + 0.075) / 2)

    folder = tmp_path / "runs" / "two" / "sweep"
    assert (folder / "report.md").read_text() in capsys.readouterr().out
    assert result.settings["variants"]["bilora"] == {"method": "lora", "rank": "3"}
    for file in folder.iterdir():
        assert file.suffix == ".png" or str(tmp_path) not in file.read_text()


def test_the_final_loss_is_that_of_the_saved_weights(sweep_over):
    _, result = sweep_over({"lora": CURVES["lora"], "kept": CURVES["lora"]})
    assert result.summary("lora", "final heldout_loss").mean == pytest.approx(0.085)
    assert result.summary("kept", "final heldout_loss").mean == pytest.approx(0.075)
    assert result.summary("kept", "best heldout_loss").mean == pytest.approx(0.075)


def test_the_seeds_of_failed_runs_are_left_out(sweep_over, capsys):
    curves = {
        "lora": CURVES["lora"],
        "bilora": {0: CURVES["bilora"][0], 1: []},
        "no": {0: [], 1: []},
    }
    exit_code, result = sweep_over(curves)
    assert exit_code == 1
    output = capsys.readouterr()
    assert "| bilora | 1/2 | 80.00 | -10.00 [n/a], 1/1 |" in output.out
    assert "| no | 0/2 | n/a |" in output.out
    assert "error: 3 of 6 runs failed: " in output.err
    assert "(exit code 2: the loss is not finite)" in output.err
    notes = [note for note in result.notes if "failed (exit code 2): the loss" in note]
    assert len(notes) == 3
    assert result.settings["paired"]["bilora"] is True


def test_a_sweep_without_a_finished_run_writes_a_result(sweep_over):
    exit_code, result = sweep_over({"lora": {0: []}, "bilora": {0: []}})
    assert (exit_code, result.provenance) == (1, None)


def test_a_dry_run_lists_the_runs_of_each_recipe(tmp_path, capsys):
    recipe = tmp_path / "other.yaml"
    recipe.write_text("dataset: mini")
    content = {"recipe": [str(RECIPE), str(recipe)], "axes": {"method": ["lora", "bilora"]}}
    (tmp_path / "two.yaml").write_text(json.dumps(content))
    words = [str(tmp_path / "two.yaml"), "--runs_dir", str(tmp_path / "runs"), "--seeds", "0..1"]
    assert sweep.main([*words, "--dry_run"]) == 0
    output = capsys.readouterr().out
    for name in ("two/mini", "two/other"):
        assert f"{name}: 2 variants x 2 seeds = 4 runs" in output
        assert output.count(f"--output_dir {tmp_path}/runs/{name}/") == 4
    assert not (tmp_path / "runs").exists()
    assert sweep.main([*words, "--output_dir", str(tmp_path)]) == 2
    assert "--output_dir is one folder for 2 comparisons" in capsys.readouterr().err
