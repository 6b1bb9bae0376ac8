"""Captions beside images, and what a folder holds that is no image: read, named or refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.image import decode, listing
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.sets import ImageSet


def save(path: Path, size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (100, 0, 0)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, of which two have captions."""
    folder = tmp_path / "photos"
    for name in ("a.jpg", "b.png", "c.png"):
        save(folder / name)
    (folder / "a.txt").write_bytes("\ufeffa red\nsquare ä \n".encode())
    (folder / "b.TXT").write_text("b")
    return folder


def captions(images: ImageSet) -> list[str | None]:
    return [images.caption(i) for i in range(len(images))]


def refusal(dataset: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_images(str(dataset), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_captions_lie_beside_their_images(photos: Path) -> None:
    images = open_images(str(photos))
    assert captions(images) == ["a red square ä", "b", None]
    assert images.prompts("TOK") == ["a red square ä", "b", "TOK"]
    (line,) = images.remarks()
    assert "2 of 3" in line
    assert ".txt" in line
    assert "--instance_prompt" in line
    assert captions(open_images(str(photos), caption_column="text")) == captions(images)
    assert 'no column "prompt"' in refusal(photos, caption_column="prompt")


def test_whoever_wants_no_captions_gets_none_and_is_told(photos: Path) -> None:
    images = open_images(str(photos), caption_column="none")
    assert captions(images) == [None] * 3
    (line,) = images.remarks()
    assert "2 captions in .txt files (a.txt, b.TXT)" in line


def test_a_metadata_file_overrules_captions_beside_images(photos: Path) -> None:
    rows = '{"file_name": "a.jpg", "text": "from the metadata"}\n{"file_name": "b.png"}\n'
    (photos / "metadata.jsonl").write_text(rows)
    images = open_images(str(photos), caption_column="text")
    assert captions(images) == ["from the metadata", None]
    (line,) = images.remarks()
    assert "2 captions in .txt files" in line
    assert "1 image that the metadata does not list (c.png)" in line


def test_captions_in_subfolders_are_those_of_their_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / "set" / name / "1.png")
        (tmp_path / "set" / name / "1.txt").write_text(f"a {name}")
    (tmp_path / "set" / "dog" / "x.heic").touch()
    images = open_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert captions(images) == ["a cat", "a dog"]
    said, left_out = images.remarks()
    assert "2 of 2 images" in said
    assert "1 HEIC file" in left_out


def test_whatever_is_left_out_is_named_in_one_line(photos: Path) -> None:
    for name in ("x.heic", "y.HEIC", "z.cr2", "c.caption", "notes.txt", "d.npz", ".hidden"):
        (photos / name).write_bytes(b"content")
    os.mkfifo(photos / "pipe.png")
    (photos / "broken.png").symlink_to("circle.png")
    (photos / "circle.png").symlink_to("broken.png")
    save(photos / "extra" / "deep" / "e.png")
    (photos / "empty").mkdir()
    images = open_images(str(photos), caption_column="none")
    assert len(images) == 3
    (line,) = images.remarks()
    assert line.startswith(f"left out of {photos}: ")
    for part in (
        "2 HEIC files, which `pip install pillow-heif` makes readable (x.heic, y.HEIC)",
        "1 raw photo, which must be exported as JPEG or PNG (z.cr2)",
        "1 .caption file, which must end in .txt (c.caption)",
        "1 text without an image (notes.txt)",
        "3 images that can't be opened (broken.png, circle.png, pipe.png)",
        "1 other file (d.npz)",
        "1 subfolder with images (extra)",
    ):
        assert part in line
    assert "hidden" not in line
    assert "empty" not in line


def test_heic_is_read_where_pillow_can(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(photos / "d.png")
    (photos / "d.png").rename(photos / "d.heic")  # Pillow goes by the content
    assert len(open_images(str(photos))) == 3
    (photos / "alone").mkdir()
    (photos / "d.heic").rename(photos / "alone" / "d.heic")
    assert "pillow-heif" in refusal(photos / "alone")
    (photos / "alone" / "d.heic").rename(photos / "d.heic")
    monkeypatch.setattr(decode, "reads_heif", lambda: True)
    monkeypatch.setattr(decode, "_register_heif", lambda: None)
    assert len(open_images(str(photos))) == 4


@pytest.mark.parametrize("where", ["images", "tables", "nothing"])
def test_a_disk_is_no_set_of_images(
    where: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root, or a home: looking through it ends after so many files."""
    root = photos if where == "images" else photos.parent / "root"
    for number in range(30):
        (root / "lib" / str(number)).mkdir(parents=True)
        (root / "lib" / str(number) / "file").touch()
    if where == "tables":
        (root / "lib" / "a.parquet").touch()
    monkeypatch.setattr(listing, "MOST_ENTRIES", 50)
    assert "more than 50 files" in refusal(root)
    if where == "images":
        (root / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\n')
        assert len(open_images(str(root))) == 1


def _circle(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)


def _socket(folder: Path) -> None:
    before = Path.cwd()
    os.chdir(folder)  # an address may have 100 bytes
    try:
        socket.socket(socket.AF_UNIX).bind("s.png")
    finally:
        os.chdir(before)


@pytest.mark.parametrize("odd", [_circle, _socket, lambda f: os.mkfifo(f / "metadata.csv")])
def test_oddities_beside_images_keep_nobody_waiting(
    odd: Callable[[Path], None], photos: Path
) -> None:
    odd(photos)
    assert len(open_images(str(photos))) == 3


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda f: (f / "a.txt").write_bytes(b"\xff"), "the caption a.txt is not UTF-8"),
        (lambda f: (f / "a.txt").write_bytes(b"a\0"), "the caption a.txt is no text"),
        (lambda f: (f / "a.txt").write_bytes(b"a" * 200_000), "the caption a.txt is larger"),
        (lambda f: ((f / "a.txt").unlink(), os.mkfifo(f / "a.txt")), "caption a.txt is no reg"),
        (lambda f: ((f / "a.txt").unlink(), (f / "a.txt").mkdir()), None),
        (lambda f: (f / os.fsdecode(b"\xff.png")).write_bytes(b"x"), "is no text: rename it"),
        (lambda f: save(f / "d.png", (1, 1)), None),
        (lambda f: save(f / "d.png", (2000, 1)), "d.png in .* is 2000 pixels wide and 1 high"),
        (lambda f: (f / "d.gif").write_bytes(b"GIF89a"), "d.gif"),
    ],
)
def test_captions_and_images_of_every_kind(
    spoil: Callable[[Path], Any], part: str | None, photos: Path
) -> None:
    spoil(photos)
    if part is None:
        assert len(open_images(str(photos))) >= 3
    else:
        with pytest.raises(UserError, match=part):
            open_images(str(photos))


def test_an_image_of_absurd_size_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert "a.jpg" in refusal(photos)
    assert "no readable image" in refusal(photos, skip_bad_images=True)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ('{"file_name": "extra"}', "is a folder"),
        ('{"file_name": "a\\u0000.jpg"}', "no file can be called"),
        ('{"file_name": "\\ud800.jpg"}', "no file can be called"),
        (f'{{"file_name": "{"a" * 9999}.jpg"}}', "is not there"),
        ('{"file_name": "pipe.png"}', "is not there"),
        ('{"file_name": "circle.png"}', "is not there"),
        ('{"file_name": "a.jpg", "text": "\\ud800"}', "half a character"),
        ('{"file_name": "a.jpg", "text": "\\u0000"}', "NUL"),
        (f'{{"file_name": "a.jpg", "text": {"9" * 9999}}}', "thousands of digits"),
        (f'{{"file_name": "a.jpg", "text": {"[" * 99999}}}', "nested too deeply"),
        ('{"file_name": ["a.jpg"]}', 'has no "file_name"'),
    ],
)
def test_rows_of_metadata_that_are_none(row: str, part: str, photos: Path) -> None:
    (photos / "extra").mkdir()
    os.mkfifo(photos / "pipe.png")
    (photos / "circle.png").symlink_to("circle.png")
    (photos / "metadata.jsonl").write_text(row)
    assert part in refusal(photos, caption_column="text")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("file_name,text\na.jpg," + "x" * 200_000, "field larger than field limit"),
        ("file_name,text,text\na.jpg,b,c", 'several columns "text"'),
        ("file_name,text\na.jpg,b\0", "NUL"),
        ('file_name,text\na.jpg,"b', "unexpected end of data"),
    ],
)
def test_tables_of_metadata_that_are_none(content: str, part: str, photos: Path) -> None:
    (photos / "metadata.csv").write_text(content)
    assert part in refusal(photos, caption_column="text")
