"""The search of --fit as functions of numbers: what it runs, what it drops, what it chooses."""

import re
import zlib

import numpy as np
import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.train.search import report
from bilora_diffusion.train.search.halving import (
    Halving,
    Plan,
    Trial,
    lowest_point,
)
from bilora_diffusion.train.search.space import (
    RATE,
    Space,
    default_values,
    read_values,
    title,
)

SAMPLES = {"rho": "auto", "auxiliaries": "sample"}
PLAN = Plan(folds=4, steps=300, interval=20, budget=3000)


def space(**values):
    return Space({name: tuple(row) for name, row in values.items()})


def overfitting(options, step):
    """Falls and rises again, the sooner the higher the rate; lowest of all at a rate of 0.0008."""
    values = dict(options)
    speed = float(values.get("learning_rate", "0.0002")) / 1e-3
    floor = {"lora": 0.08, "bilora": 0.078}[values.get("method", "lora")]
    floor += 0.002 * abs(np.log2(speed / 0.8)) + 1e-4 * abs(int(values.get("rank", "4")) - 8)
    return floor + 0.04 * np.exp(-step * speed / 25) + 5e-5 * speed * step


def measured(loss, calls, noise=5e-4):
    """Curves of a loss with its own noise for each image and configuration."""

    def draw(*key):
        seed = zlib.crc32(repr(key).encode())
        return np.random.default_rng(seed).normal(size=12)

    def measure(trials):
        calls.extend(trials)
        return [
            {
                step: loss(w.candidate, step)
                + 0.02 * draw(w.fold)
                + noise * draw(w.candidate, w.fold)
                for step in range(0, w.steps + 1, PLAN.interval)
            }
            for w in trials
        ]

    return measure


def searched(loss=overfitting, plan=PLAN, calls=None, **values):
    search = Halving(plan, measured(loss, [] if calls is None else calls))
    search.run(space(**(values or default_values((), 2e-4, 4, SAMPLES))))
    return search


def test_the_choice_is_within_a_percent_of_the_best_and_widens_the_rates():
    calls, repeated_calls = list[Trial](), list[Trial]()
    search = searched(calls=calls)
    options, step = search.choice
    assert options[0] == ("method", "bilora")
    assert float(dict(options)["learning_rate"]) > 4e-4  # beyond the three around the given one
    best = min(overfitting((("method", "bilora"), ("learning_rate", "0.0008"), ("rank", "8")), s)
               for s in range(20, 301, 20))  # fmt: skip
    assert overfitting(options, step) < 1.01 * best
    assert len(search.curves[options]) == PLAN.folds
    # Each run is asked for more steps only, and all of them together for no more than the budget.
    reached = dict[tuple, int]()
    for trial in calls:
        assert reached.get(trial[:2], 0) < trial.steps <= PLAN.steps
        reached[trial[:2]] = trial.steps
    assert sum(reached.values()) == search.spent_steps <= PLAN.budget
    searched(calls=repeated_calls)
    assert repeated_calls == calls
    (chosen, first), *middle, (as_given, last) = search.standings().items()
    assert (chosen, first["steps"], first["difference"]) == (options, step, 0.0)
    assert (as_given, last["steps"]) == ((), PLAN.steps)
    assert last["interval"].low < last["difference"] < last["interval"].high
    folds = [row["folds"] for _, row in middle]
    assert folds == sorted(folds, reverse=True)


def test_a_run_on_all_samples_is_between_as_many_epochs_and_as_many_steps():
    fold = {step: np.full(3, float(step)) for step in range(0, 201, 20)}
    on_all, of_four = (
        Halving(Plan(1, 200, 20, 0), measured({}, [])),
        Halving(PLAN, measured({}, [])),
    )
    on_all.curves = of_four.curves = {(): [fold, fold]}
    assert of_four.expected_curve(())[200] == pytest.approx(
        np.full(6, 187.5)
    )  # the mean from 175 to 200
    assert on_all.expected_curve((), 1)[200].tolist() == [200.0] * 3
    fold[100][:] = np.inf
    finite = [step for step, row in of_four.expected_curve((), 1).items() if np.isfinite(row).all()]
    assert finite == [0, 20, 40, 60, 80, 140, 160, 180, 200]


