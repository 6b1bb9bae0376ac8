"""Recipes: what stands in the file is what is meant, and no file can hold a run up."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilora_diffusion.config import parse
from bilora_diffusion.config.recipe import MOST_BYTES, read_options
from bilora_diffusion.errors import UserError

BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(20))


def recipe(folder: Path, text: str | bytes) -> list[str]:
    """A command line that names a recipe of that text."""
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config", str(path)]


def test_a_value_is_the_text_that_stands_there(tmp_path: Path) -> None:
    """YAML 1.1 makes 90, 8, 1.1, 1000, True and a date of these."""
    texts = ["1:30", "0o10", "010", "1.10", "1_0:00", "yes", "off", "2024-01-01", "0x10", "1e3"]
    lines = "".join(f"- {text}\n" for text in texts)
    cfg = parse(recipe(tmp_path, f"dataset: mini\nvalidation_prompts:\n{lines}rank: 010\n"))
    assert cfg.validation_prompts == texts
    assert cfg.rank == 10  # as by --rank 010
    cfg = parse(recipe(tmp_path, "dataset: mini\ncenter_crop: true\nrandom_flip: yes\nrho: ~\n"))
    assert (cfg.center_crop, cfg.random_flip, cfg.rho) == (True, True, 0.05)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rank: 1:30", ["--rank", "'1:30'", "whole number"]),
        ("rho: .inf", ["--rho", "'.inf'", "a number"]),
        ("rank: 4\nseed: 1\nrank: 8", ['"rank" twice', "lines 1 and 3"]),
        ("rank: &r 4\nauxiliary_rank: *r", ["anchor", "line 1"]),
        ("instance_prompt: !bang", ["tag in line 1", "quotes"]),
        ("? [a]\n: 1", ["key in line 1"]),
        (BOMB, ["anchor", "write the value out"]),
        ("a: " + "[" * 100_000, ["levels deep"]),
        ("- " * 1000, ["levels deep"]),
        ("x" * (MOST_BYTES + 1), ["larger than 0.2 MB", "--config"]),
        ("rank: 4\n---\nrank: 8", ["several documents"]),
        (r'instance_prompt: "a\0b"', ["line 1", "no text"]),
        (r'instance_prompt: "\ud800"', ["line 1", "no text"]),
        (r'instance_prompt: "\UFFFFFFFF"', ["not valid YAML"]),
        ("x" * 1000 + ": 1", ["1000 letters"]),
        (f"rank: {'9' * 10_000}", ["--rank", "whole number"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_no_recipe_is_a_sentence(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        parse(recipe(tmp_path, text))
    for part in parts:
        assert part in str(refusal.value)
    assert len(str(refusal.value)) < 400 + len(str(tmp_path))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(UserError, match="of --config is no regular file"):
            parse(["--config", path])


PIECES = st.sampled_from(
    [
        *("rank", "rho", "seed", "dataset", "mini", "4", "1e-4", "~", "true", "&a", "*a", "!!int "),
        *(
            ": ",
            ":\n  ",
            "\n",
            "- ",
            "[",
            "]",
            "{",
            "}",
            ", ",
            "? ",
            "| ",
            ">",
            '"',
            "'",
            "\\x",
            "#",
        ),
        *(
            "%YAML 1.1\n",
            "---\n",
            "...\n",
            "\t",
            "<<",
            "\0",
            "\x85",
            "\ud7ff",
            "\\ud800",
            "\\U99999999",
        ),
    ]
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=25).map("".join)))
def test_any_bytes_are_options_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes
) -> None:
    argv = recipe(tmp_path_factory.getbasetemp(), content)
    for read in (lambda: parse(argv), lambda: read_options(Path(argv[1]), "the file", "--x")):
        with contextlib.suppress(UserError):
            read()
