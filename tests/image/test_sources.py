"""Images and captions from the miniature and from local folders."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.image import sets
from bilora_diffusion.image.opening import open_images


def save(path: Path, color: int = 100, size: tuple[int, int] = (12, 8)) -> None:
    Image.new("RGB", size, (color, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images alone: c.png, a.jpg, b.webp, and things that are no images."""
    path = tmp_path / "images"
    path.mkdir()
    for number, name in enumerate(["c.png", "a.jpg", "b.webp"]):
        save(path / name, 60 * number)
    (path / "notes.txt").write_text("not an image")
    (path / "._a.jpg").write_bytes(b"left by another system")
    return path


@pytest.fixture
def captioned(folder: Path) -> Path:
    rows = [
        {"file_name": "c.png", "text": "a red c", "number": 1},
        {"file_name": "a.jpg", "text": None, "number": 2},
        {"file_name": "b.webp", "text": "  ", "number": 3},
    ]
    lines = [json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def refusal(dataset: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_images(str(dataset), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    return message


def test_the_miniature() -> None:
    train = open_images("mini", caption_column="prompt")
    heldout = open_images("mini-heldout", caption_column="prompt")
    assert len(train) == 23
    assert len(heldout) >= 100
    assert not {train.name(i) for i in range(23)} & {heldout.name(i) for i in range(len(heldout))}
    assert {train.size(i) for i in range(23)} == {(64, 64)}
    assert all((train.caption(i) or "").startswith("a TOK icon of a") for i in range(23))
    assert train.columns == ("image", "prompt", "label", "codepoint")


def test_images_alone_are_read_in_the_order_of_their_names(folder: Path) -> None:
    images = open_images(str(folder))
    assert [images.name(i) for i in range(len(images))] == ["a.jpg", "b.webp", "c.png"]
    assert [images.caption(i) for i in range(3)] == [None] * 3
    assert images.columns == ("image",)
    assert images.size(0) == (8, 12)
    assert images.image(0).mode == "RGB"
    assert images.prompts("a TOK") == ["a TOK"] * 3


def test_captions_stay_with_their_images(captioned: Path) -> None:
    images = open_images(str(captioned), caption_column="text")
    assert [images.name(i) for i in range(3)] == ["c.png", "a.jpg", "b.webp"]
    assert [images.caption(i) for i in range(3)] == ["a red c", None, None]
    assert images.prompts("TOK") == ["a red c", "TOK", "TOK"]
    assert images.columns == ("image", "text", "number")
    with pytest.raises(UserError, match=r"a\.jpg .*has no caption.*--instance_prompt"):
        images.prompts(None)


def test_captions_stay_with_their_images_when_one_is_skipped(captioned: Path) -> None:
    (captioned / "c.png").write_bytes(b"broken")
    (captioned / "metadata.jsonl").write_text(
        '{"file_name": "c.png", "text": "c"}\n{"file_name": "a.jpg", "text": "a"}\n'
    )
    images = open_images(str(captioned), caption_column="text", skip_bad_images=True)
    assert (len(images), images.name(0), images.caption(0)) == (1, "a.jpg", "a")
    assert images.size(0) == (8, 12)
    assert images.skipped == ("c.png: not an image file that Pillow knows",)


def test_metadata_may_be_csv_and_name_subfolders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    save(tmp_path / "deep" / "a.png")
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["file_name", "text"], ["deep/a.png", 'red, "big"\nand wide']])
    images = open_images(str(tmp_path), caption_column="text")
    assert images.caption(0) == 'red, "big"\nand wide'
    assert images.name(0) == "deep/a.png"


def test_images_are_read_when_needed(folder: Path) -> None:
    images = open_images(str(folder))
    save(folder / "a.jpg", 250)
    assert np.asarray(images.image(0))[0, 0, 0] > 240
    save(folder / "a.jpg", size=(5, 6))
    with pytest.raises(UserError, match=r"a\.jpg .* 6 pixels high and 5 wide"):
        images.image(0)
    (folder / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"a\.jpg"):
        images.image(0)


def test_a_fingerprint_is_of_content_not_of_place(captioned: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return open_images(str(path), caption_column="text").fingerprint()

    original = fingerprint(captioned)
    copy = tmp_path / "copy"
    shutil.copytree(captioned, copy)
    assert fingerprint(copy) == original
    text = (copy / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").write_text(text.replace("red", "blue"))
    recaptioned = fingerprint(copy)
    save(copy / "c.png", 7)
    assert len({original, recaptioned, fingerprint(copy)}) == 3


def test_a_set_can_be_sent_to_a_worker(captioned: Path) -> None:
    images = open_images(str(captioned), caption_column="text")
    sent = pickle.loads(pickle.dumps(images))
    assert sent.caption(0) == images.caption(0)
    assert sent.image(1).tobytes() == images.image(1).tobytes()


def test_of_many_images_only_the_headers_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "c.png")
    whole = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(whole[: len(whole) // 2])
    assert "c.png" in refusal(folder)
    monkeypatch.setattr(sets, "FULL_CHECK_LIMIT", 2)
    images = open_images(str(folder))
    assert len(images.fingerprint()) == 32
    with pytest.raises(UserError, match=r"c\.png"):
        images.image(2)


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda f: (f / "c.png").write_bytes(b"x"), ["c.png", "--skip_bad_images"]),
        (lambda f: (f / "c.png").write_bytes(b""), ["c.png", "--skip_bad_images"]),
        (lambda f: write(f, "metadata.jsonl", '{"file_name": "gone.png"}\n'), ['"gone.png"']),
        (lambda f: write(f, "metadata.jsonl", '{"file_name": "../x.png"}\n'), ["outside"]),
        (lambda f: write(f, "metadata.jsonl", '{"name": "c.png"}\n'), ["line 1", '"file_name"']),
        (lambda f: write(f, "metadata.jsonl", '{"file_name": \n'), ["line 1", "not JSON"]),
        (lambda f: write(f, "metadata.jsonl", "[1]\n"), ["line 1", "not a JSON object"]),
        (lambda f: write(f, "metadata.jsonl", "\n"), ["metadata.jsonl", "no image"]),
        (lambda f: (f / "metadata.jsonl").write_bytes(b"\xff\xfe"), ["metadata.jsonl", "UTF-8"]),
        (lambda f: write(f, "metadata.csv", "file_name,text\nc.png,a,b\n"), ["line 2", "comma"]),
        (lambda f: write(f, "metadata.csv", "file_name,text\nc.png\n"), ["line 2", "fields"]),
    ],
)
def test_spoiled_folders(folder: Path, spoil: Callable[[Path], Any], parts: list[str]) -> None:
    spoil(folder)
    message = refusal(folder)
    for part in parts:
        assert part in message


def test_two_metadata_files(captioned: Path) -> None:
    write(captioned, "metadata.csv", "file_name\nc.png\n")
    assert "both metadata.jsonl and metadata.csv" in refusal(captioned)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"caption_column": "txt"}, ['"txt"', "--caption_column", "image, text, number"]),
        ({"image_column": "picture"}, ['"picture"', "--image_column"]),
        ({"caption_column": "number"}, ["c.png", '"number"', "int", "not text"]),
        ({"caption_column": "image"}, ['"image"', "both"]),
    ],
)
def test_wrong_columns(captioned: Path, options: dict[str, str], parts: list[str]) -> None:
    message = refusal(captioned, **options)
    for part in parts:
        assert part in message


def test_a_folder_of_broken_images(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"broken")
    assert "no readable image" in refusal(folder, skip_bad_images=True)


def test_an_empty_folder_and_one_without_images(tmp_path: Path) -> None:
    assert "holds no images" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    assert 'no column "image"' in refusal(tmp_path)


def test_paths_that_are_no_folders(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "a.zip").touch()
    assert "is a file" in refusal(tmp_path / "a.zip")
