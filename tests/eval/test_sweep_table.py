"""From run folders to a sweep's table: pairing, missing cells, files that can be shared."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bilora_diffusion.errors import UserError
from eval import provenance, sweep_plot, sweep_table
from eval.cells import Outcome
from eval.grid import Arm, Grid
from eval.records import SWEEP
from eval.sweep_result import SweepResult, compare

HOME = "/" + "home"  # put together here, as no file may name such a folder


def write_run(folder: Path, curve: Sequence[tuple[float, float]], digest: str = "d") -> None:
    """A finished run with a measurement before and after each of its steps."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step, (heldout, training) in enumerate(curve):
        if step:
            rows.append({"step": step, "digest": f"{digest}{step}", "seconds": 0.1 * step})
        rows.append({"step": step, "heldout_loss": heldout, "train_grid_loss": training})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "schema_version": 1,
        "status": "finished",
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "uncommitted_changes": False,
        "device": {"type": "cpu", "name": "A CPU", "cpu_cores": 2},
        "config": {"output_dir": str(folder)},
    }
    (folder / "run.json").write_text(json.dumps(record))


Curves = Mapping[str, Mapping[int, Sequence[tuple[float, float]]]]


def result(
    tmp_path: Path, curves: Curves, digests: Mapping[str, str] | None = None, **settings: Any
) -> SweepResult:
    """What a sweep over these arms and seeds finds; an empty curve is a cell that failed."""
    outcomes = []
    for label, runs in curves.items():
        for seed, curve in runs.items():
            name = f"{label}-seed{seed}".replace(" ", "-").replace("|", "-")
            if curve:
                write_run(tmp_path / name, curve, f"{seed}{(digests or {}).get(label, '')}")
                outcomes.append(Outcome(name, label, seed, "finished"))
            else:
                outcomes.append(Outcome(name, label, seed, "failed", 2, "the loss is not finite"))
    seeds = tuple(sorted({seed for runs in curves.values() for seed in runs}))
    grid = Grid(tuple(Arm(label, {"method": label}) for label in curves), seeds, ())
    options: dict[str, Any] = {
        "control": next(iter(curves)),
        "metric": "heldout_loss",
        "higher_is_better": False,
        "recipe": Path("recipes/mini.yaml"),
        "command": "python -m eval.sweep",
    }
    return compare(grid, outcomes, tmp_path, **{**options, **settings})


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


def test_the_figures_are_paired_by_seed(tmp_path: Path) -> None:
    found = result(tmp_path, TWO)
    lora, bilora = found.arms
    assert lora.final.mean == pytest.approx(0.085)
    assert lora.final.difference is None
    assert bilora.paired is True
    final = bilora.final.difference
    assert final is not None
    assert final.mean == pytest.approx(-0.015)
    assert (final.better, final.seeds) == (2, 2)
    assert final.interval is not None
    assert final.interval.low == pytest.approx(-0.02)
    assert final.interval.high == pytest.approx(-0.01)
    best = bilora.best.difference
    assert best is not None
    assert best.mean == pytest.approx(-0.01)  # 0.07 - 0.08 and 0.06 - 0.07
    assert bilora.final_training_loss == pytest.approx(0.14)
    assert bilora.seconds_per_step == pytest.approx(0.15)  # the median of 0.1 and 0.2
    assert [point.step for point in bilora.curve] == [0, 1, 2]


def test_equal_training_loss_is_that_of_the_slowest_run(tmp_path: Path) -> None:
    found = result(tmp_path, TWO)
    assert found.equal_training is not None
    assert found.equal_training.training_loss == pytest.approx(0.14)
    assert found.equal_training.set_by == "bilora"
    lora, bilora = found.arms
    assert lora.equal_training.mean == pytest.approx((0.085 + 0.075) / 2)  # between two points
    assert bilora.equal_training.mean == pytest.approx(0.07)


def test_an_arm_that_never_learns_does_not_set_the_level(tmp_path: Path) -> None:
    stuck = {0: [(0.10, 0.20), (0.11, 0.30)], 1: [(0.10, 0.20), (0.09, 0.15)]}
    found = result(tmp_path, {**TWO, "stuck": stuck})
    assert found.equal_training is not None
    assert found.equal_training.set_by == "bilora"
    assert found.arms[2].equal_training.mean is None


def test_other_inputs_are_not_paired(tmp_path: Path) -> None:
    found = result(tmp_path, TWO, digests={"bilora": "other"})
    bilora = found.arms[1]
    assert bilora.paired is False
    assert bilora.final.mean == pytest.approx(0.07)
    assert bilora.final.difference is None
    assert found.equal_training is not None
    assert found.equal_training.set_by == "lora"
    table = sweep_table.to_markdown(found)
    assert table.count("not paired") == 3
    assert "bilora has not the control's inputs at each step" in table


def test_a_shorter_arm_is_paired_by_the_steps_that_both_have(tmp_path: Path) -> None:
    short = {seed: curve[:2] for seed, curve in TWO["bilora"].items()}
    assert result(tmp_path, {**TWO, "short": short}).arms[2].paired is True


def test_a_missing_cell_leaves_the_other_seeds(tmp_path: Path) -> None:
    curves = {"lora": TWO["lora"], "bilora": {0: TWO["bilora"][0], 1: []}, "no": {0: [], 1: []}}
    found = result(tmp_path, curves)
    _, bilora, no = found.arms
    assert (bilora.seeds, bilora.missing) == ([0], [1])
    assert bilora.final.difference is not None
    assert bilora.final.difference.seeds == 1
    assert bilora.final.difference.interval is None
    assert (no.seeds, no.missing, no.final.mean) == ([], [0, 1], None)
    table = sweep_table.to_markdown(found)
    assert "| bilora | 1/2 | 80.00 | -10.00 [n/a], 1/1 |" in table
    assert "| no | 0/2 | missing |" in table
    assert "Missing: bilora-seed1, failed (exit code 2): the loss is not finite" in table
    sweep_plot.plot(found, tmp_path / "sweep.png")


