"""The tab Training: the lines of each plot, the state of the runs, and the tab's updates."""

import math

import gradio as gr
import pytest

from app import training
from app.catalog import Catalog
from app.runs import BUSY_SECONDS, STALE_SECONDS, RunItem, find_progress
from app.training_data import (
    COLORS,
    CONCEPT_COLORS,
    DASHES,
    FAINT,
    GREY,
    RADIUS,
    TITLES,
    Line,
    TrainingRun,
    ceiling,
    changes_by_level,
    charts,
    legend,
    table,
    thin,
)
from bilora_diffusion.run.runlog import RunLog
from tests.app.folders import make_run


def record(method="bilora", status="running", **config):
    values = {"rho": 0.05, "rho_norm": "scaled", "max_train_steps": 100, **config}
    return {"method": method, "status": status, "config": values, "seed": 0}


def rows(*losses):
    """Return the rows of a log with these losses."""
    log_rows = []
    for step, loss in enumerate(losses, start=1):
        log_rows.append({"step": step, "loss": loss, "seconds": 0.5})
    return log_rows


def training_run(name, log_rows, run=None, color=0, data_hash=None):
    run = run or record()
    item = RunItem(name, name, run, None, data_hash=data_hash)
    return TrainingRun(item, color, log_rows, find_progress(run, log_rows, 0.0, 0.0))


def descriptions(lines):
    """Return the name, points and color of each line."""
    return [(line.name, line.points, line.color) for line in lines]


def test_thinning_keeps_ends_and_peaks():
    points = [(step, math.sin(step / 50)) for step in range(5000)]
    points[1234] = (1234, 9.0)
    points[4321] = (4321, -9.0)
    thinned = thin(points, 400)
    assert len(thinned) <= 402  # the ends are kept in addition
    assert thinned == sorted(thinned)
    assert {points[0], points[-1], points[1234], points[4321]} <= set(thinned) <= set(points)
    assert thin(points[:400], 400) == points[:400]


def test_a_rare_peak_is_above_the_ceiling_of_a_chart():
    values = [1.0 + step % 2 for step in range(200)]  # between 1 and 2
    assert ceiling(values) is None
    values[100] = 500.0
    assert 2 < (ceiling(values) or 0) < 10


def test_progress_of_a_running_run():
    losses = [0.1] * 40
    log_rows = [{"step": 0, "heldout_loss": 1.0}, *rows(*losses)]
    run = record() | {"wall_seconds": 21.5, "peak_memory_bytes": 2**30}
    state = find_progress(run, log_rows, last_written=1000.0, current_time=1010.0)
    assert (state.status, state.reason, state.steps, state.total) == ("running", "", 40, 100)
    assert state.left_seconds == pytest.approx(60 * 0.5)  # 60 steps of half a second
    assert (state.wall_seconds, state.peak_memory_bytes) == (21.5, 2**30)
    # A run with a number of epochs has no number of steps until it records one.
    run = record(max_train_steps=None)
    assert find_progress(run, log_rows, 0.0, 0.0).total is None
    assert find_progress(run | {"num_steps": 60}, log_rows, 0.0, 0.0).total == 60


def test_a_silent_run_is_stalled_unless_it_is_busy_with_something_else():
    log_rows = rows(0.1, 0.1)
    assert find_progress(record(), log_rows, 0.0, STALE_SECONDS - 1).status == "running"
    stale = find_progress(record(), log_rows, 0.0, STALE_SECONDS + 1)
    assert stale.status == "stalled"
    assert "nothing for 3 min 1 s" in stale.reason
    assert stale.left_seconds is None
    slow = [{"step": 1, "seconds": 60.0}]
    state = find_progress(record(), slow, 0.0, STALE_SECONDS + 1)
    assert state.status == "running", "slow steps must not count as silence"
    assert find_progress(record(status="finished"), log_rows, 0.0, 1e9).status == "finished"
    busy = record() | {"doing": "validation images", "doing_since": "1970-01-01T00:00:00+00:00"}
    state = find_progress(busy, rows(0.1), 0.0, STALE_SECONDS + 1)
    assert (state.status, state.reason) == ("validation images", "for 3 min 1 s")
    assert find_progress(busy, rows(0.1), 0.0, 2 * BUSY_SECONDS).status == "stalled"
    state = find_progress(record(status="failed") | {"error": "a reason"}, rows(0.1), 0.0, 1e9)
    assert (state.status, state.reason) == ("failed", "a reason")


