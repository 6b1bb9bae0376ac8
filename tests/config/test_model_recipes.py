"""Each image model's recipe is found by name, completes a dry run and states its memory."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import train_dreambooth_bilora
from bilora_diffusion.config.command_line import RECIPES, find_recipe, read_options
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.families import SDXL
from bilora_diffusion.mini import pipeline_dir
from docs.make import EXAMPLES
from docs.memory import LINE, MODELS, recipe_models, updated_recipe
from tests.image.tiny import shared
from tests.scripts.test_dry_run import without_weights

RECIPE_OF = recipe_models(EXAMPLES)
"""Name of the model in the tables, for each recipe's path."""


@pytest.mark.parametrize("path", RECIPE_OF, ids=lambda path: path.stem)
def test_a_recipe_is_found_by_name_and_completes_a_dry_run(path, capsys, tmp_path, monkeypatch):
    """The model is a tiny one without weights, and the working directory has no recipes."""
    kind = MODELS[RECIPE_OF[path]]["pipeline"]
    model = pipeline_dir() if kind == SDXL else shared(kind)
    base = without_weights(model, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state()
    flags = (
        f"--config {path.stem} --dataset mini --resolution 64 --dry_run --output_dir run"
        f" --pretrained_model_name_or_path {base} --validation_dataset mini-heldout"
        " --validation_prompt icon"
    )
    assert train_dreambooth_bilora.main(flags.split()) == 0
    out = capsys.readouterr().out
    assert "weights: " in out
    values = read_options(path, path.name, "--config")
    size = int(values["train_batch_size"]) * int(values["gradient_accumulation_steps"])
    assert f"steps: {int(values['max_train_steps']):,} of {size}," in out
    assert "Bi-LoRA on " in out
    assert "It fits" in out


MEMORY_CASES = []
for recipe_path in RECIPE_OF:
    # A dry run at full size takes seconds, so the fast tests run one model only.
    marks = () if recipe_path.stem == "lumina2" else pytest.mark.slow
    MEMORY_CASES.append(pytest.param(recipe_path, marks=marks))


@pytest.mark.parametrize("path", MEMORY_CASES, ids=lambda path: path.stem)
def test_the_memory_stated_in_a_recipe_matches_a_dry_run_and_fits(path):
    text = path.read_text(encoding="utf-8")
    assert text == updated_recipe(path, RECIPE_OF[path]), "run `python -m docs.make`"
    sizes = []
    for line in LINE.finditer(text):
        size = int(line[1])
        needed = float(line[0].split()[-2])
        assert needed < 0.9 * size
        sizes.append(size)
    assert sizes == [24, 16]
    assert "# Learning rate" in text  # the comment that says where it comes from


def test_a_file_takes_precedence_over_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("t5_base/mrpc") == RECIPES / "t5_base" / "mrpc.yaml"
    (tmp_path / "sdxl").mkdir()
    assert find_recipe("sdxl") == RECIPES / "sdxl.yaml"
    (tmp_path / "krea2").write_text("rank: 4")
    assert find_recipe("krea2") == Path("krea2")


@pytest.mark.parametrize("name", ["flux2_klien", "a\0b"])
def test_an_unknown_recipe_name_is_refused_in_one_sentence(name):
    with pytest.raises(UserError, match=r"^--config .* is neither a file nor a recipe"):
        find_recipe(name)
