"""Invalid image sets: each is refused in one sentence with the value and the fix."""

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.opening import open_images
from tests.image.image_folders import photos, save, table


def write(name, content):
    """Return a function that writes a file next to the images or over one of them."""
    # Lone surrogates in a text become bytes that are not UTF-8.
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    return lambda folder: (folder / name).write_bytes(data)


def row(text):
    """Return a function that writes a metadata file of one row."""
    return write("metadata.jsonl", text)


def only_files(*names):
    """Return a function that replaces all files of a folder with these."""

    def spoil(folder):
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).write_text("words")

    return spoil


def two_tables(folder):
    row('{"file_name": "a.jpg"}')(folder)
    write("metadata.csv", "file_name\na.jpg")(folder)


def assert_refused(dataset, parts, **options):
    with pytest.raises(UserError) as error:
        open_images(str(dataset), **options)
    message = str(error.value)
    assert "\n" not in message
    # A long list of files is shortened.
    assert len(message) < 1000
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("spoil", "options", "parts"),
    [
        # images
        (write("c.png", b"x"), {}, ["c.png", "--skip_bad_images"]),
        (lambda f: save(f / "d.png", size=(2000, 1)), {}, ["d.png", "2000 pixels wide and 1 high"]),
        (lambda f: Image.new("F", (4, 4), 0.5).save(f / "d.tif"), {}, ["d.tif", "8 bits"]),
        (only_files("a.png"), {"skip_bad_images": True}, ["no readable image"]),
        (only_files("a.txt", "a.heic"), {}, ["holds no images", "pillow-heif"]),
        (write("a.txt", b"\xff"), {}, ["a.txt", "UTF-8"]),
        # metadata
        (
            row('{"file_name": "c.png", "text": "", "label": 1}'),
            {"caption_column": "texts"},
            ['"texts"', 'did you mean "text"', "image, text, label"],
        ),
        (
            row('{"file_name": "c.png", "label": 1}'),
            {"caption_column": "label"},
            ["c.png", '"label"', "a number", "text"],
        ),
        (row('{"file_name": "gone.png"}'), {}, ['"gone.png"', "not a file there"]),
        (row('{"file_name": "../x.png"}'), {}, ["../x.png", "outside"]),
        (row('{"name": "c.png"}'), {}, ["line 1", '"file_name"']),
        (row("\n"), {}, ["metadata.jsonl", "no image"]),
        (two_tables, {}, ["both metadata.jsonl and metadata.csv"]),
    ],
)
def test_a_folder_with_invalid_content_is_refused(spoil, options, parts, tmp_path):
    folder = photos(tmp_path / "photos")
    spoil(folder)
    assert_refused(folder, parts, cache_dir=str(tmp_path / "cache"), **options)


def test_a_path_that_is_not_a_folder_is_refused(tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    (tmp_path / "a.zip").touch()
    assert_refused(tmp_path / "a.zip", ["a.zip", "is a file", "folder"])
    save(tmp_path / "photo*" / "x" / "a.png")  # a pattern that would also match photos
    assert_refused(tmp_path / "photo*", ["photo*", "pattern", "rename"])
    monkeypatch.chdir(tmp_path)
    assert_refused("fotos", ['"fotos"', 'did you mean "photos"', "path of a folder", "OWNER/NAME"])


@pytest.mark.parametrize(
    ("split", "options", "parts"),
    [
        ("train", {}, ['"image"', "--image_column", "picture, prompt, number"]),
        ("train", {"image_column": "prompt"}, ['"prompt"', "holds no images", "picture"]),
        ("test", {"image_column": "picture"}, ['"train"', "only test"]),
    ],
)
def test_a_table_without_the_expected_column_or_split_is_refused(split, options, parts, tmp_path):
    table(tmp_path / "set" / f"{split}.parquet", {"x": Image.new("RGB", (8, 8))})
    assert_refused(tmp_path / "set", parts, cache_dir=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (DatasetNotFoundError("Dataset doesn't exist"), ["hf auth login"]),
        (ConnectionError("Couldn't reach the Hub\nlong story"), ["Couldn't reach", "connection"]),
    ],
)
def test_a_set_on_the_hub_that_can_not_be_loaded_is_refused(monkeypatch, error, parts):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert_refused("someone/icons", ["someone/icons", *parts])
