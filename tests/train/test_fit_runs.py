"""Configurations of the runs of a search, and of the last one; no run is made."""

from types import SimpleNamespace
from typing import Any

import pytest

from bilora_diffusion.image.config import resolve
from bilora_diffusion.train.search.runs import Search
from bilora_diffusion.train.search.space import arguments


def search_of(*typed):
    """The search of a command line on 12 images."""
    argv = ["--dataset", "mini", "--validation_dataset", "none", "--fit", *typed]
    names = [f"image {i}" for i in range(12)]
    task: Any = SimpleNamespace(
        cfg=resolve(argv), names=names, num_samples=len(names), has_heldout=False
    )
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1)
    script: Any = SimpleNamespace(resolve=resolve)
    return Search(script, argv, task, accelerator), argv


SCALED = "--scale_lr --train_batch_size 4"


@pytest.mark.parametrize(
    ("typed", "rates", "auxiliary_rates"),
    [
        ("", (1e-4, 2e-4, 4e-4), (3e-4, 6e-4, 1.2e-3)),
        (SCALED, (4e-4, 8e-4, 1.6e-3), (1.2e-3, 2.4e-3, 4.8e-3)),
        (f"{SCALED} --auxiliary_learning_rate 5e-4", (4e-4, 8e-4, 1.6e-3), (2e-3, 2e-3, 2e-3)),
        (f"{SCALED} --auxiliaries 1", (4e-4, 8e-4, 1.6e-3), None),
        (f"{SCALED} --optimizer prodigy", (2.0, 4.0, 8.0), None),  # with one auxiliary
    ],
)
def test_rates_are_scaled_once_and_are_what_a_command_with_them_trains_at(
    typed, rates, auxiliary_rates
):
    search, argv = search_of("--choose_by", "loss", *typed.split())
    (start,) = [options for options in search.space.starts() if dict(options)["method"] == "bilora"]
    configurations = search.space.variants("learning_rate", start)
    runs = [search.config(options) for options in configurations]
    assert [cfg.learning_rate for cfg in runs] == pytest.approx(rates)
    if auxiliary_rates is None:
        assert all(cfg.auxiliary_learning_rate is None for cfg in runs)
    else:
        trained_rates = [cfg.auxiliary_learning_rate for cfg in runs]
        assert trained_rates == pytest.approx(auxiliary_rates)
    for options, cfg in zip(configurations, runs, strict=True):
        assert resolve([*argv, *arguments(options)]) == cfg


def test_bilora_is_tried_as_in_the_paper_where_samples_decide():
    search, _ = search_of()
    starts = [dict(options) for options in search.space.starts()]
    assert [options["method"] for options in starts] == ["lora", "bilora"]
    assert all(options.keys() == {"method", "learning_rate", "rank"} for options in starts)


def test_an_alpha_keeps_the_ratio_to_the_rank_that_a_recipe_has(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 32\nlora_alpha: 32\n")
    for typed, alphas in (((), [8, 16, 32]), (("--config", str(recipe)), [16, 32, 64])):
        search, _ = search_of(*typed)
        runs = map(search.config, search.space.variants("rank", search.space.starts()[0]))
        assert [cfg.lora_alpha for cfg in runs] == alphas


def test_runs_have_the_warm_up_of_the_command_and_the_last_one_a_part_of_it(tmp_path):
    typed = "--max_train_steps 100 --lr_scheduler cosine --lr_warmup_steps 20"
    search, _ = search_of(*typed.split())
    trial = search.trial_config(search.space.starts()[0], tmp_path)
    assert (trial.lr_scheduler, trial.lr_warmup_steps) == ("constant_with_warmup", 20)
    assert (trial.max_train_steps, trial.output_dir) == (100, str(tmp_path))
    final = search.final_config((("method", "lora"),), steps=50)
    assert (final.lr_scheduler, final.lr_warmup_steps, final.max_train_steps) == ("cosine", 10, 50)


def test_a_rate_that_nobody_gave_falls_where_the_method_gains_from_it():
    search, _ = search_of("--max_train_steps", "100")
    per_sample = (("method", "bilora"), ("auxiliaries", "sample"))
    configs = [search.final_config(options, steps=50) for options in ((), per_sample)]
    assert [cfg.max_train_steps for cfg in configs] == [50, 100]
    assert configs[1].lr_scheduler == "linear"
