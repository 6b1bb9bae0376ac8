"""Images and captions from folders in every layout and from the Hub."""

import os
import pickle
import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image import image_files, sets
from bilora_diffusion.image.captions import captions_or_prompts
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.script import training_images
from tests.image.image_folders import photos, save, table
from tests.scripts.runs import flags


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / "photos")


@pytest.fixture
def listed(folder):
    """Return the same folder with a metadata file, which lists the images in another order."""
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "c.png", "text": "a red c", "number": 1}\n'
        '{"file_name": "a.jpg", "text": null, "number": 2}\n'
        '{"file_name": "b.webp", "text": "  ", "number": 3}\n\n'
    )
    return folder


def names(images):
    return [entry.name for entry in images.entries]


def captions(images):
    return [entry.caption for entry in images.entries]


def test_images_have_the_captions_from_text_files_next_to_them(folder):
    images = open_images(str(folder))
    assert names(images) == ["a.jpg", "b.webp", "c.png"]
    assert captions(images) == ["a red square ä", "b", None]
    assert captions_or_prompts(images, ["TOK"]) == ["a red square ä", "b", "TOK"]
    assert images.entries[0].size == (8, 12)
    assert images.image(0).mode == "RGB"
    (line,) = images.remarks()
    for part in ("2 of 3", ".txt", "--instance_prompt"):
        assert part in line
    assert captions(open_images(str(folder), caption_column="text")) == captions(images)


def test_caption_files_are_left_out_on_request(folder):
    images = open_images(str(folder), caption_column="none")
    assert captions(images) == [None] * 3
    assert "2 files (a.txt, b.TXT)" in images.remarks()[0]


def test_a_metadata_file_takes_precedence_over_caption_files(listed):
    images = open_images(str(listed), caption_column="text")
    assert names(images) == ["c.png", "a.jpg", "b.webp"]
    assert captions(images) == ["a red c", None, None]
    assert "2 files (a.txt, b.TXT)" in images.remarks()[0]
    with pytest.raises(UserError, match=r"a\.jpg .*has no caption.*--instance_prompt"):
        captions_or_prompts(images, [None])
    unpickled_images = pickle.loads(pickle.dumps(images))  # as for a process that reads ahead
    assert captions(unpickled_images) == captions(images)
    assert unpickled_images.image(1).tobytes() == images.image(1).tobytes()


def test_captions_stay_with_their_images_if_one_is_skipped(listed):
    (listed / "c.png").write_bytes(b"broken")
    images = open_images(str(listed), caption_column="text", skip_bad_images=True)
    assert names(images) == ["a.jpg", "b.webp"]
    assert captions(images) == [None, None]
    assert images.entries[0].size == (8, 12)
    (skipped,) = images.skipped
    assert skipped.startswith("c.png:")


def test_metadata_can_be_csv_and_name_files_in_subfolders(tmp_path):
    save(tmp_path / "deep" / "a.png")
    save(tmp_path / "b.png")
    text = 'file_name,text\r\ndeep/a.png,"red, ""big""\nand wide"\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode("utf-8-sig"))
    images = open_images(str(tmp_path), caption_column="text")
    assert (names(images), captions(images)) == (["deep/a.png"], ['red, "big"\nand wide'])
    assert "1 file (b.png)" in images.remarks()[0]


def test_images_are_read_when_needed(folder):
    images = open_images(str(folder))
    # The pixels are the current ones, not those when the set was opened.
    save(folder / "a.jpg", 250)
    assert np.asarray(images.image(0))[0, 0, 0] > 240
    save(folder / "a.jpg", size=(5, 6))
    with pytest.raises(UserError, match=r"a\.jpg .* 6 pixels high and 5 wide"):
        images.image(0)
    (folder / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"a\.jpg"):
        images.image(0)


