"""Helpers that create folders of small images and compare images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def save(path: Path, color: int = 100, size: tuple[int, int] = (12, 8)) -> None:
    """Save an image of one color, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, 0, 0)).save(path)


def photos(folder: Path) -> Path:
    """Create a folder of three images, two of them with caption files, and return its path."""
    for number, name in enumerate(("c.png", "a.jpg", "b.webp")):
        save(folder / name, 60 * number)
    (folder / "a.txt").write_bytes("\ufeffa red\nsquare ä \n".encode())
    (folder / "b.TXT").write_text("b")
    (folder / "._a.jpg").write_bytes(b"left by another system")
    return folder


def table(path: Path, rows: Mapping[str, Image.Image | None]) -> None:
    """Write a Parquet file with captions and images in columns with unusual names."""
    features = datasets.Features(
        picture=datasets.Image(), prompt=datasets.Value("string"), number=datasets.Value("int64")
    )
    columns = {
        "picture": list(rows.values()),
        "prompt": list(rows),
        "number": list(range(len(rows))),
    }
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


def difference(images: Sequence[Image.Image], expected_images: Sequence[Image.Image]) -> int:
    """Return the largest difference between two lists of images, from 0 to 255."""
    pixels = np.stack([np.asarray(image, dtype=int) for image in images])
    expected_pixels = np.stack([np.asarray(image, dtype=int) for image in expected_images])
    return int(np.abs(pixels - expected_pixels).max())