def test_the_losses_of_steps_are_faint_and_differences_are_from_lora_with_the_same_seed():
    lora, other_seed = record("lora"), record("lora") | {"seed": 1}
    runs = [
        training_run("lora", rows(1.0, 0.5, 0.25), lora),
        training_run("lora 1", rows(9.0, 9.0), other_seed, 1),
        training_run("ours", rows(0.75, 0.25), None, 2),
    ]
    # The mean over two steps, drawn over the faint losses of each step
    assert charts(runs[2:], window=2)["loss"] == [
        Line("ours, each step", [(1, 0.75), (2, 0.25)], COLORS[2] + FAINT),
        Line("ours", [(1, 0.75), (2, 0.5)], COLORS[2]),
    ]
    # Differences exist only at steps of both runs.
    assert charts(runs, window=1)["loss-difference"] == [
        Line("LoRA with the same seed", [(1, 0.0), (2, 0.0)], GREY),
        Line("ours", [(1, -0.25), (2, -0.25)], COLORS[2]),
    ]
    # LoRA with another seed or on other data is not a control.
    other_data = training_run("other", rows(1.0, 0.5), lora, data_hash="d0")
    for unpaired in (runs[1:], [other_data, runs[2]]):
        assert table(charts(unpaired, window=1)["loss-difference"]).empty
    assert charts([], 5).keys() == TITLES.keys()


def test_the_control_of_a_run_has_the_same_target():
    guided, lora = record("lora", guided_target=1.5), record("lora")
    runs = [
        training_run("guided", rows(9.0), guided),
        training_run("lora", rows(1.0), lora, 1),
        training_run("ours", rows(0.75), None, 2),
    ]
    _, ours = charts(runs, window=1)["loss-difference"]
    assert ours.points == [(1, -0.25)]


def test_the_first_choice_is_runs_in_progress_the_newest_pair_and_the_newest_others():
    def run(name, method, data_hash, day, status="finished"):
        values = record(method, status) | {"started_at": f"2026-01-0{day}"}
        return RunItem(name, name, values, None, data_hash=data_hash)

    pair = [run("dog", "bilora", "d", 1), run("dog-lora", "lora", "d", 2)]
    singles = [run(f"x{day}", "bilora", f"x{day}", day) for day in (3, 4, 5)]
    busy = run("busy", "bilora", "y", 6, "running")

    def first(runs):
        newest_first = sorted(runs, key=lambda run: run.started_at, reverse=True)
        return {run.name for run in training.first_choice(newest_first)}

    assert first([*pair, *singles]) == {"dog", "dog-lora", "x5", "x4"}
    assert first([*pair, *singles, busy]) == {"busy", "dog", "dog-lora", "x5"}
    assert first(singles[:1]) == {"x3"}
    assert first([]) == set()


def test_a_difference_of_held_out_losses_is_in_percent_of_loras_loss():
    lora_rows = [{"step": 0, "heldout_loss": 0.0}, {"step": 5, "heldout_loss": 0.08}]
    our_rows = [{"step": 0, "heldout_loss": 1.0}, {"step": 5, "heldout_loss": 0.0798}]
    runs = [training_run("lora", lora_rows, record("lora")), training_run("ours", our_rows)]
    (_, ours) = charts(runs, window=1)["heldout-difference"]
    assert ours.points == [(5, pytest.approx(-0.25))]  # no point if LoRA's loss is zero


def test_the_radius_is_dashed_on_top_of_the_norm():
    log_rows = [{"step": step, "auxiliary_norm": 0.05} for step in (1, 2)]
    norm, radius = charts([training_run("ours", log_rows)], window=1)["norm"][1:]
    assert norm.points == radius.points == [(1, 0.05), (2, 0.05)]
    assert radius.color == GREY + RADIUS
    # The axis starts at 0, so a constant norm is not at the edge of the plot.
    assert training.plot_properties([norm], [0.05, 0.05], from_zero=True)["y_lim"] == [0, None]
    assert training.plot_properties([norm], [0.05, 0.05])["y_lim"] is None


def test_a_constant_learning_rate_is_on_the_card_and_not_in_a_plot():
    constant = training_run("a", [{"step": step, "lr": 2e-4} for step in (1, 2)])
    changing = training_run("b", [{"step": step, "lr": 1e-3 / step} for step in (1, 2)])
    starting = training_run("c", [])
    assert charts([constant, starting], window=1)["rate"] == []
    assert len(charts([constant, changing], window=1)["rate"]) == 2
    card_list = training.cards_html([constant, changing])
    assert card_list.count("learning rate") == 1
    assert "learning rate 0.0002" in card_list


def test_losses_by_noise_level_are_changes_since_the_start():
    key = "heldout_loss_by_level/"
    log_rows = [
        {"step": 0, "heldout_loss": 0.5, f"{key}25": 1.0, f"{key}75": 2.0, f"{key}125": None},
        {"step": 9, "heldout_loss": 0.5, f"{key}25": 0.5, f"{key}75": 2.5, f"{key}125": 1.0},
    ]
    assert changes_by_level(log_rows) == [(25, -0.5), (75, 0.5)]  # level 125 starts without a value
    assert changes_by_level(rows(1.0)) == []


