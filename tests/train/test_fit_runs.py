"""Configurations of the runs of a search, and of the last one."""

from types import SimpleNamespace
from typing import Any

import pytest

from bilora_diffusion.image.config import resolve
from bilora_diffusion.train.search.runs import Search
from bilora_diffusion.train.search.space import arguments


def fit_of(*typed):
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
    fit, argv = fit_of(*typed.split())
    (start,) = [options for options in fit.space.starts() if dict(options)["method"] == "bilora"]
    configurations = fit.space.variants("learning_rate", start)
    runs = [fit.config(options) for options in configurations]
    assert [cfg.learning_rate for cfg in runs] == pytest.approx(rates)
    if auxiliary_rates is None:
        assert all(cfg.auxiliary_learning_rate is None for cfg in runs)
    else:
        trained_rates = [cfg.auxiliary_learning_rate for cfg in runs]
        assert trained_rates == pytest.approx(auxiliary_rates)
    for options, cfg in zip(configurations, runs, strict=True):
        assert resolve([*argv, *arguments(options)]) == cfg


def test_an_alpha_keeps_the_ratio_to_the_rank_that_a_recipe_has(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 32\nlora_alpha: 32\n")
    for typed, alphas in (((), [8, 16, 32]), (("--config", str(recipe)), [16, 32, 64])):
        fit, _ = fit_of(*typed)
        runs = map(fit.config, fit.space.variants("rank", fit.space.starts()[0]))
        assert [cfg.lora_alpha for cfg in runs] == alphas
