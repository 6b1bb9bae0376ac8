"""Recipes of text models have the values of the paper's tables."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from bilora_diffusion.text import catalog
from bilora_diffusion.text.config import resolve as resolve_text

pytestmark = pytest.mark.usefixtures("hub")

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
TABLES: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(
    (ROOT / "tests" / "references" / "paper_tables.yaml").read_text(encoding="utf-8")
)
MODELS = {
    "t5_base": "google-t5/t5-base",
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama31_8b": "meta-llama/Llama-3.1-8B",
}
"""Base model of each folder of recipes."""

FOLDERS = {"A4": "t5_base", "A5": "t5_base", "A6": "llama2_7b", "A7": "llama31_8b"}
COLUMNS: dict[str, dict[str, Any]] = {}
"""Values of each recipe's column: `t5_base/sst2` is column "SST-2" of Table A4."""

for _table, _folder in FOLDERS.items():
    for _column, _figures in TABLES[_table].items():
        _name = _column.removeprefix("Cleaned ").replace("-", "").lower()
        COLUMNS[f"{_folder}/{_name}"] = _figures

# The recipe's key for each table row; a row without a single key is compared separately.
KEYS = {
    "Learning Rate": "learning_rate",
    "Epochs": "num_train_epochs",
    "Max Sequence Length": "max_length",
    "LoRA Rank": "rank",
    "LoRA Dropout": "lora_dropout",
    "LoRA Alpha": "lora_alpha",
    "Warmup Ratio": "warmup_ratio",
    "Bi-LoRA rho": "rho",
    "Micro-Batch Size": "train_batch_size",
}
WORDS = {"LR Scheduler": "lr_scheduler", "Target Modules": "target_modules"}
OPTIONS = {"Cosine": "cosine", "All": "all-linear"}
NOT_IN_THE_RECIPE = {"LoRA-SAM rho", "Full FT Learning Rate", "Full FT Micro-Batch Size"}
METRICS = {"Accuracy": "accuracy", "Matthews Corr.": "matthews_correlation"}


def compare(row, figure, values):
    """Check that a recipe, or a run's configuration, has the table's value of a row."""
    if row in KEYS:
        assert float(values[KEYS[row]]) == figure
    elif row in WORDS:
        value = values[WORDS[row]]
        # A run's configuration has the target modules as a list.
        assert value in (OPTIONS[figure], [OPTIONS[figure]])
    else:
        assert row == "Batch Size"
        assert values["train_batch_size"] * values["gradient_accumulation_steps"] == figure


def test_every_column_has_one_recipe_and_every_recipe_has_a_column():
    recipes = set()
    for folder in MODELS:
        for path in (RECIPES / folder).iterdir():
            recipes.add(f"{folder}/{path.stem}")
    assert recipes == set(COLUMNS)
    assert TABLES.keys() == FOLDERS.keys()


@pytest.mark.parametrize("name", COLUMNS)
def test_a_recipe_and_its_run_have_every_value_of_their_column(name):
    column = COLUMNS[name]
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    values = vars(resolve_text(["--config", str(RECIPES / f"{name}.yaml")]))
    for row in column.keys() - NOT_IN_THE_RECIPE - {"Evaluation Metric"}:
        compare(row, column[row], recipe)
        compare(row, column[row], values)
    assert (values["max_train_steps"], values["lr_warmup_steps"]) == (None, None)
    assert recipe["model_name_or_path"] == MODELS[name.partition("/")[0]]
    assert recipe["method"] == "bilora"
    assert recipe["auxiliary_rank"] == column["LoRA Rank"]
    # The auxiliary's rate follows the primary's, so one flag changes both.
    assert "auxiliary_learning_rate" not in recipe
    if metric := METRICS.get(column.get("Evaluation Metric", "")):
        assert catalog.get(recipe["task"]).metrics[0] == metric
    else:
        assert not name.startswith("t5_base/")
