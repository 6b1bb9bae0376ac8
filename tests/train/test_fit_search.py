"""The search of --fit as functions of numbers: what it runs, what it drops, what it chooses."""

import re
import zlib
from typing import Any

import numpy as np
import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.train.search import report
from bilora_diffusion.train.search.halving import Halving, Plan, Trial, lowest_point
from bilora_diffusion.train.search.space import RATE, Space, default_values, read_values, title

SAMPLES = {"rho": "auto", "auxiliaries": "sample"}
PLAN = Plan(folds=4, steps=300, interval=20, budget=3000)


def space(**values):
    return Space({name: tuple(texts) for name, texts in values.items()})


def overfitting(options, step):
    """Falls and rises again, the sooner the higher the rate; lowest of all for Bi-LoRA of rank 8
    at a rate of 0.0008.
    """
    values = {"method": "lora", "learning_rate": "0.0002", "rank": "4"} | dict(options)
    speed = float(values["learning_rate"]) / 1e-3
    floor = {"lora": 0.08, "bilora": 0.078}[values["method"]]
    floor += 0.002 * abs(np.log2(speed / 0.8)) + 1e-4 * abs(int(values["rank"]) - 8)
    return floor + 0.04 * np.exp(-step * speed / 25) + 5e-5 * speed * step


def turning(options, step):
    """Falls until step 60 and rises from there, for all configurations alike."""
    return 1 + abs(step - 60) / 1e3


def noise(*key):
    """The same normal values of 12 images for the same key."""
    return np.random.default_rng(zlib.crc32(repr(key).encode())).normal(size=12)


def curve_of(loss, trial):
    """A loss measured on the images of a fold, with some noise of the configuration's own."""
    images = 0.02 * noise(trial.fold) + 5e-4 * noise(trial.candidate, trial.fold)
    steps = range(0, trial.steps + 1, PLAN.interval)
    return {step: loss(trial.candidate, step) + images for step in steps}


def search_by(train_trial, searched_space, plan=PLAN):
    """A search whose runs are this function of a trial: a curve, or why it could not go on."""
    search = Halving(plan, lambda trials: [train_trial(trial) for trial in trials])
    search.run(searched_space)
    return search


def search_loss(loss, plan=PLAN, **values):
    """A search of these values by a loss."""
    return search_by(lambda trial: curve_of(loss, trial), space(**values), plan)


DEFAULT_SPACE = Space(default_values((), 2e-4, 4, SAMPLES))


def test_the_choice_is_within_a_percent_of_the_best_and_widens_the_rates():
    trials: list[Trial] = []

    def record(trial):
        trials.append(trial)
        return curve_of(overfitting, trial)

    search = search_by(record, DEFAULT_SPACE)
    options, step = search.choice
    assert options[0] == ("method", "bilora")
    assert float(dict(options)["learning_rate"]) > 4e-4  # beyond the three around the given one
    best_options = {"method": "bilora", "learning_rate": "0.0008", "rank": "8"}
    lowest = min(overfitting(best_options, step) for step in range(20, 301, 20))
    assert overfitting(options, step) < 1.01 * lowest
    assert len(search.curves[options]) == PLAN.folds

    # Each run is asked for more steps only, and all of them together for no more than the budget.
    steps_taken: dict[Any, int] = {}
    for trial in trials:
        run = (trial.candidate, trial.fold)
        assert steps_taken.get(run, 0) < trial.steps <= PLAN.steps
        steps_taken[run] = trial.steps
    assert sum(steps_taken.values()) == search.spent_steps <= PLAN.budget
    first_trials = trials.copy()
    trials.clear()
    search_by(record, DEFAULT_SPACE)
    assert trials == first_trials

    standings = search.standings()
    candidates, rows = list(standings), list(standings.values())
    assert candidates[0] == options
    assert (rows[0]["steps"], rows[0]["difference"]) == (step, 0.0)
    # Candidates with more folds come first, since their estimates are surer.
    folds = [row["folds"] for row in rows[1:-1]]
    assert folds == sorted(folds, reverse=True)
    assert (candidates[-1], rows[-1]["steps"]) == ((), PLAN.steps)  # the command line as it is
    assert rows[-1]["interval"].low < rows[-1]["difference"] < rows[-1]["interval"].high