def test_concepts_have_colors_and_runs_have_dashes_and_both_are_in_the_legend():
    key = "heldout_loss_by_concept/"
    log_rows = [
        {"step": 0, "heldout_loss": 0.5, f"{key}dog": 1.0, f"{key}a/b": 2.0, f"{key}owl": None},
        {"step": 9, "heldout_loss": 0.5, f"{key}dog": 0.5, f"{key}a/b": 2.5, f"{key}owl": None},
    ]
    runs = [
        training_run("ours", log_rows),
        training_run("plain", log_rows, record("lora"), 1),
        training_run("without concepts", rows(1.0)),
    ]
    dog, ab = [(0, 1.0), (9, 0.5)], [(0, 2.0), (9, 2.5)]
    first, second = CONCEPT_COLORS[:2]
    lines = charts(runs, window=1)["concepts"]
    assert descriptions(lines) == [
        ("ours, dog", dog, first),
        ("ours, a/b", ab, second),
        ("plain, dog", dog, first + DASHES[1]),
        ("plain, a/b", ab, second + DASHES[1]),
    ]
    colors = [("dog", first), ("a/b", second)]
    dashes = [("ours", GREY), ("plain", GREY + DASHES[1])]
    assert legend(lines) == colors + dashes


def test_only_settings_that_differ_are_listed():
    runs = [
        training_run("a", [], record(rank=4, output_dir="a", concepts=[])),
        training_run("<b>", [], record("lora", rank=8, output_dir="b", rho=None)),
    ]
    assert training.differing_settings(runs) == {
        "rho": ["0.05", "–"],
        "rank": ["4", "8"],
        "concepts": ["[]", "–"],
    }
    assert training.differing_settings(runs[:1]) == {}
    assert "<b>" not in training.settings_html(runs)


def write(run, text):
    """Append a text to a run's log."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text)


def plotted(tab, update, name):
    """Return the points (step, value, name) of a plot; [] if it is hidden."""
    index = list(tab.plots).index(name)
    if not update[tab.properties][index]["visible"]:
        return []
    return update[tab.plots[name]].to_numpy().tolist()


def test_the_tab_follows_a_run_and_sends_only_the_cards_if_nothing_is_new(tmp_path):
    make_run(tmp_path / "text", config={"model_name_or_path": "t5"}, seed=1)
    write(tmp_path / "text", '{"step": 1, "loss": 0.5, "accuracy": 0.75}\n')
    log = RunLog(tmp_path / "bilora")
    log.start({"rho": 0.05, "max_train_steps": 9}, method="bilora", seed=0, resume_step=None)
    log.record_activity("training")
    log.metric(1, loss=0.5, auxiliary_norm_before=0.2, auxiliary_norm=0.05, seconds=0.1)
    log.metric(2, loss=math.nan, seconds=0.1)
    with gr.Blocks():
        tab = training.Tab(Catalog(tmp_path), gr.State().change)
    first = tab._fill(None)
    assert first[tab.runs]["value"] == ["text", "bilora"], "the control must come first"
    assert "value" not in tab._fill(["text", "bilora"])[tab.runs], "it must not replace the choice"

    def draw(last_state=None):
        return tab._draw(["bilora", "text"], 1, last_state)

    before = draw()
    ours, plain = "bilora (Bi-LoRA, seed 0)", "text (LoRA, seed 1)"
    means = [[1, 0.5, ours], [1, 0.5, plain]]  # without the NaN loss
    assert plotted(tab, before, "loss")[2:] == means
    assert plotted(tab, before, "accuracy") == [[1, 0.75, plain]]
    assert plotted(tab, before, "heldout") == []
    assert "2 of 9 steps" in before[tab.cards]
    assert before[tab.cards].count("<li") == before[tab.legend].count("<span") == 2

    # Nothing is new, even while a line is being written.
    assert list(draw(before[tab.last_state])) == [tab.cards]
    write(log.folder, '{"step": 3, "lo')
    assert list(draw(before[tab.last_state])) == [tab.cards]
    write(log.folder, 'ss": 0.25}\n')
    after = draw(before[tab.last_state])
    assert [3, 0.25, ours] in plotted(tab, after, "loss")
    # A damaged log does not affect the other run's curve.
    write(log.folder, "nonsense\n")
    damaged = draw(after[tab.last_state])
    assert "line 4 of metrics.jsonl" in damaged[tab.cards].replace("bilora/", "")
    assert plotted(tab, damaged, "loss")[1:] == means[1:]
    assert '<li class="running"' in damaged[tab.cards], "the status must be the record's"
    assert "log unreadable: " in damaged[tab.cards]
    assert "2 of 9 steps" not in damaged[tab.cards]
    log.close("finished")
    finished = draw()[tab.cards]
    assert 'class="finished"' in finished
    assert 'class="failed"' not in finished
    (log.folder / "run.json").write_text("{")
    assert 'class="unreadable"' in draw()[tab.cards]
