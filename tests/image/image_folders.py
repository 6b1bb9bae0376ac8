"""Folders of small images for tests."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def save(path: Path, color: int = 100, size: tuple[int, int] = (12, 8)) -> None:
    """An image of one colour, with the folders that it lies in."""
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
