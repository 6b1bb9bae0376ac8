"""eval.tune: what is drawn, what is chosen, and the halves, with runs that take no time."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import registry
from bilora_diffusion.run.heldout_part import chosen, read_part
from bilora_diffusion.run.paths import ROOT
from bilora_diffusion.run.runlog import RunLog
from eval import table, tune
from eval.sweep.cells import Outcome, Runner, state
from eval.sweep.grid import Cell
from eval.table import Row
from eval.tune import choice, spaces

RECIPE = str(ROOT / "recipes" / "mini.yaml")
SPACES = sorted((ROOT / "eval" / "spaces").glob("*.yaml"))
SPACE = """
options: {validation_loss_steps: 5, max_train_steps: 10}
shared:
  learning_rate: {log: [1e-4, 1e-2]}
  lora_dropout: {uniform: [0, 0.5]}
methods:
  LoRA: {method: lora}
  Bi-LoRA: {method: bilora, rho: {log: [0.1, 10]}, lora_dropout: 0}
"""


@pytest.fixture
def space(tmp_path: Path) -> Path:
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    return file


def test_draws_are_shared_and_depend_on_nothing_but_their_place(space: Path) -> None:
    found = spaces.load(space)
    lora = [found.configuration("LoRA", 0, n) for n in range(1, 200)]
    bilora = [found.configuration("Bi-LoRA", 0, n) for n in range(1, 200)]
    assert [one["learning_rate"] for one in lora] == [one["learning_rate"] for one in bilora]
    assert {one["lora_dropout"] for one in bilora} == {"0"}  # a method's own word goes first
    assert lora[7] == found.configuration("LoRA", 0, 8)
    assert lora[7] != found.configuration("LoRA", 1, 8)
    rates = [math.log10(float(one["learning_rate"])) for one in lora]
    assert min(rates) >= -4
    assert max(rates) <= -2
    assert sum(rates) / len(rates) == pytest.approx(-3, abs=0.15)
    dropouts = [float(one["lora_dropout"]) for one in lora]
    assert sum(dropouts) / len(dropouts) == pytest.approx(0.25, abs=0.05)
    # one more option or method changes no other draw
    space.write_text(SPACE.replace("shared:", "shared:\n  rank: {choice: [2, 4, 8]}"))
    more = spaces.load(space)
    again = [more.configuration("Bi-LoRA", 0, n) for n in range(1, 200)]
    assert [{**one, "rank": None} for one in bilora] == [{**one, "rank": None} for one in again]
    assert min(Counter(one["rank"] for one in again).values()) > 45


def test_every_point_of_a_grid_is_one_trial(space: Path) -> None:
    space.write_text(
        "shared: {learning_rate: {grid: [1e-3, 2e-3]}}\nmethods: {a: {rank: {grid: [2, 4, 8]}}}"
    )
    found = spaces.load(space)
    assert found.grid_size("the space") == 6
    points = [found.configuration("a", 0, n) for n in range(1, 7)]
    assert {(p["learning_rate"], p["rank"]) for p in points} == set(
        itertools.product(("1e-3", "2e-3"), ("2", "4", "8"))
    )


REFUSED = [
    ("methods: {}", "names no methods"),
    ("method: {a: {}}\nmethods: {a: {}}", 'has "method" (did you mean "methods"?)'),
    ("methods: {a: {rank: [2, 4]}}", "rank is neither a value nor a range"),
    ("methods: {a: {rank: {log: [2]}}}", "rank has no two ends"),
    ("methods: {a: {rank: {log: [0, 2]}}}", "a lower and a higher number above 0"),
    ("methods: {a: {rank: {uniform: [2, 1]}}}", "rank has no two ends"),
    ("methods: {a: {rank: {gird: [2, 1]}}}", "rank is no range"),
    ("methods: {a: {rank: {grid: [2, 4]}}, b: {}}", "a grid of 2 for a and of 1 for b"),
    ("methods: {a: {rank: {grid: [2, 4]}}}", "--trials is 1, and the grid has 2"),
    ("methods: {a: {rank: {choice: []}}}", "something else than single values"),
    ("methods: {a: {seed: 3}}", "sets seed, which the search decides"),
    ("options: {rank: {choice: [2]}}\nmethods: {a: {}}", 'a range for "rank"'),
    ("methods: {a: {rnak: 3}}", 'in the arm "a 1": unknown flag "--rnak"'),
    ("methods: {a: {lr_scheduler: cosine}}", "use --set lr_scheduler=constant"),
    ("options: {validation_loss_steps: 0}\nmethods: {a: {}}", "at the end only"),
]
WORDS = [
    (["--test_seeds", "1..3"], "seed 1 is among --seeds and --test_seeds"),
    (["--trials", "0"], "--trials is 0"),
    (["--jobs", "0"], "--jobs is 0"),
    (["--parts", "1/2,2/3"], "two parts of one split"),
    (["--parts", "1/2,3/2"], '--validation_part is "3/2"'),
    (["--set", "validation_part=1/2"], "which --parts says"),
    (["--methods", "LoRA,Bi-LORA"], '--methods has "Bi-LORA" (did you mean "Bi-LoRA"?)'),
    (["--control", "DoRA"], '--control is "DoRA"'),
    (["--set", "validation_dataset=none"], "would have no heldout_loss"),
]


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [*((text, [], told) for text, told in REFUSED), *((SPACE, *rest) for rest in WORDS)],
)
def test_bad_input_is_one_sentence_before_anything_runs(
    text: str, words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    runs = ["--runs_dir", str(tmp_path / "runs")]
    assert tune.main([RECIPE, "--space", str(file), "--trials", "1", *runs, *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_the_lowest_mean_over_the_seeds_at_a_common_step_is_chosen() -> None:
    curves = {  # trial -> seed -> step -> loss
        1: {0: {0: 9.0, 5: 4.0, 10: 6.0}, 1: {0: 9.0, 5: 6.0, 10: 5.0}},
        2: {0: {0: 9.0, 5: 1.0}, 1: {0: 9.0, 5: 8.0, 10: 0.5}},  # step 10 for one seed alone
        3: {0: {0: 0.1, 5: 0.1}},  # the other run failed
        4: {0: {0: 9.0, 5: 4.5}, 1: {0: 9.0, 5: 4.5}},
    }
    rows = [
        Row(f"{trial}-{seed}", "LoRA", seed, "loss", str(trial), step, value)
        for trial, seeds in curves.items()
        for seed, points in seeds.items()
        for step, value in points.items()
    ]
    means = choice.curves(rows, [0, 1])
    assert means == {
        1: {0: 9.0, 5: 5.0, 10: 5.5},
        2: {0: 9.0, 5: 4.5},
        3: {},
        4: {0: 9.0, 5: 4.5},
    }
    assert choice.choose(means) == choice.Choice(2, 5, 4.5)  # of equal ones the first
    assert choice.over_budget(means, 4) == [5.0, 4.5, 4.5, 4.5]
    assert choice.choose({3: {}}) is None


@pytest.mark.parametrize("count", [2, 3])
def test_parts_are_disjoint_and_complete(count: int) -> None:
    names = [f"{number}.png" for number in range(31)] + ["3.png"]  # one stands twice
    dealt = [chosen(f"{i}/{count}", names, "it") for i in range(1, count + 1)]
    assert sorted(position for part in dealt for position in part) == list(range(32))
    assert sum(3 in part and 31 in part for part in dealt) == 1
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 2
    backwards = chosen(f"1/{count}", names[::-1], "it")
    assert {names[::-1][i] for i in backwards} == {names[i] for i in dealt[0]}
    assert chosen(None, names, "it") == list(range(32))
    with pytest.raises(UserError, match=r"asks for 3 parts of it, which has 2: ask for fewer"):
        chosen("1/3", ["a", "b", "a"], "it")


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/2/3", "a/b", "1/1001", "-1/2"])
def test_a_malformed_part_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write i/n with i from 1 to n"):
        read_part(text)


def _run(runs: Path, cell: Cell) -> Outcome:
    """LoRA falls and rises, Bi-LoRA falls further; a high rate fails."""
    flags = dict(flag.removeprefix("--").split("=") for flag in cell.flags)
    if flags["method"] == "lora" and float(flags["learning_rate"]) > 5e-3:
        return Outcome(cell.name, cell.arm, cell.seed, "failed", 2, "the loss is not finite")
    lowest = 0.05 if flags["method"] == "lora" else 0.04
    off = abs(math.log10(float(flags["learning_rate"])) + 3) / 100 + cell.seed / 10_000
    shift = 0.001 if flags["validation_part"] == "2/2" else 0.0
    if state(runs / cell.name) != "finished":
        log = RunLog(runs / cell.name)
        log.start({}, method=flags["method"], seed=cell.seed, resume_step=None)
        for step, loss in ((0, 0.1), (5, lowest + off), (10, lowest + off + 0.01 - 20 * shift)):
            seconds = {"seconds": 0.1, "digest": f"{cell.seed}"} if step else {}
            log.metric(step, heldout_loss=loss + shift, train_grid_loss=0.1 - step / 200, **seconds)
        log.finish(steps=10)
    return Outcome(cell.name, cell.arm, cell.seed, "finished")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that a command runs, without running them."""
    cells: list[Cell] = []

    def run_all(runner: Runner, given: Sequence[Cell]) -> list[Outcome]:
        cells.extend(given)
        return [_run(runner.runs_dir, cell) for cell in given]

    monkeypatch.setattr(Runner, "run_all", run_all)
    return cells