def test_one_configuration_and_one_fold_leave_the_lowest_step_of_its_curve():
    search = searched(plan=Plan(1, 300, 20, 300), rank=["8"])
    curve = search.curves[(("rank", "8"),)][0]
    assert search.choice == ((("rank", "8"),), lowest_point(curve)[1])
    assert max(curve) == 300  # it still falls
    quick = searched(lambda o, step: abs(step - 40) / 1e3, Plan(1, 300, 20, 300), rank=["8"])
    assert quick.choice[1] == 40
    assert quick.spent_steps == 160  # half, by twenties: it has turned


def test_only_what_is_worse_beyond_doubt_is_out():
    def loss(options, step):
        by_rank = {"4": 0.0, "8": 1e-5, "16": 0.05}
        return 1 + abs(step - 60) / 1e3 + by_rank[dict(options).get("rank", "8")]

    search = searched(loss, rank=["4", "8", "16"])
    assert [dict(options)["rank"] for options in search.dropped] == ["16"]
    folds = {dict(o)["rank"]: len(c) for o, c in search.curves.items() if o}
    assert folds == {"4": 4, "8": 4, "16": 1}

    def two(trials):  # samples, which by chance both say so in half of all cases
        worse = [np.array([1e-3, 4e-3]) * (("rank", "8") in trial.candidate) for trial in trials]
        return [{s: 1 + abs(s - 60) / 1e3 + w for s in range(0, 301, 20)} for w in worse]

    search = Halving(Plan(1, 300, 20, 1200), two)
    search.run(space(rank=["4", "8"]))
    assert not search.dropped


def test_a_configuration_that_cannot_go_on_takes_no_other_down():
    measure = measured(overfitting, [])

    def failing(trials):
        bad = [dict(trial.candidate).get("learning_rate") == "0.0004" for trial in trials]
        pairs = zip(bad, measure(trials), strict=True)
        return ["the loss is not finite" if b else curve for b, curve in pairs]

    search = Halving(PLAN, failing)
    search.run(space(learning_rate=["0.0001", "0.0002", "0.0004"]))
    assert search.dropped[(("learning_rate", "0.0004"),)] == "the loss is not finite"
    assert dict(search.choice[0])["learning_rate"] == "0.0002"
    lost = Halving(PLAN, lambda trials: ["gone" for _ in trials])
    lost.run(space(rank=["4", "8"]))
    assert len(lost.dropped) == 2
    infinite = Halving(
        PLAN, lambda trials: [{0: np.ones(3), 20: np.full(3, np.inf)} for _ in trials]
    )
    infinite.run(space(rank=["4"]))
    assert list(infinite.dropped) == [(("rank", "4"),)]


def test_a_method_whose_start_cannot_be_trained_is_tried_with_smaller_values():
    measure = measured(overfitting, [])

    def in_memory(trials):
        large = [{("method", "bilora"), ("rank", "8")} <= {*trial.candidate} for trial in trials]
        pairs = zip(large, measure(trials), strict=True)
        return ["does not fit" if is_large else curve for is_large, curve in pairs]

    search = Halving(PLAN, in_memory)
    search.run(Space(default_values((), 2e-4, 4, SAMPLES)))
    tried = {(o["method"], o["rank"]) for o in map(dict, search.curves) if o}
    assert {("bilora", "4"), ("lora", "8")} <= tried
    assert ("bilora", "8") not in tried
    assert "does not fit" in search.dropped.values()


def test_options_that_a_method_does_not_read_are_no_difference():
    candidates = space(method=["lora", "bilora"], rho=["0.1", "1"], use_ema=["true"]).grid(9)
    titles = ["lora, use_ema", "bilora (rho 0.1), use_ema", "bilora (rho 1), use_ema"]
    assert [title(options) for options in candidates] == titles


def test_runs_of_different_values_have_folders_of_their_own():
    values = ("a/b", "a-b", "x" * 300 + "1", "x" * 300 + "2")
    names = {PLAN.folder_name(Trial((("target_modules", value),), 0, 20)) for value in values}
    assert [len(name) < 120 and "/" not in name for name in names] == [True] * 4


def test_what_the_user_gave_is_fixed_but_for_the_rate():
    values = default_values({"rank", "method", "learning_rate"}, 1e-3, 4, SAMPLES)
    assert values == {"learning_rate": ("0.0005", "0.001", "0.002")}
    assert "rho" not in default_values({"rho"}, 1e-3, 4, SAMPLES)
    assert default_values((), 1e-3, 4, {}).keys() == {"method", "learning_rate", "rank"}