def test_rates_that_the_user_has_listed_are_not_widened():
    trained = set()

    def record(trial):
        trained.update(value for name, value in trial.candidate if name == RATE)
        return curve_of(overfitting, trial)

    rates = ("0.0001", "0.0002", "0.0004")  # the best one is at the edge
    search = search_by(record, Space({RATE: rates, "rank": ("4", "8")}, extends_rates=False))
    assert trained == set(rates)
    assert report.rate_edge(search, search.choice[0]) == "highest"


def test_a_run_on_all_samples_is_between_as_many_epochs_and_as_many_steps():
    fold = {step: np.full(3, float(step)) for step in range(0, 201, 20)}
    no_runs: Any = None
    with_folds = Halving(Plan(4, 200, 20, 0), no_runs)
    with_heldout_set = Halving(Plan(1, 200, 20, 0), no_runs)
    with_folds.curves = with_heldout_set.curves = {(): [fold, fold]}
    # The curve is its step; the mean from step 175, (1 - 1/8) of 200, to step 200.
    assert with_folds.expected_curve(())[200] == pytest.approx(np.full(6, 187.5))
    assert with_heldout_set.expected_curve((), 1)[200].tolist() == [200.0] * 3
    # A loss that is not finite spoils only the steps that it has a weight in.
    fold[100][:] = np.inf
    # Step 120 reads the curve from 105 on, where 100 still has a weight; step 140 from 122.5.
    expected_losses = with_folds.expected_curve((), 1).items()
    infinite_steps = [step for step, losses in expected_losses if not np.isfinite(losses).all()]
    assert infinite_steps == [100, 120]


def test_one_configuration_and_one_fold_leave_the_lowest_step_of_its_curve():
    plan = Plan(1, 300, 20, 300)
    search = search_loss(overfitting, plan, rank=["8"])
    curve = search.curves[(("rank", "8"),)][0]
    assert search.choice == ((("rank", "8"),), lowest_point(curve)[1])
    assert max(curve) == 300  # it still falls
    search = search_loss(turning, plan, rank=["8"])
    assert search.choice[1] == 60
    assert search.spent_steps == 160  # half of 300, by twenties: it has turned


def test_only_what_is_worse_beyond_doubt_is_out():
    def loss(options, step):
        rank = dict(options).get("rank", "8")
        return turning(options, step) + {"4": 0.0, "8": 1e-5, "16": 0.05}[rank]

    search = search_loss(loss, rank=["4", "8", "16"])
    assert list(search.dropped) == [(("rank", "16"),)]
    del search.curves[()]
    folds = {dict(candidate)["rank"]: len(curves) for candidate, curves in search.curves.items()}
    assert folds == {"4": 4, "8": 4, "16": 1}

    def two_samples(trial):
        """Rank 8 is worse on both samples, as in half of all cases by chance."""
        offset = np.array([1e-3, 4e-3]) if ("rank", "8") in trial.candidate else np.zeros(2)
        return {step: turning((), step) + offset for step in range(0, 301, 20)}

    search = search_by(two_samples, space(rank=["4", "8"]), Plan(1, 300, 20, 1200))
    assert not search.dropped


def test_a_configuration_that_cannot_go_on_takes_no_other_down():
    def fail_at_high_rate(trial):
        if ("learning_rate", "0.0004") in trial.candidate:
            return "the loss is not finite"
        return curve_of(overfitting, trial)

    rates = space(learning_rate=["0.0001", "0.0002", "0.0004"])
    search = search_by(fail_at_high_rate, rates)
    assert search.dropped[(("learning_rate", "0.0004"),)] == "the loss is not finite"
    assert dict(search.choice[0])["learning_rate"] == "0.0002"


@pytest.mark.parametrize("outcome", ["gone", {0: np.ones(3), 20: np.full(3, np.inf)}])
def test_a_search_of_which_no_run_can_go_on_ends(outcome):
    search = search_by(lambda trial: outcome, space(rank=["4", "8"]))
    assert list(search.dropped) == [(("rank", "4"),), (("rank", "8"),)]


