"""Recipes: values are read as written, and bad files are refused quickly."""

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilora_diffusion.config.command_line import MAX_BYTES, read_options
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.config import resolve

ROOT = Path(__file__).resolve().parents[2]
ICONS = f"--config {ROOT / 'recipes' / 'sdxl_3d_icon.yaml'}"
# 21 lines that expand to two million words.
BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(20))


def recipe(folder, content):
    """Write a recipe with this text or these bytes and return its path."""
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


TEXTS = ["1:30", "0o10", "010", "1.10", "1_0:00", "yes", "off", "2024-01-01", "0x10", "1e3"]
"""Words that YAML 1.1 reads as numbers, booleans or dates."""
READ: list[Any] = [
    ("dataset: mini\nrank: 8\n", "--rank 16", {"dataset_name": "mini", "lora_alpha": 32}),
    ("cache_latents: no\ncenter-crop: true\n", "", {"cache_latents": "no", "center_crop": True}),
    ("auxiliary_rank: null\nrho: ~\n", "", {"auxiliary_rank": None, "rho": 0.05}),
    ("validation_prompts: [a lion, a frog]", "", {"validation_prompts": ["a lion", "a frog"]}),
    (f"validation_prompts: [{', '.join(TEXTS)}]", "", {"validation_prompts": TEXTS}),
    # numbers are parsed as on the command line
    ("rank: 010\nlearning_rate: 1e-3", "", {"rank": 10, "learning_rate": 1e-3}),
    # a recipe's radius is for the recipe's method
    ("dataset: mini\nrho: 0.3\n", "--method flat-lora", {"rho": 0.1}),
    ("dataset: mini\nrho: 0.3\n", "--method lora-sam --rho 0.2", {"rho": 0.2}),
    ("dataset: mini\nrho: 0.3\nmethod: lora-sam", "--method bilora", {"rho": 0.05}),
    ("dataset: mini\nrho: 0.3\n", "--method bilora --rank 8", {"rho": 0.3}),
    # a flag replaces the recipe's alternative to it
    ("max_train_steps: 9", "--num_train_epochs 2", {"max_train_steps": None}),
    ("instance_data_dir: images", "", {"dataset_name": "mini", "instance_data_dir": None}),
]


@pytest.mark.parametrize(("text", "words", "expected"), READ)
def test_a_recipes_values_are_read_as_text_and_flags_take_precedence(
    text, words, expected, tmp_path
):
    if "dataset: " not in text:
        words += " --dataset mini"
    cfg = resolve(f"--config {recipe(tmp_path, text)} {words}".split())
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_a_radius_that_is_not_used_is_named(caplog, tmp_path):
    path = recipe(tmp_path, "dataset: mini\nrho: 0.3\n")
    flags = f"--config {path} --method lora-sam"
    resolve(f"{flags} --rho 0.2".split())
    assert not caplog.messages
    resolve(flags.split())
    (message,) = caplog.messages
    assert "rho 0.3" in message


def test_the_icons_recipe_equals_the_command_with_one_flag():
    short = resolve(["--dataset", "linoyts/3d_icon"]).resume_settings()
    assert resolve(ICONS.split()).resume_settings() == {**short, "auxiliary_rank": 4}
    cfg = resolve(f"{ICONS} --learning_rate 1e-3".split())  # changes both rates
    assert cfg.learning_rate == 1e-3
    assert cfg.auxiliary_learning_rate is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        # Unknown options, and values of the wrong kind.
        ("dataset: mini\nrnk: 4\n", 'did you mean "rank"'),
        ("dataset: mini\nrank: [1, 2]\n", "single value"),
        ("dataset: mini\nvalidation_prompts: [null, a]\n", "single values in one list"),
        ("dataset: mini\ndataset_name: x/y\n", "second time"),
        # Files that are not recipes.
        ("", "holds no options"),
        (b"\xff\xfe\x00rank", "not UTF-8"),
        ("rank: 4\nseed: 1\nrank: 8", "line 3"),
        (BOMB, "an anchor"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("x" * (MAX_BYTES + 1), "larger than"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_bad_recipe_is_refused_in_one_short_sentence(tmp_path, text, part):
    with pytest.raises(UserError) as error:
        resolve(["--config", str(recipe(tmp_path, text))])
    assert part in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path), ""):
        with pytest.raises(UserError, match=r'of --config is |--config "" is neither'):
            resolve(["--config", path, "--dataset", "mini"])


TOKENS = r"""
    rank rho seed dataset mini 4 1e-4 ~ true &a *a - [ ] { } , ? | > ' " # --- ... << \x \ud800
    \U99999999 !!int
"""
SPACED = [": ", ":\n  ", "\n", "- ", "%YAML 1.1\n", "\t", "\0", "\x85", "\ud7ff"]
PIECES = st.sampled_from(TOKENS.split() + SPACED)


@settings(max_examples=100)
@given(st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=25).map("".join)))
def test_any_bytes_give_options_or_a_user_error(tmp_path_factory, content):
    path = recipe(tmp_path_factory.getbasetemp(), content)
    with contextlib.suppress(UserError):
        resolve(["--config", str(path)])
    with contextlib.suppress(UserError):
        read_options(path, "the file", "--x")