def test_nothing_finished_is_a_table_all_the_same(tmp_path: Path) -> None:
    found = result(tmp_path, {"lora": {0: []}, "bilora": {0: []}})
    assert found.provenance is None
    assert "| lora (control) | 0/1 | missing |" in sweep_table.to_markdown(found)
    sweep_table.to_csv(found)
    sweep_plot.plot(found, tmp_path / "sweep.png")


def test_the_table_is_for_reading(tmp_path: Path) -> None:
    lines = sweep_table.to_markdown(result(tmp_path, TWO)).splitlines()
    assert lines[0].startswith("`heldout_loss` x 1000 of mini.yaml, lower is better")
    assert lines[2].startswith("| arm | seeds | final | difference | lowest over training |")
    assert "at equal training loss (140.00)" in lines[2]
    assert lines[4].startswith("| lora (control) | 2/2 | 85.00 |  | 75.00 |  |")
    assert lines[5].startswith("| bilora | 2/2 | 70.00 | -15.00 [-20.00, -10.00], 2/2 | 65.00 |")
    assert lines[5].endswith("| 140.00 | 0.15 |")
    assert all(line.count("|") == lines[3].count("|") for line in lines[2:6])
    assert "- A CPU, 2 cores, torch 2.13.0, commit 0123456789ab." in lines


def test_a_metric_may_be_better_when_higher(tmp_path: Path) -> None:
    found = result(tmp_path, TWO, higher_is_better=True)
    bilora = found.arms[1]
    assert bilora.final.difference is not None
    assert bilora.final.difference.better == 0
    assert bilora.best.mean == pytest.approx(0.10)
    assert "highest over training" in sweep_table.to_markdown(found)


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"heldout_los" \(did you mean "heldout_loss"\?\)'):
        result(tmp_path, TWO, metric="heldout_los")


def test_csv_and_json_are_whole(tmp_path: Path) -> None:
    found = result(tmp_path, TWO)
    rows = list(csv.DictReader(io.StringIO(sweep_table.to_csv(found))))
    assert [row["arm"] for row in rows] == ["lora", "bilora"]
    assert float(rows[1]["final_difference"]) == pytest.approx(-0.015)
    assert rows[0]["final_difference"] == ""
    record = json.loads(SWEEP.text(found))
    assert record["schema_version"] == 1
    assert record["arms"][1]["final"]["difference"]["better"] == 2
    assert record["provenance"]["commit"] == "0123456789abcdef"
    assert [cell["final"] for cell in record["cells"]] == [0.09, 0.08, 0.08, 0.06]


def test_no_machine_path_gets_into_a_result(tmp_path: Path) -> None:
    command = provenance.command_line(
        "eval.sweep",
        [str(provenance.ROOT / "recipes" / "mini.yaml"), "--set", f"dataset={HOME}/me/my icons"],
    )
    assert command == "python -m eval.sweep recipes/mini.yaml --set 'dataset=my icons'"
    found = result(tmp_path / "runs", TWO, command=command)
    texts = [SWEEP.text(found), sweep_table.to_csv(found), sweep_table.to_markdown(found)]
    assert not any(str(tmp_path) in text for text in texts)
    assert provenance.without_paths(f"no {HOME}/me/a.png: look") == "no a.png: look"
    assert provenance.without_paths("1 s/step, https://a.b/c, runs/x and/or") == (
        "1 s/step, https://a.b/c, runs/x and/or"
    )
    assert provenance.without_paths(f"--scorer=hf:{HOME}/me/clip blip:a/b") == (
        "--scorer=hf:clip blip:a/b"
    )


def test_runs_of_other_commits_are_told(tmp_path: Path) -> None:
    record = {"versions": {}, "commit": "a", "uncommitted_changes": False, "device": {}}
    made = provenance.of_runs("x", [record, {**record, "commit": "b"}])
    assert (made.commit, made.differing) == ("a", ["commit"])


def test_twelve_arms_are_drawn(tmp_path: Path) -> None:
    curves: dict[str, Any] = {"lora": TWO["lora"]}
    for number in range(11):
        curves[f"bilora, an option with a name, rho={number}"] = {
            seed: [(value - 0.001 * number * (seed + 1) * step, fit) for step, (value, fit) in
                   enumerate(curve)]
            for seed, curve in TWO["lora"].items()
        }  # fmt: skip
    found = result(tmp_path, curves)
    sweep_plot.plot(found, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width >= 1200
    looks = [str(look) for look in sweep_plot._looks(found, lambda number: number).values()]
    assert len(set(looks)) == 12
    assert "With 11 intervals in a column" in sweep_table.to_markdown(found)


def test_an_arm_that_diverged_does_not_hide_the_others(tmp_path: Path) -> None:
    def runs(final: float) -> dict[int, list[tuple[float, float]]]:
        return {seed: [(0.12, 0.1), (final + seed / 1000, 0.05)] for seed in range(3)}

    arms = {"LoRA": 0.08, "near": 0.081, "nearer": 0.0795, "far": 1.3}
    found = result(tmp_path, {label: runs(final) for label, final in arms.items()})
    assert sweep_plot.astray(found) == {"far"}
    sweep_plot.plot(found, tmp_path / "sweep.png")
    assert sweep_plot.astray(result(tmp_path / "alone", {"LoRA": runs(0.08)})) == frozenset()
