"""Sets that the ``datasets`` library reads.

The hub is out of reach of the tests: its sets are played by a local folder that ``datasets`` reads
and by a stand-in for ``load_dataset`` that fails as the real one does.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.opening import open_images


def save(path: Path, color: int = 100, size: tuple[int, int] = (12, 8)) -> None:
    Image.new("RGB", size, (color, 0, 0)).save(path)


def refusal(dataset: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_images(str(dataset), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    return message


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder as the hub stores it: Parquet files with images inside, a preview beside them."""
    images = [Image.new("RGB", (10 + i, 8), (60 * i, 0, 0)) for i in range(3)]
    columns = {"picture": images, "prompt": ["zero", "", "two"], "number": [0, 1, 2]}
    features = datasets.Features(
        picture=datasets.Image(), prompt=datasets.Value("string"), number=datasets.Value("int64")
    )
    table = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path / "hub-set"
    (folder / "data").mkdir(parents=True)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    save(folder / "preview.png")
    return folder


def test_a_folder_in_the_layout_of_the_hub(parquet: Path, tmp_path: Path) -> None:
    images = open_images(
        str(parquet),
        image_column="picture",
        caption_column="prompt",
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(images) == 3
    assert [images.caption(i) for i in range(3)] == ["zero", None, "two"]
    assert [images.size(i) for i in range(3)] == [(8, 10), (8, 11), (8, 12)]
    assert images.image(2).getpixel((0, 0)) == (120, 0, 0)
    assert images.columns == ("picture", "prompt", "number")
    assert images.name(1).endswith("hub-set[1]")
    sent = pickle.loads(pickle.dumps(images))
    assert sent.image(2).tobytes() == images.image(2).tobytes()
    assert len(images.fingerprint()) == 32


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ['"image"', "--image_column", "picture, prompt, number"]),
        ({"image_column": "prompt"}, ['"prompt"', "holds no images", "picture"]),
        ({"image_column": "picture", "caption_column": "text"}, ['"text"', "picture, prompt"]),
        ({"image_column": "picture", "caption_column": "number"}, ['"number"', "int"]),
        ({"image_column": "picture", "config_name": "odd"}, ["odd", "--dataset_config_name"]),
    ],
)
def test_wrong_columns_and_splits_of_a_set(
    parquet: Path, tmp_path: Path, options: dict[str, str], parts: list[str]
) -> None:
    message = refusal(parquet, cache_dir=str(tmp_path / "cache"), **options)
    for part in parts:
        assert part in message


def test_subfolders_are_left_to_datasets(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        save(root / label / f"{label}.png")
    images = open_images(str(root), cache_dir=str(tmp_path / "cache"))
    assert len(images) == 2
    assert images.image(0).size == (12, 8)


def test_a_hub_id_goes_to_load_dataset(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = datasets.load_dataset, []

    def load(path: str, name: str | None, *, cache_dir: str) -> Any:
        asked.append((path, name, cache_dir))
        return real(str(parquet), cache_dir=cache_dir)

    monkeypatch.setattr(datasets, "load_dataset", load)
    cache = str(tmp_path / "cache")
    images = open_images(
        "someone/icons", image_column="picture", config_name="small", cache_dir=cache
    )
    assert asked == [("someone/icons", "small", cache)]
    assert images.name(0) == "someone/icons[0]"


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (DatasetNotFoundError("Dataset doesn't exist"), ["hf auth login"]),
        (ConnectionError("Couldn't reach the Hub\nlong story"), ["Couldn't reach", "connection"]),
        (ValueError("Config name is missing."), ["Config name", "--dataset_config_name"]),
        (RuntimeError("Dataset scripts are no longer supported"), ["scripts"]),
    ],
)
def test_a_hub_set_that_can_not_be_had(
    monkeypatch: pytest.MonkeyPatch, error: Exception, parts: list[str]
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("someone/icons")
    for part in ["someone/icons", *parts]:
        assert part in message


def test_a_row_without_an_image(tmp_path: Path) -> None:
    features = datasets.Features(image=datasets.Image())
    rows = {"image": [Image.new("RGB", (8, 8)), None]}
    table = datasets.Dataset.from_dict(rows, features=features)
    folder, cache = tmp_path / "icons", str(tmp_path / "cache")
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")
    assert "[1]" in refusal(folder, cache_dir=cache)
    images = open_images(str(folder), cache_dir=cache, skip_bad_images=True)
    assert (len(images), len(images.skipped)) == (1, 1)
