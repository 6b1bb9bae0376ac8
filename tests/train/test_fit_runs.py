"""Configurations of the runs of a search, and of the last one; no run is made."""

from types import SimpleNamespace
from typing import Any

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve
from bilora_diffusion.train.search.halving import Trial
from bilora_diffusion.train.search.runs import Search
from bilora_diffusion.train.search.space import arguments

COMMAND = ["--dataset", "mini", "--validation_dataset", "none", "--fit"]


def search_of(options="", count=12):
    """The search of a command line on so many images."""
    argv = COMMAND + options.split()
    names = [f"image {number}" for number in range(count)]
    task: Any = SimpleNamespace(
        cfg=resolve(argv), names=names, num_samples=count, has_heldout=False
    )
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1)
    script: Any = SimpleNamespace(resolve=resolve)
    return Search(script, argv, task, accelerator)


SCALED = "--scale_lr --train_batch_size 4"


@pytest.mark.parametrize(
    ("typed", "rates", "auxiliary_rates"),
    [
        ("", (1e-4, 2e-4, 4e-4), (3e-4, 6e-4, 1.2e-3)),
        (SCALED, (4e-4, 8e-4, 1.6e-3), (1.2e-3, 2.4e-3, 4.8e-3)),
        (f"{SCALED} --auxiliary_learning_rate 5e-4", (4e-4, 8e-4, 1.6e-3), (2e-3, 2e-3, 2e-3)),
        # One auxiliary has the primary's rate.
        (f"{SCALED} --auxiliaries 1", (4e-4, 8e-4, 1.6e-3), (None, None, None)),
        (f"{SCALED} --optimizer prodigy", (2.0, 4.0, 8.0), (None, None, None)),
    ],
)
def test_rates_are_scaled_once_and_are_what_a_command_with_them_trains_at(
    typed, rates, auxiliary_rates
):
    typed = f"--choose_by loss {typed}"
    search = search_of(typed)
    _, bilora_start = search.space.starts()
    candidates = search.space.variants("learning_rate", bilora_start)
    for candidate, rate, auxiliary_rate in zip(candidates, rates, auxiliary_rates, strict=True):
        cfg = search.config(candidate)
        assert cfg.learning_rate == pytest.approx(rate)
        assert cfg.auxiliary_learning_rate == pytest.approx(auxiliary_rate)
        assert resolve(COMMAND + typed.split() + arguments(candidate)) == cfg


def test_bilora_is_tried_as_in_the_paper_where_samples_decide():
    lora, bilora = map(dict, search_of().space.starts())
    assert (lora["method"], bilora["method"]) == ("lora", "bilora")
    assert lora.keys() == bilora.keys() == {"method", "learning_rate", "rank"}


def test_an_alpha_keeps_the_ratio_to_the_rank_that_a_recipe_has(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 32\nlora_alpha: 32\n")
    for typed, alphas in (("", [8, 16, 32]), (f"--config {recipe}", [16, 32, 64])):
        search = search_of(typed)
        candidates = search.space.variants("rank", search.space.starts()[0])
        assert [search.config(candidate).lora_alpha for candidate in candidates] == alphas


def test_runs_have_the_warm_up_of_the_command_and_the_last_one_a_part_of_it(tmp_path):
    search = search_of("--max_train_steps 100 --lr_scheduler cosine --lr_warmup_steps 20")
    trial = search.trial_config(search.space.starts()[0], tmp_path)
    assert (trial.lr_scheduler, trial.lr_warmup_steps) == ("constant_with_warmup", 20)
    assert (trial.max_train_steps, trial.output_dir) == (100, str(tmp_path))
    final = search.final_config((("method", "lora"),), steps=50)
    assert (final.lr_scheduler, final.lr_warmup_steps, final.max_train_steps) == ("cosine", 10, 50)


def test_a_list_of_rates_is_not_extended_and_the_default_one_is(tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("learning_rate: [1e-3, 3e-3]\n")
    listed = search_of(f"--fit_space {space}").space
    for searched_space, count in ((listed, 0), (search_of().space, 1)):
        *_, highest = rates = searched_space.variants("learning_rate", searched_space.starts()[0])
        assert len(searched_space.next_rates([highest], rates)) == count


def test_a_search_needs_two_images():
    with pytest.raises(UserError, match=r"^--fit needs 2 images, there is 1: "):
        search_of(count=1)
    with pytest.raises(UserError, match=r"^--fit needs 2 images, there is 1: "):
        search_of("--fit_folds 4", count=1)


def test_values_that_do_not_go_together_are_dropped_with_the_reason(tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("method: [bilora]\nball: [global, per-layer]\nauxiliaries: [1, sample]\n")
    search = search_of(f"--max_train_steps 100 --fit_space {space} --output_dir {tmp_path / 'run'}")
    (refused,) = [
        candidate
        for candidate in search.space.grid(limit=100)
        if {"ball": "per-layer", "auxiliaries": "sample"}.items() <= dict(candidate).items()
    ]
    reason = search._train_trial(Trial(refused, fold=0, steps=50))
    assert "per-layer" in reason


def test_a_rate_that_nobody_gave_falls_where_the_method_gains_from_it():
    search = search_of("--max_train_steps 100")
    assert search.final_config((), steps=50).max_train_steps == 50
    per_sample = search.final_config((("method", "bilora"), ("auxiliaries", "sample")), steps=50)
    # A falling rate needs the whole length.
    assert (per_sample.max_train_steps, per_sample.lr_scheduler) == (100, "linear")