@pytest.mark.parametrize(
    ("rank", "ranks"),
    [
        (4, ("4", "8", "16")),  # of recorded results
        (8, ("4", "8", "16")),
        (32, ("16", "32", "64")),
        (1, ("1", "2")),
        (16_384, ("8192", "16384")),
    ],
)
def test_ranks_are_searched_around_that_of_a_recipe(rank, ranks):
    assert default_values((), 1e-3, rank, {})["rank"] == ranks


CONFIG = {"max_train_steps": 300, "lora_alpha": 8.0, "lr_scheduler": "constant"}
CONFIG["lr_warmup_steps"] = 0


def ending(search, folder, monkeypatch, **config):
    """The lines at the end of a search whose last run has this configuration."""
    record = {"wall_seconds": 1.0, "config": {**CONFIG, **config}}
    monkeypatch.setattr(report, "read_run", lambda _: record)
    settings = {**CONFIG, **vars(search.plan), "samples": 12, "measure": "heldout_loss"}
    report.write(folder, settings, search, is_done=True)
    return "\n".join(report.lines(folder, "images"))


def test_the_end_says_where_a_choice_is_unsure(tmp_path, monkeypatch):
    def end(loss, plan=PLAN, **values):
        return ending(searched(loss, plan, **values), tmp_path, monkeypatch)

    doubts = ("raise --max_train_steps", "no training", "folds", "rate is the")

    def doubts_of(text):
        return {doubt for doubt in doubts if doubt in text.partition("same without")[2]}

    turns = {"loss": lambda _, step: 1 + abs(step - 60) / 1e3, "rank": ["8"]}
    assert doubts_of(end(**turns)) == set()
    falls = {**turns, "loss": lambda _, step: 1 - step / 1e3}
    assert doubts_of(end(**falls)) == {"raise --max_train_steps"}
    rises = {**turns, "loss": lambda _, step: 1 + step / 1e3}
    assert doubts_of(end(**rises)) == {"no training"}
    short = end(**turns, plan=Plan(4, 300, 20, 160))
    assert doubts_of(short) == {"folds"}
    assert "1 of 4 folds was" in short
    assert "1 configuration, 1 run in" in short
    faster = {
        "loss": lambda o, step: 1 + abs(step - 60) / 1e3 - float(dict(o)[RATE]),
        RATE: ["1e-3", "2e-3"],
    }
    assert doubts_of(end(**faster, plan=Plan(1, 300, 20, 600))) == {"rate is the"}


def test_the_end_has_the_options_that_make_the_last_run_again(tmp_path, monkeypatch):
    search = searched(lambda _, step: 1 + abs(step - 60) / 1e3, rank=["16"])
    last = {"max_train_steps": 120, "lr_scheduler": "linear", "lora_alpha": 32.0}
    text = ending(search, tmp_path, monkeypatch, **last)
    (typed,) = re.findall("without --fit: (.*)", text)
    parsed = dict(re.findall(r"--(\w+) (\S+)", typed))
    assert parsed == {"rank": "16", **{name: str(value) for name, value in last.items()}}
    assert all(steps in text for steps in ("120 steps", "60 steps"))


BAD_SPACES = {
    "": "has no options",
    "rank: [4, 8": "can't be read",
    "rnak: [4]": 'did you mean "rank"',
    "learning-rate: 1": 'did you mean "learning_rate"',
    "resolution: [64, 128]": "the same for all runs",
    "rank: []": "something else than values",
    "rank:": "something else than values",
}


@pytest.mark.parametrize("text", BAD_SPACES)
def test_a_bad_space_is_one_sentence(tmp_path, text):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=BAD_SPACES[text]) as refused:
        read_values(file, {"rank", "learning_rate"})
    assert "\n" not in str(refused.value)


def test_a_space_has_values_and_lists(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("rank: [4, 8, 4]\nuse_dora: [true, false]\nrho: auto\n")
    values = read_values(file, {"rank", "use_dora", "rho"})
    assert values == {"rank": ("4", "8"), "use_dora": ("true", "false"), "rho": ("auto",)}
