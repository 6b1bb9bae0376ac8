"""What the training tab draws: lines, their differences, axes and colours."""

from __future__ import annotations

from app.charts import (
    COLORS,
    Line,
    colors_of,
    differences,
    draw,
    limits,
    plot,
    radii,
    rates,
    ticks,
)
from app.charts import loss as loss_lines
from tests.app.test_app_training import record, rows, shown


def test_loss_is_faint_below_its_running_mean() -> None:
    assert loss_lines([shown("a", rows(1.0, 0.0))], window=2) == [
        Line("a", [(1, 1.0), (2, 0.0)], 0, faint=True),
        Line("a", [(1, 1.0), (2, 0.5)], 0),
    ]


def test_differences_are_to_lora_of_the_same_seed_at_common_steps() -> None:
    lora, other_seed = record("lora"), record("lora") | {"seed": 1}
    runs = [
        shown("lora", rows(1.0, 0.5, 0.25), lora),
        shown("lora 1", rows(9.0, 9.0), other_seed, 1),
        shown("ours", rows(0.75, 0.75), None, 2),
    ]
    assert differences(runs, "loss") == [Line("ours", [(1, -0.25), (2, 0.25)], 2)]
    assert differences(runs[1:], "loss") == []


def test_equal_rates_are_one_line() -> None:
    one = [{"step": 1, "lr": 0.5}]
    assert rates([shown("a", one), shown("b", one)]) == [Line("all runs", [(1, 0.5)], None)]
    other = [{"step": 1, "lr": 0.1}]
    assert len(rates([shown("a", one), shown("b", other)])) == 2


def test_text_and_images_have_their_own_plots() -> None:
    text = record(model_name_or_path="t5")
    found = [{"step": 1, "loss": 0.5, "accuracy": 0.75}]
    both = draw([shown("a", found), shown("b", found, text)], 5)
    assert 'id="training-loss"' in both
    assert 'id="training-loss-text"' in both
    assert 'id="training-accuracy-text"' in both
    assert "Runs on text" in both
    assert "Runs on text" not in draw([shown("b", found, text)], 5)


def test_a_plot_names_its_lines_and_holds_no_foreign_markup() -> None:
    evil = "<b>"
    html = plot("x", evil, evil, [Line(evil, [(0, 1.0), (4, 0.5)], 3)], zero=True)
    assert evil not in html
    assert 'class="of-3"' in html
    assert "&lt;b&gt; ends at 0.5" in html
    assert plot("x", "t", "c", [Line("a", [], 0)]) == ""


def test_the_axis_of_a_plot() -> None:
    assert ticks(0, 200) == [0, 50, 100, 150, 200]
    assert ticks(0.061, 0.119) == [0.08, 0.1]
    assert limits([0.5, 0.5]) == (0.475, 0.525)
    low, high = limits([1.0, 2.0], zero=True)
    assert low < 0 < 2 < high
    assert limits([*[1.0] * 99, 2.0, 500.0])[1] < 10


def test_one_line_for_equal_radii_as_long_as_the_longest_run() -> None:
    short, long = rows(1.0, 1.0), rows(*[1.0] * 9)
    rising = record(rho_schedule="linear")
    found = radii(
        [shown("a", short), shown("b", long), shown("c", short), shown("d", short, rising)]
    )
    assert [line.name for line in found] == ["ρ = 0.05", "ρ of d"]
    assert found[0].points == [(1, 0.05), (9, 0.05)]


def test_a_run_keeps_its_colour() -> None:
    known = [f"run{at}" for at in range(20)]
    alone = colors_of(["run3"], known)
    assert colors_of(["run1", "run3"], known)["run3"] == alone["run3"]
    crowded = colors_of([f"run{at}" for at in (3, 11, 19, 0, 1, 2, 4, 5)], known)
    assert len(set(crowded.values())) == len(COLORS) == 8
    assert crowded["run3"] == alone["run3"]
    assert len(colors_of([*known, "gone"], known)) == 8
