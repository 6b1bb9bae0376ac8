"""Recipes: values from a YAML file, and those that the repository ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from bilora_diffusion.config import parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without a launcher, whatever runs the tests."""
    for module in ("resolve", "environment"):
        monkeypatch.setattr(f"bilora_diffusion.config.{module}.device_type", lambda: "cpu")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_recipe_gives_values_and_flags_win(recipe) -> None:
    path = recipe(
        "dataset: mini\nlearning_rate: 1e-3\nrank: 8\ncache_latents: no\ncenter-crop: true\n"
        "auxiliary_rank: null\nvalidation_prompts: [a lion, a frog]\nprodigy_decouple: yes\n"
    )
    cfg = parse(["--config", path, "--rank", "16"])
    assert (cfg.dataset_name, cfg.learning_rate, cfg.rank) == ("mini", 1e-3, 16)
    assert (cfg.cache_latents, cfg.center_crop, cfg.auxiliary_rank) == ("no", True, None)
    assert cfg.validation_prompts == ["a lion", "a frog"]
    assert cfg.lora_alpha == 32


def test_a_flag_replaces_its_alternative_in_the_recipe(recipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").touch()
    path = recipe("dataset: mini\nmax_train_steps: 9\ninstance_prompt: TOK\n")
    cfg = parse(["--config", path, "--instance_data_dir", str(folder), "--num_train_epochs", "2"])
    assert (cfg.dataset_name, cfg.max_train_steps, cfg.num_train_epochs) == (None, None, 2)


@pytest.mark.parametrize("name", ["mini", "sdxl_3d_icon"])
def test_recipes_are_complete(name: str) -> None:
    cfg = parse(["--config", str(ROOT / "recipes" / f"{name}.yaml")])
    assert cfg.resolution is not None
    assert cfg.validation_prompts


def test_the_icons_recipe_is_the_command_of_one_flag() -> None:
    written_out = parse(["--config", str(ROOT / "recipes" / "sdxl_3d_icon.yaml")]).fingerprint()
    short = parse(["--dataset", "linoyts/3d_icon"]).fingerprint()
    explicit = {"auxiliary_rank": 4}
    assert written_out == {**short, **explicit}


def test_one_flag_moves_both_rates_of_a_recipe() -> None:
    recipe = ["--config", str(ROOT / "recipes" / "sdxl_3d_icon.yaml")]
    cfg = parse([*recipe, "--learning_rate", "1e-3"])
    assert (cfg.learning_rate, cfg.auxiliary_learning_rate) == (1e-3, None)  # None: the primary's
