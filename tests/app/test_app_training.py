"""Training curves: files that grow under the reader, rho over the steps, the state, the plots."""

from __future__ import annotations

import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import charts
from app.charts import COLORS, Line, Shown, colors_of, differences, draw, plot, radii
from app.runs import RunItem
from app.training_data import (
    BUSY_SECONDS,
    STALE_SECONDS,
    Reader,
    by_level,
    memory,
    progress,
    radius,
    series,
    smooth,
    thin,
    total_steps,
)
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import MethodOptions
from bilora_diffusion.methods.bilora import BiLoRA
from bilora_diffusion.run import runlog
from bilora_diffusion.run.runlog import RunLog


def record(method: str = "bilora", status: str = "running", **config: Any) -> dict[str, Any]:
    values = {"rho": 0.05, "rho_norm": "scaled", "max_train_steps": 100, **config}
    return {"method": method, "status": status, "config": values, "seed": 0}


def rows(*losses: float | None, first: int = 1) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": loss, "seconds": 0.5}
        for step, loss in enumerate(losses, start=first)
    ]


def shown(
    name: str, found: list[dict[str, Any]], run: dict[str, Any] | None = None, color: int = 0
) -> Shown:
    run = run or record()
    item = RunItem(name, name, run, None)
    return Shown(item, color, found, progress(run, found, 0.0, 0.0))


def write(folder: Path, text: str, mode: str = "a") -> None:
    with (folder / "metrics.jsonl").open(mode, newline="") as file:
        file.write(text)


def test_a_file_is_read_again_where_it_grew_was_cut_or_mended_and_only_then(
    tmp_path: Path,
) -> None:
    log = RunLog(tmp_path)
    log.start({}, method="bilora", seed=0, resume_step=None)
    reader = Reader()
    assert reader.read(tmp_path) == []
    log.metric(1, loss=0.5)
    first = reader.read(tmp_path)
    assert reader.read(tmp_path) is first, "nothing was added, so nothing is read"
    write(tmp_path, '{"step": 2, "lo')
    assert [row["step"] for row in reader.read(tmp_path)] == [1], "a torn line waits for its end"
    write(tmp_path, 'ss": 0.25}\n')
    assert series(reader.read(tmp_path), "loss") == [(1, 0.5), (2, 0.25)]
    assert len(first) == 1, "what was handed out does not change"
    again = RunLog(tmp_path)
    again.start({}, method="bilora", seed=0, resume_step=1)  # cuts off what came after step 1
    for step, loss in ((2, math.nan), (3, math.inf), (4, 0.125)):
        again.metric(step, loss=loss, skipped=True)
    found = reader.read(tmp_path)
    assert series(found, "loss") == [(1, 0.5), (4, 0.125)], "without what is not finite"
    assert series(found, "skipped") == series(found, "unknown") == []
    write(tmp_path, "nonsense\n")
    with pytest.raises(UserError, match="line 5 of "):
        reader.read(tmp_path)
    write(tmp_path, '{"step": 1}\n{"step": 2}\n', mode="w")
    assert len(reader.read(tmp_path)) == 2
    (tmp_path / "metrics.jsonl").unlink()
    assert reader.read(tmp_path) == []


@pytest.mark.parametrize("window", [1, 2, 7, 500])
def test_running_mean(window: int) -> None:
    rng = random.Random(0)
    points = [(2 * at, rng.random()) for at in range(60)]
    values = [value for _, value in points]
    wanted = [np.mean(values[max(0, at - window + 1) : at + 1]) for at in range(60)]
    assert [step for step, _ in smooth(points, window)] == [step for step, _ in points]
    assert [value for _, value in smooth(points, window)] == pytest.approx(wanted)
    assert smooth([], window) == []


def test_thinning_keeps_ends_and_peaks() -> None:
    points = [(at, math.sin(at / 50)) for at in range(5000)]
    points[1234] = (1234, 9.0)
    points[4321] = (4321, -9.0)
    kept = thin(points, 400)
    assert len(kept) <= 402
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert {points[0], points[-1], points[1234], points[4321]} <= set(kept)
    assert thin(points[:400], 400) == points[:400]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_scheduled_rho_is_the_methods_own(schedule: str) -> None:
    line = radius(record(rho_schedule=schedule, max_train_steps=80), 40)
    assert (line[0][0], line[-1][0], len(line)) == (1, 40, 40)
    method = BiLoRA(MethodOptions(rho=0.05, rho_schedule=schedule, num_steps=80))
    for step, value in line:
        method.taken = step
        assert value == pytest.approx(method._radius())