def test_a_method_whose_start_cannot_be_trained_is_tried_with_smaller_values():
    def train_in_memory(trial):
        if {("method", "bilora"), ("rank", "8")} <= set(trial.candidate):
            return "does not fit"
        return curve_of(overfitting, trial)

    search = search_by(train_in_memory, DEFAULT_SPACE)
    trained = set()
    for candidate in search.curves:
        options = dict(candidate)
        trained.add((options.get("method"), options.get("rank")))
    assert {("bilora", "4"), ("lora", "8")} <= trained
    assert ("bilora", "8") not in trained
    assert "does not fit" in search.dropped.values()


def test_options_that_a_method_does_not_read_are_no_difference():
    candidates = space(method=["lora", "bilora"], rho=["0.1", "1"], use_ema=["true"]).grid(9)
    titles = ["lora, use_ema", "bilora (rho 0.1), use_ema", "bilora (rho 1), use_ema"]
    assert [title(options) for options in candidates] == titles


def test_runs_of_different_values_have_folders_of_their_own():
    names = set()
    for value in ("a/b", "a-b", "x" * 300 + "1", "x" * 300 + "2"):
        name = PLAN.folder_name(Trial((("target_modules", value),), 0, 20))
        assert len(name) < 120
        assert "/" not in name
        names.add(name)
    assert len(names) == 4


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


CONFIG = {
    "max_train_steps": 300,
    "lora_alpha": 8.0,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
}


def report_of(search, folder, monkeypatch, **last_config):
    """The lines at the end of a search whose last run has this configuration."""
    record = {"wall_seconds": 1.0, "config": CONFIG | last_config}
    monkeypatch.setattr(report, "read_run", lambda _: record)
    settings = {**CONFIG, **vars(search.plan), "samples": 12, "measure": "heldout_loss"}
    report.write(folder, settings, search, is_done=True)
    return "\n".join(report.lines(folder, "images"))


ONE_RANK = {"rank": ["8"]}
SHORT_PLAN = Plan(4, 300, 20, 160)


def lower_at_high_rates(options, step):
    return turning(options, step) - float(dict(options)[RATE])


def lower_as_given(options, step):
    return turning(options, step) - (0 if options else 0.5)


@pytest.mark.parametrize(
    ("loss", "plan", "values", "doubt"),
    [
        (turning, PLAN, ONE_RANK, None),
        (lambda options, step: 1 - step / 1e3, PLAN, ONE_RANK, "raise --max_train_steps"),
        (lambda options, step: 1 + step / 1e3, PLAN, ONE_RANK, "no training"),
        (turning, SHORT_PLAN, ONE_RANK, "folds"),
        (lower_at_high_rates, Plan(1, 300, 20, 600), {RATE: ["1e-3", "2e-3"]}, "rate is the"),
        (lower_as_given, PLAN, ONE_RANK, "as given"),
    ],
)
def test_the_end_says_where_a_choice_is_unsure(loss, plan, values, doubt, tmp_path, monkeypatch):
    text = report_of(search_loss(loss, plan, **values), tmp_path, monkeypatch)
    # Advice follows the command of the last run.
    _, separator, advice = text.partition("same without")
    assert separator
    phrases = ("raise --max_train_steps", "no training", "folds", "rate is the", "as given")
    for phrase in phrases:
        assert (phrase in advice) == (phrase == doubt), phrase
    if plan is SHORT_PLAN:
        assert "1 of 4 folds was" in text
        assert "1 configuration, 1 run in" in text


def test_an_edge_of_listed_rates_is_mended_in_their_list(tmp_path, monkeypatch):
    plan = Plan(1, 300, 20, 600)
    search = search_loss(lower_at_high_rates, plan, learning_rate=["1e-3", "2e-3"])
    text = report_of(search, tmp_path, monkeypatch, fit_space="space.yaml")
    assert "its rate is the highest that was tried: add higher ones to --fit_space" in text


def test_the_end_has_the_options_that_make_the_last_run_again(tmp_path, monkeypatch):
    search = search_loss(turning, rank=["16"])
    last_config = {"max_train_steps": 120, "lr_scheduler": "linear", "lora_alpha": 32.0}
    text = report_of(search, tmp_path, monkeypatch, **last_config)
    (command,) = re.findall("without --fit: (.*)", text)
    expected = {"rank": "16", "max_train_steps": "120", "lr_scheduler": "linear"}
    assert dict(re.findall(r"--(\w+) (\S+)", command)) == expected | {"lora_alpha": "32.0"}
    assert "120 steps" in text
    assert "60 steps" in text


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
