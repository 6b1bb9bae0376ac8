"""Folders of small images for tests, and the difference of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def save(path: Path, color: int = 100, size: tuple[int, int] = (12, 8)) -> None:
    """Save an image of one color; its folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, 0, 0)).save(path)


def photos(folder: Path) -> Path:
    """Three images; two have caption files next to them."""
    for number, name in enumerate(("c.png", "a.jpg", "b.webp")):
        save(folder / name, 60 * number)
    (folder / "a.txt").write_bytes("\ufeffa red\nsquare ä \n".encode())
    (folder / "b.TXT").write_text("b")
    (folder / "._a.jpg").write_bytes(b"left by another system")
    return folder


def table(path: Path, rows: Mapping[str, Image.Image | None]) -> None:
    """A Parquet file with captions and images in columns with unusual names."""
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
    """The largest difference of two lists of images, from 0 to 255."""
    pixels = np.stack([np.asarray(image, dtype=int) for image in images])
    expected_pixels = np.stack([np.asarray(image, dtype=int) for image in expected_images])
    return int(np.abs(pixels - expected_pixels).max())