def test_methods_are_tuned_on_one_half_and_judged_on_the_other(
    asked: list[Cell], space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    space.write_text(f"{space.read_text()}  LoRA-SAM: {{method: lora-sam}}\n")
    words = ["--space", str(space), "--methods", "LoRA,Bi-LoRA"]
    words += ["--trials", "6", "--test_seeds", "2..4"]
    words += ["--runs_dir", str(tmp_path / "runs"), "--output_dir", str(out)]
    assert tune.main([RECIPE, *words]) == 0
    told = capsys.readouterr().out
    assert "2 methods x 6 trials: 24 runs to choose by" in told
    result = table.read(out)
    assert result.groups == ["LoRA", "Bi-LoRA"]
    drawn = {name: [float(one["learning_rate"]) for one in own]
             for name, own in result.settings["trials"].items()}  # fmt: skip
    nearest = min(range(6), key=lambda n: abs(math.log10(drawn["LoRA"][n]) + 3))
    for method in result.groups:
        found = result.settings["chosen"][method]
        assert (found["trial"], found["step"]) == (nearest + 1, 5)
    tests = [cell for cell in asked if "--validation_part=2/2" in cell.flags]
    assert len(asked) == 24 + len(tests)
    assert sorted({cell.seed for cell in tests}) == [2, 3, 4]
    assert {flag for cell in tests for flag in cell.flags if "learning_rate" in flag} == {
        f"--learning_rate={result.settings['trials']['LoRA'][nearest]['learning_rate']}"
    }
    primary = result.summary("Bi-LoRA", "chosen heldout_loss")
    second = result.summary("Bi-LoRA", "best heldout_loss")  # at step 10, which the tests prefer
    assert primary is not None
    assert second is not None
    assert (primary.difference, primary.pairs) == (pytest.approx(-0.01), 3)
    assert second.mean == pytest.approx((primary.mean or 0) - 0.01)
    assert [line.step for line in result.curve("Bi-LoRA", "heldout_loss")] == [0, 5, 10]
    price = result.summary("Bi-LoRA", "relative_step_time")
    assert price is not None
    assert price.mean == pytest.approx(1)
    trial = result.summary("LoRA", "trial heldout_loss", str(nearest + 1), 5)
    assert trial is not None
    assert trial.mean == pytest.approx(result.settings["chosen"]["LoRA"]["loss"])
    failed = sum(rate > 5e-3 for rate in drawn["LoRA"])
    assert sum(note.startswith("Failed, and so not chosen: lora") for note in result.notes) == (
        2 * failed
    )
    assert (out / "report.md").read_text() in told
    with Image.open(out / "tune.png") as picture:
        assert picture.width >= 1500
    for file in out.iterdir():
        assert file.suffix == ".png" or str(tmp_path) not in file.read_text()
    # the same command asks for the same cells
    before, first = (out / "rows.csv").read_bytes(), list(asked)
    asked.clear()
    assert tune.main([RECIPE, *words]) == 0
    assert asked == first
    assert (out / "rows.csv").read_bytes() == before


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_the_spaces_are_ones_that_the_scripts_take(
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # a script may add some
    line = next(line for line in file.read_text().splitlines() if "python -m eval.tune" in line)
    words = line.split("eval.tune ")[1].split()
    words = [str(ROOT / word) if (ROOT / word).exists() else word for word in words]
    assert tune.main([*words, "--runs_dir", str(tmp_path / "runs"), "--dry_run"]) == 0
    assert "trials: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
