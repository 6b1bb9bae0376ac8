"""Prompt sets: what is shipped, files of the user's own, and what is refused."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.mini import heldout_dir, train_dir
from eval.clip_scores.prompts import Prompt, read

PAPER = (
    *("Fluffy Rabbit", "Curly Cloud", "Roaring Lion"),
    *("Dripping Water Drop", "Hopping Frog", "Smiling Sun"),
)


def labels(folder: Path) -> dict[str, str]:
    """Label -> file name of the miniature's icons."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["label"]: row["file_name"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def icons() -> list[Prompt]:
    return read("3d_icon")


def test_the_icons_are_200_of_one_form_and_were_not_trained_on(icons):
    assert len({prompt.text for prompt in icons}) == len(icons) == 200
    for prompt in icons:
        assert prompt.text == f"a TOK icon of a {prompt.instance}, in the style of TOK"
        assert str(prompt.instance)[0].isupper() or str(prompt.instance)[0].isdigit()
        assert not prompt.general
    assert tuple(prompt.instance for prompt in icons[:6]) == PAPER
    asked = {str(prompt.instance).lower() for prompt in icons}
    assert len(asked) == 200
    assert asked.isdisjoint(labels(train_dir()))
    found = {p.reference.name for p in icons if p.reference is not None}
    assert found == set(labels(heldout_dir()).values())
    general = read("general")
    assert len({prompt.text for prompt in general}) == len(general) == 24
    assert all(p.general and p.reference is None and "tok" not in p.text.lower() for p in general)


def test_a_csv_has_columns(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "owl.png")
    file = tmp_path / "my.csv"
    file.write_text(
        "id,prompt,caption,instance,reference\n"
        '1,"an owl, at night","a line,\nbroken",Night Owl,pictures/owl.png\n'
        "2,a photo of a cat,cat,,\n",
        encoding="utf-8",
    )
    owl, cat = read(file)
    assert owl == Prompt("an owl, at night", "Night Owl", tmp_path / "pictures" / "owl.png")
    assert cat == Prompt("a photo of a cat", "cat")
    assert [prompt.text for prompt in read(file, "caption")] == ["a line,\nbroken", "cat"]


REFUSED = {
    "empty.txt": (b"\n# nothing\n", None, ["empty.txt", "one a line"]),
    "twice.txt": (b"a cat\n\na dog\na cat\n", None, ["line 1", "line 4", '"a cat"']),
    "column.csv": (b"promt,id\na cat,1\n", None, ['"prompt"', 'did you mean "promt"', "id"]),
    "gone.csv": (b"prompt,reference\na cat,cat.png\n", None, ["line 2", '"cat.png"']),
    "3d_icons": (None, None, ['"3d_icons"', 'did you mean "3d_icon"']),
    "pipe.txt": (None, None, ["pipe.txt"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_set_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, column, words = REFUSED[name]
    if content is not None:
        Path(name).write_bytes(content)
    os.mkfifo("pipe.txt")
    with pytest.raises(UserError) as caught:
        read(name, column)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
