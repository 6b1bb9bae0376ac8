"""Recipes of the text path: the figures of the paper's tables, and those without a hub."""

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
T5 = {"A4": ("MNLI", "SST-2", "CoLA", "QNLI", "MRPC"), "A5": ("BoolQ", "CB", "COPA", "RTE", "WiC")}
COLUMNS = {
    **{
        f"t5_base/{column.lower().replace('-', '')}": (table, column)
        for table, columns in T5.items()
        for column in columns
    },
    **{f"llama2_7b/{column.lower()}": ("A6", column) for column in ("Math", "Code", "Chat")},
    "llama31_8b/alpaca": ("A7", "Cleaned Alpaca"),
}
MODELS = {
    "A4": "google-t5/t5-base",
    "A5": "google-t5/t5-base",
    "A6": "meta-llama/Llama-2-7b-hf",
    "A7": "meta-llama/Llama-3.1-8B",
}
# Row of the tables -> the recipe's key; rows that are not one key are compared on their own.
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
    """Hold ``values`` (a recipe, or what a run takes from it) to a row of its column."""
    if row in KEYS:
        assert float(values[KEYS[row]]) == figure
    elif row in WORDS:
        value = values[WORDS[row]]
        assert (value if isinstance(value, str) else " ".join(value)) == OPTIONS[figure]
    else:
        assert row == "Batch Size"
        assert values["train_batch_size"] * values["gradient_accumulation_steps"] == figure


def test_every_column_has_its_recipe_and_no_other():
    folders = ("t5_base", "llama2_7b", "llama31_8b")
    recipes = {f"{f}/{path.stem}" for f in folders for path in (RECIPES / f).iterdir()}
    assert recipes == set(COLUMNS)
    columns = {
        (table, column) for table, table_columns in TABLES.items() for column in table_columns
    }
    assert columns == set(COLUMNS.values())


@pytest.mark.parametrize("name", COLUMNS)
def test_a_recipe_and_its_run_hold_every_figure_of_the_column(name):
    table, column = COLUMNS[name]
    figures = TABLES[table][column]
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    values = vars(resolve_text(["--config", str(RECIPES / f"{name}.yaml")]))
    for row in figures.keys() - NOT_IN_THE_RECIPE - {"Evaluation Metric"}:
        compare(row, figures[row], recipe)
        compare(row, figures[row], values)
    assert (values["max_train_steps"], values["lr_warmup_steps"]) == (None, None)
    assert recipe["model_name_or_path"] == MODELS[table]
    assert recipe["method"] == "bilora"
    assert recipe["auxiliary_rank"] == figures["LoRA Rank"]
    assert "auxiliary_learning_rate" not in recipe  # the primary's, so that one flag moves both
    if metric := METRICS.get(figures.get("Evaluation Metric", "")):
        assert catalog.get(recipe["task"]).metrics[0] == metric
    else:
        assert not name.startswith("t5_base/")