def test_a_fingerprint_depends_on_content_and_not_on_the_path(listed, tmp_path):
    def fingerprint(path):
        return open_images(str(path), caption_column="text").fingerprint()

    copy = tmp_path / "copy"
    shutil.copytree(listed, copy)
    original = fingerprint(listed)
    # The copy has the same images and captions in another place.
    assert fingerprint(copy) == original
    text = (copy / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").write_text(text.replace("red", "blue"))
    recaptioned = fingerprint(copy)
    save(copy / "c.png", 7)
    assert len({original, recaptioned, fingerprint(copy)}) == 3


def test_only_the_headers_of_many_images_are_read(folder, monkeypatch):
    file = folder / "c.png"
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    noise.save(file)
    # Its header can be read, its pixels can't.
    truncated = file.read_bytes()[:2000]
    file.write_bytes(truncated)
    with pytest.raises(UserError, match=r"c\.png"):
        open_images(str(folder))
    monkeypatch.setattr(sets, "FULL_CHECK_LIMIT", 2)  # the folder has three images
    images = open_images(str(folder))
    with pytest.raises(UserError, match=r"c\.png"):
        images.image(2)
    Image.new("RGB", (64, 64)).save(file)  # same size in pixels, another in bytes
    assert open_images(str(folder)).fingerprint() != images.fingerprint()


def test_all_files_that_are_left_out_are_named_in_one_line(folder):
    for name in ("x.heic", "c.caption", "notes.txt", ".hidden"):
        (folder / name).write_bytes(b"content")
    # Opening the pipe would wait forever, and the link points to itself.
    os.mkfifo(folder / "pipe.png")
    (folder / "circle.png").symlink_to("circle.png")
    save(folder / "extra" / "deep" / "e.png")
    images = open_images(str(folder), caption_column="text")
    assert len(images) == 3
    line = images.remarks()[-1]
    names = "c.caption, circle.png, notes.txt, pipe.png, x.heic, extra/deep/e.png"
    assert f"6 files ({names}); `pip install pillow-heif` makes HEIC readable" in line


@pytest.fixture
def add_heif_package(monkeypatch):
    """Return a function that installs a fake pillow-heif and returns the list of its calls."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_files.reads_heif.cache_clear()

    def install():
        registrations = []
        package: Any = ModuleType("pillow_heif")
        package.__spec__ = ModuleSpec("pillow_heif", None)
        package.register_heif_opener = lambda: registrations.append("HEIF")
        monkeypatch.setitem(sys.modules, "pillow_heif", package)
        image_files.reads_heif.cache_clear()
        return registrations

    yield install
    image_files.reads_heif.cache_clear()


def test_heic_is_read_if_pillow_can(folder, add_heif_package):
    save(folder / "d.png")
    (folder / "d.png").rename(folder / "d.heic")  # Pillow detects the format from the content
    assert len(open_images(str(folder))) == 3
    registrations = add_heif_package()
    images = open_images(str(folder))
    assert len(images) == 4
    assert images.image(3).size == (12, 8)
    assert registrations == ["HEIF"]


def test_subfolders_are_read_in_place_with_their_caption_files(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / "set" / name / "1.png")
        (tmp_path / "set" / name / "1.txt").write_text(f"a {name}")
    (tmp_path / "set" / "dog" / "x.heic").touch()
    images = open_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert captions(images) == ["a cat", "a dog"]
    assert images.image(0).size == (12, 8)
    line, left_out = images.remarks()
    assert "2 of 2 images" in line
    assert "1 file (dog/x.heic); `pip install pillow-heif`" in left_out
    # The images are read in place.
    assert not list((tmp_path / "cache").rglob("*.png"))


def test_kohyas_number_of_repeats_in_a_folders_name_is_not_read(tmp_path):
    save(tmp_path / "set" / "10_TOK cat" / "1.png")
    images = open_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert any('"10_TOK cat"' in line and "not read" in line for line in images.remarks())


@pytest.fixture
def hub_options(tmp_path, monkeypatch):
    """Replace the Hub with a folder of Parquet files and a preview; return options to open it."""
    rows: dict[str, Any] = {
        "zero": Image.new("RGB", (10, 8)),
        "": Image.new("RGB", (11, 8)),
        "two": Image.new("RGB", (12, 8), (120, 0, 0)),
        "nothing": None,
    }
    table(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", rows)
    save(tmp_path / "set" / "preview.png")
    load_dataset = datasets.load_dataset

    def load(path, name, *, cache_dir):
        assert (path, name, cache_dir) == ("someone/icons", "small", str(tmp_path / "cache"))
        return load_dataset(str(tmp_path / "set"), cache_dir=cache_dir)

    monkeypatch.setattr(datasets, "load_dataset", load)
    cache = str(tmp_path / "cache")
    return {"image_column": "picture", "config_name": "small", "cache_dir": cache}


def test_a_set_on_the_hub_is_read_from_its_tables(hub_options):
    images = open_images(
        "someone/icons", skip_bad_images=True, caption_column="prompt", **hub_options
    )
    assert names(images) == ["someone/icons[0]", "someone/icons[1]", "someone/icons[2]"]
    assert len(images.skipped) == 1
    assert captions(images) == ["zero", None, "two"]
    assert [entry.size for entry in images.entries] == [(8, 10), (8, 11), (8, 12)]
    unpickled_images = pickle.loads(pickle.dumps(images))
    assert unpickled_images.image(2).getpixel((0, 0)) == (120, 0, 0)
    assert unpickled_images.fingerprint() == images.fingerprint()


def test_a_row_without_an_image_is_refused_with_its_number(hub_options):
    with pytest.raises(UserError, match=r"someone/icons\[3\].*--skip_bad_images"):
        open_images("someone/icons", **hub_options)


def test_fewer_than_five_images_give_a_warning(tmp_path, caplog):
    def messages_of(count):
        for number in range(count):
            save(tmp_path / f"{number}.png")
        options = {"dataset": tmp_path, "instance_prompt": "a TOK", "resolution": 64}
        cfg = resolve(flags(tmp_path / "run", **options, pretrained_model_name_or_path="mini"))
        caplog.clear()
        assert len(training_images(cfg)) == count
        return [record.getMessage() for record in caplog.records]

    (message,) = messages_of(1)
    assert "has 1 image: " in message
    assert messages_of(5) == []
