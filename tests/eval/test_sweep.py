"""eval.sweep from its command line to its result, with cells that are run in no time."""

from collections.abc import Mapping, Sequence

import pytest

from bilora_diffusion.core.files import ROOT
from bilora_diffusion.run.runlog import RunLog
from eval import sweep, table
from eval.sweep.cells import Outcome, Runner

RECIPE = str(ROOT / "recipes" / "mini.yaml")
Curves = Mapping[str, Mapping[int, Sequence[tuple[float, float]]]]
TWO: Curves = {
    "lora": {
        0: [(0.10, 0.20), (0.08, 0.16), (0.09, 0.12)],
        1: [(0.10, 0.20), (0.07, 0.16), (0.08, 0.12)],
    },
    "bilora": {
        0: [(0.10, 0.20), (0.07, 0.18), (0.08, 0.14)],
        1: [(0.10, 0.20), (0.08, 0.18), (0.06, 0.14)],
    },
}
"""Arm -> seed -> held-out and training loss before and after each step."""


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """``swept(curves, *words)``: exit code and result; an empty curve is a cell that failed."""

    def run(curves, *words):
        def run_all(runner, cells):
            return [_run(runner.runs_dir, cell, curves) for cell in cells]

        monkeypatch.setattr(Runner, "run_all", run_all)
        arms = tmp_path / "arms.yaml"
        lines = [f'"{arm}": {{method: lora, rank: {n + 2}}}\n' for n, arm in enumerate(curves)]
        arms.write_text("".join(lines))
        seeds = ",".join(map(str, dict.fromkeys(seed for own in curves.values() for seed in own)))
        given = ["--arms", str(arms), "--over", f"seed={seeds}", "--runs_dir", str(tmp_path / "r")]
        code = sweep.main([RECIPE, *given, "--output_dir", str(tmp_path / "out"), *words])
        return code, table.read(tmp_path / "out")

    return run


def _run(runs, cell, curves):
    curve = curves[cell.variant][cell.seed]
    if not curve:
        return Outcome(cell.name, cell.variant, cell.seed, "failed", 2, "the loss is not finite")
    log = RunLog(runs / cell.name)
    log.start({}, method="lora", seed=cell.seed, resume_step=None)
    for step, (heldout, training) in enumerate(curve):
        if step:
            log.metric(step, digest=str(cell.seed), seconds=0.1 * step)
        log.metric(step, heldout_loss=heldout, train_grid_loss=training)
    log.close("finished", steps=len(curve) - 1)
    return Outcome(cell.name, cell.variant, cell.seed, "finished")


def test_arms_are_compared_seed_by_seed(swept, tmp_path, capsys):
    code, result = swept(TWO)
    assert code == 0
    assert result.summary("lora", "final heldout_loss").mean == pytest.approx(0.085)
    assert result.summary("lora", "final heldout_loss").difference is None
    final = result.summary("bilora", "final heldout_loss")
    assert final.difference == pytest.approx(-0.015)
    assert final.difference_interval == pytest.approx((-0.02, -0.01))
    assert (final.lower, final.pairs) == (2, 2)
    best = result.summary("bilora", "best heldout_loss")
    assert best.difference == pytest.approx(-0.01)  # 0.07 - 0.08 and 0.06 - 0.07
    assert result.summary("bilora", "final train_grid_loss").mean == pytest.approx(0.14)
    assert result.summary("bilora", "seconds_per_step").mean == pytest.approx(0.15)  # the median
    assert [line.step for line in result.curve("bilora", "heldout_loss")] == [0, 1, 2]
    # the slowest run sets the level, at which the others are between two points
    level = {"training_loss": pytest.approx(0.14), "set_by": "bilora"}
    assert result.settings["equal_training"] == level
    equal = result.summary("lora", "equal_training heldout_loss")
    assert equal.mean == pytest.approx((0.085 + 0.075) / 2)
    assert result.summary("bilora", "equal_training heldout_loss").mean == pytest.approx(0.07)

    assert (tmp_path / "out" / "report.md").read_text() in capsys.readouterr().out
    assert result.settings["arms"]["bilora"]["options"] == {"method": "lora", "rank": "3"}
    for file in (tmp_path / "out").iterdir():
        assert file.suffix == ".png" or str(tmp_path) not in file.read_text()


def test_a_missing_cell_leaves_the_other_seeds(swept, capsys):
    curves = {"lora": TWO["lora"], "bilora": {0: TWO["bilora"][0], 1: []}, "no": {0: [], 1: []}}
    code, result = swept(curves)
    assert code == 1
    told = capsys.readouterr()
    assert "| bilora | 1/2 | 80.00 | -10.00 [n/a], 1/1 |" in told.out
    assert "| no | 0/2 | n/a |" in told.out
    assert "error: 3 of 6 runs failed: " in told.err
    assert "(exit code 2: the loss is not finite)" in told.err
    assert sum("failed (exit code 2): the loss is not finite" in n for n in result.notes) == 3
    assert result.settings["paired"]["bilora"] is True
    code, result = swept({"lora": {0: []}, "bilora": {0: []}})  # nothing at all
    assert (code, result.provenance) == (1, None)


def test_a_dry_run_lists_the_cells(tmp_path, capsys):
    words = ["--over", "method=lora,bilora", "seed=0..1", "rho=0.01,0.1", "--dry_run"]
    assert sweep.main([RECIPE, *words, "--runs_dir", str(tmp_path / "runs")]) == 0
    told = capsys.readouterr().out
    assert "3 variants x 2 seeds = 6 runs" in told
    assert told.count("accelerate.commands.launch") == 6
    assert list(tmp_path.iterdir()) == []
