"""results/paper.md names every experiment, and the experiments have the paper's settings.

`test_walk.py` runs the page's commands.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.text.config import TextConfig
from eval.sweep import plan
from tests.docs.pages import commands, scripts

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "results" / "paper.md"
EXPERIMENTS = sorted((ROOT / "eval" / "experiments" / "paper").glob("*.yaml"))
GLUE = ("mnli", "sst2", "cola", "qnli", "mrpc")

RADII: dict[tuple[str, str], float] = {
    ("glue", "lora-sam"): 0.01,  # Appendix H.1, for Table 1
    ("glue", "bilora"): 0.05,
    ("superglue", "lora-sam"): 0.05,  # Appendix H.1, for Table 2
    ("superglue", "bilora"): 0.1,
    ("llama2_7b", "lora-sam"): 0.01,  # Appendix H.2, for Tables 3 and A2
    ("llama2_7b", "bilora"): 0.1,
    ("llama2_7b", "flat-lora"): 0.05,  # Appendix H.4, for Table 5: the radius of Li et al. 2024b
    ("llama31_8b", "lora-sam"): 0.01,  # Appendix H.2, for Table 3
    ("llama31_8b", "bilora"): 0.05,
}
TABLE_A1 = {"0.01", "0.05", "0.1", "0.2"}
# Full FT's learning rates, Appendices H.1 and H.2
RATES_OF_FULL = {"glue": 1e-4, "superglue": 1e-4, "llama2_7b": 5e-5, "llama31_8b": 5e-5}
RUNS_OF_TABLE_2 = {"boolq": 3, "wic": 3, "rte": 5, "cb": 20, "copa": 20}  # Section 5.2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create a reader's working folder with the repository's experiments and recipes."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "experiments").symlink_to(ROOT / "eval" / "experiments")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def family(recipe: Path) -> str:
    """Return the name of the recipe's group; the recipes of a group share the paper's radii."""
    if recipe.parent.name != "t5_base":
        return recipe.parent.name
    return "glue" if recipe.stem in GLUE else "superglue"


@pytest.mark.slow
def test_every_variant_has_the_paper_s_radius_rate_and_number_of_runs(folder, hub):
    radii: dict[tuple[str, str], Any] = {}
    rates: dict[str, float] = {}
    seeds: dict[str, int] = {}
    plans = []
    for path in EXPERIMENTS:
        plans += plan.load(path)  # one for each recipe
    for planned in plans:
        group = family(planned.recipe)
        if group == "superglue":
            seeds[planned.recipe.stem] = len(planned.seeds)
        if "rho" in planned.experiment.axes:
            assert set(planned.experiment.axes["rho"]) == TABLE_A1
            continue
        for run in planned.runs[: len(planned.variants)]:  # the runs of the first seed
            words = ["--config", str(planned.recipe), "--output_dir", "run"]
            config = TextConfig.resolve(words + list(run.flags))
            if config.method == "full":
                rates[group] = config.learning_rate
            elif (group, config.method) in RADII:
                radius = radii.setdefault((group, config.method), config.rho)
                assert config.rho == radius, f"{planned.recipe}, {config.method}: two radii"
            else:
                assert config.method in ("lora", "lora-obar", "lora-nbar")  # these have no radius
    assert radii == RADII
    assert rates == RATES_OF_FULL
    assert seeds == RUNS_OF_TABLE_2


def test_every_experiment_is_on_the_page_and_no_two_commands_share_an_output(folder):
    experiments, outputs = [], []
    for script in scripts(PAGE):
        for command in commands(script, folder):
            for word, following_word in pairwise(command):
                if word in ("--output_dir", "--json"):
                    outputs.append(following_word)
            experiments += [ROOT / word for word in command if word.startswith("eval/experiments/")]
    assert sorted(experiments) == EXPERIMENTS
    assert len(set(outputs)) == len(outputs)