def test_a_constant_rho_is_a_horizontal_line_in_the_units_of_the_norm_where_there_is_a_ball() -> (
    None
):
    for norm in ("scaled", "unscaled"):
        assert radius(record(rho_norm=norm), 40) == [(1, 0.05), (40, 0.05)]
    assert radius(record(), 1) == [(1, 0.05)]
    for run in (
        record("lora"),
        record("lora-sam"),  # its rho bounds a perturbation, not an auxiliary
        record(rho=None),
        record(ball="none"),
        record(rho_schedule="linear", max_train_steps=None),
    ):
        assert radius(run, 40) == []
    assert radius(record(), 0) == [], "before the first step"
    assert draw([], 5) == ""
    assert "<path" not in draw([shown("a", [])], 5)


def test_progress_of_a_running_run() -> None:
    found = [{"step": 0, "heldout_loss": 1.0}, *rows(*[0.1] * 40)]
    run = {**record(), "wall_seconds": 21.5, "peak_memory_bytes": 2**30}
    state = progress(run, found, last_written=1000.0, now=1010.0)
    assert (state.status, state.reason, state.steps, state.total) == ("running", "", 40, 100)
    assert state.left_seconds == pytest.approx(60 * 0.5)
    assert (state.wall_seconds, state.peak_memory_bytes) == (21.5, 2**30)
    assert (memory(825073664), memory(18_467_000_000)) == ("787 MiB", "17.2 GiB")
    epochs = record(max_train_steps=None)
    assert total_steps(epochs) is None
    assert total_steps({**epochs, "num_steps": 60}) == 60


def test_a_run_without_a_heartbeat_is_stalled_but_not_while_it_says_what_it_does() -> None:
    found = rows(0.1, 0.1)
    assert progress(record(), found, 0.0, STALE_SECONDS - 1).status == "running"
    stale = progress(record(), found, 0.0, STALE_SECONDS + 1)
    assert stale.status == "stalled"
    assert "nothing for 3 min 1 s" in stale.reason
    assert stale.left_seconds is None
    slow = [{"step": 1, "seconds": 60.0}]
    assert progress(record(), slow, 0.0, STALE_SECONDS + 1).status == "running", "a step takes long"
    assert progress(record(status="finished"), found, 0.0, 1e9).status == "finished"
    busy = {**record(), "doing": "validation images", "doing_since": "1970-01-01T00:00:00+00:00"}
    state = progress(busy, rows(0.1), 0.0, STALE_SECONDS + 1)
    assert (state.status, state.reason) == ("validation images", "since 3 min 1 s")
    assert state.left_seconds is not None
    assert progress(busy, rows(0.1), 0.0, 2 * BUSY_SECONDS).status == "stalled"
    assert progress({**busy, "doing": "training"}, rows(0.1), 0.0, 1.0).status == "running"
    assert progress({**busy, "doing_since": None}, rows(0.1), 0.0, 1.0).reason == ""
    gone = {**busy, "status": "interrupted"}
    assert progress(gone, rows(0.1), 0.0, 1e9).status == "interrupted"
    state = progress({**record(status="failed"), "error": "a reason"}, rows(0.1), 0.0, 1e9)
    assert (state.status, state.reason) == ("failed", "a reason")


