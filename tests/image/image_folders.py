"""Folders of small images for tests."""

from collections.abc import Mapping
from pathlib import Path

import datasets
from PIL import Image


def save(path: Path, color: int = 100, size: tuple[int, int] = (12, 8)) -> None:
    """An image of one color, with the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, 0, 0)).save(path)


def photos(folder: Path) -> Path:
    """Three images, of which two have captions in files beside them."""
    for number, name in enumerate(("c.png", "a.jpg", "b.webp")):
        save(folder / name, 60 * number)
    (folder / "a.txt").write_bytes("\ufeffa red\nsquare ä \n".encode())
    (folder / "b.TXT").write_text("b")
    (folder / "._a.jpg").write_bytes(b"left by another system")
    return folder


def table(path: Path, rows: Mapping[str, Image.Image | None]) -> None:
    """A Parquet file of captions and images, in columns with other names than usual."""
    columns = {"picture": [*rows.values()], "prompt": [*rows], "number": [*range(len(rows))]}
    types = (datasets.Image(), datasets.Value("string"), datasets.Value("int64"))
    features = datasets.Features(dict(zip(columns, types, strict=True)))
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