def test_the_record_of_a_real_run(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.start({"rho": 0.05, "max_train_steps": 2}, method="bilora", seed=0, resume_step=None)
    log.metric(1, loss=0.5, auxiliary_norm_before=0.2, auxiliary_norm=0.05, seconds=0.1)
    log.metric(2, loss=0.4, auxiliary_norm_before=0.1, auxiliary_norm=0.05, seconds=0.1)
    log.finish(steps=2)
    run, found = runlog.read_run(tmp_path), Reader().read(tmp_path)
    state = progress(run, found, os.path.getmtime(tmp_path / "run.json"))
    assert (state.status, state.steps, state.total) == ("finished", 2, 2)
    assert state.peak_memory_bytes > 0
    runs = [shown("x", found, run)]
    norms = charts.over(runs, "auxiliary_norm", "auxiliary_norm_before")
    assert [line.points for line in norms] == [[(1, 0.05), (2, 0.05)], [(1, 0.2), (2, 0.1)]]
    assert radii(runs) == [Line("ρ = 0.05", [(1, 0.05), (2, 0.05)], None)]


def test_loss_is_faint_below_its_mean_and_differences_are_to_lora_of_the_same_seed() -> None:
    lora, other_seed = record("lora"), record("lora") | {"seed": 1}
    runs = [
        shown("lora", rows(1.0, 0.5, 0.25), lora),
        shown("lora 1", rows(9.0, 9.0), other_seed, 1),
        shown("ours", rows(0.75, 0.25), None, 2),
    ]
    assert charts.loss(runs[2:], window=2) == [
        Line("ours", [(1, 0.75), (2, 0.25)], 2, faint=True),
        Line("ours", [(1, 0.75), (2, 0.5)], 2),
    ]
    assert differences(runs, "loss") == [Line("ours", [(1, -0.25), (2, -0.25)], 2)]
    assert differences(runs[1:], "loss") == []


def test_equal_rates_and_equal_radii_are_one_line() -> None:
    one, other = [{"step": 1, "lr": 0.5}], [{"step": 1, "lr": 0.1}]
    equal = charts.rates([shown("a", one), shown("b", one)])
    assert equal == [Line("all runs", [(1, 0.5)], None)]
    assert len(charts.rates([shown("a", one), shown("b", other)])) == 2
    short, long, linear = rows(1.0, 1.0), rows(*[1.0] * 9), record(rho_schedule="linear")
    found = radii(
        [shown("a", short), shown("b", long), shown("c", short), shown("d", short, linear)]
    )
    assert [line.name for line in found] == ["ρ = 0.05", "ρ of d"]
    assert found[0].points == [(1, 0.05), (9, 0.05)], "as long as the longest run"


def test_a_plot_names_its_lines_and_its_axis_and_holds_no_foreign_markup() -> None:
    text = record(model_name_or_path="t5")
    found = [{"step": 1, "loss": 0.5, "accuracy": 0.75}]
    both = draw([shown("a", found), shown("b", found, text)], 5)
    for name in ("loss", "loss-text", "accuracy-text"):
        assert f'id="training-{name}"' in both, "those of text have their own"
    assert both.count("<h3>") == 2
    assert "<h3>" not in draw([shown("b", found, text)], 5)
    evil = "<b>"
    html = plot("x", evil, evil, [Line(evil, [(0, 1.0), (4, 0.5)], 3)], zero=True)
    assert evil not in html
    assert 'class="of-3"' in html
    assert "&lt;b&gt; ends at 0.5" in html
    assert plot("x", "t", "c", [Line("a", [], 0)]) == ""
    assert charts.ticks(0, 200) == [0, 50, 100, 150, 200]
    assert charts.ticks(0.061, 0.119) == [0.08, 0.1]
    assert charts.limits([0.5, 0.5]) == (0.475, 0.525)
    low, high = charts.limits([1.0, 2.0], zero=True)
    assert low < 0 < 2 < high
    assert charts.limits([*[1.0] * 99, 2.0, 500.0])[1] < 10, "a rare peak is cut off"


def test_a_run_keeps_its_colour() -> None:
    known = [f"run{at}" for at in range(20)]
    alone = colors_of(["run3"], known)
    assert colors_of(["run1", "run3"], known)["run3"] == alone["run3"]
    crowded = colors_of([f"run{at}" for at in (3, 11, 19, 0, 1, 2, 4, 5)], known)
    assert sorted(crowded.values()) == list(range(COLORS))
    assert crowded["run3"] == alone["run3"]
    assert len(colors_of([*known, "gone"], known)) == COLORS


def test_noise_levels_are_a_change_since_the_start_and_folds_stand_behind_their_mean() -> None:
    key = "heldout_loss_by_level/"
    found = [
        {"step": 0, "heldout_loss": 0.5, f"{key}25": 1.0, f"{key}75": 2.0, f"{key}125": None},
        {"step": 9, "heldout_loss": 0.5, f"{key}25": 0.5, f"{key}75": 2.5, f"{key}125": 1.0},
    ]
    assert by_level(found) == [(25, -0.5), (75, 0.5)]
    assert by_level(rows(1.0)) == []
    folds = {"steps": [0, 5], "folds": [[1.0, 0.5], [2.0, None]], "mean": [1.5, None]}
    assert charts.of_folds([shown("a", []), replace(shown("b", []), folds=folds)]) == [
        Line("b", [(0, 1.0), (5, 0.5)], 0, faint=True),
        Line("b", [(0, 2.0)], 0, faint=True),
        Line("b", [(0, 1.5)], 0),
    ]


def test_a_radius_that_sets_itself_is_drawn_from_the_log() -> None:
    found = [{"step": step, "loss": 1.0, "rho": rho} for step, rho in ((1, 0.3), (2, 0.5))]
    run = shown("auto", found, record(rho="auto"))
    (line,) = radii([run])
    assert (line.name, line.points) == ("ρ of auto", [(1, 0.3), (2, 0.5)])
    assert radius(record(rho="auto"), 2) == []
