"""Fluent Emoji as arrays: packages, pictures in both styles, labels, and the split.

The pictures are Microsoft's Fluent Emoji (MIT), as three npm packages redistribute them: see
``PACKAGES``. An icon is used if it exists without a skin tone in both styles; it is identified by
its code points without U+FE0F.
"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SIZE = 64
PACKAGES = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "emojibase-data": "17.0.0",
}
OBJECT_CATEGORIES = ("animals & nature", "food & drink", "activities", "travel & places", "objects")
SUBJECTS = ("rabbit", "cloud", "lion", "droplet", "frog", "sun")  # Table 4 of the paper
TRAIN_COUNT, HELDOUT_COUNT = 23, 128
SPLIT_SEED = 0
ONE_SIDED_WORDS = {"left", "right", "clock", "o", "thirty"}
DREAMBOOTH_PROMPT = "a TOK icon of a {label}, in the style of TOK"
VARIANTS = ("flat", "grayscale", "sepia", "night", "washed")


@dataclass(frozen=True)
class Icon:
    """One emoji.

    Code points ("1f407"), label ("rabbit"), search tags, emojibase's group ("animals & nature").
    """

    codepoint: str
    label: str
    tags: tuple[str, ...]
    category: str

    @property
    def is_object(self) -> bool:
        """True for the five categories from which DreamBooth subjects are drawn."""
        return self.category in OBJECT_CATEGORIES

    @property
    def may_flip(self) -> bool:
        """False where a mirror image would contradict the label: letters, arrows, clocks, flags."""
        words = set(self.label.replace("-", " ").replace("\u2019", " ").split())
        return self.category not in ("symbols", "flags") and not words & ONE_SIDED_WORDS


@dataclass(frozen=True)
class IconSet:
    """Icons sorted by code point, with their pictures in the same order.

    ``flat`` and ``solid`` (the 3D style) are (n, 64, 64, 3) uint8, composited on white.
    """

    icons: tuple[Icon, ...]
    flat: np.ndarray
    solid: np.ndarray


def fetch_packages(cache_dir: Path, packages: Mapping[str, str] = PACKAGES) -> Path:
    """Install packages under ``cache_dir`` with npm where missing; return ``node_modules``.

    Args:
        packages: version of each by name.

    Raises:
        FileNotFoundError: a package is missing and so is npm.
    """
    modules = cache_dir / "node_modules"
    missing = [
        f"{name}@{version}"
        for name, version in packages.items()
        if not _installed(modules / name, version)
    ]
    if missing:
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(
                "npm was not found, which fetches the Fluent Emoji packages: install Node.js"
            )
        cache_dir.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, "install", "--prefix", str(cache_dir), "--no-audit", "--no-fund", *missing],
            check=True,
        )
    return modules


def _installed(package: Path, version: str) -> bool:
    manifest = package / "package.json"
    return manifest.is_file() and json.loads(manifest.read_text())["version"] == version


def plain(codepoint: str) -> str:
    """Lower case without the variation selector, on whose presence the packages disagree."""
    return "-".join(part for part in codepoint.lower().split("-") if part != "fe0f")


def load_icons(cache_dir: Path) -> IconSet:
    """Render every icon that exists in both styles, once: ``cache_dir/icons_64.npz`` keeps them."""
    modules = fetch_packages(cache_dir)
    flat_folder = modules / "@iconify-json" / "fluent-emoji-flat"
    bodies = json.loads((flat_folder / "icons.json").read_text())["icons"]
    names = {
        plain(code): name
        for code, name in json.loads((flat_folder / "chars.json").read_text()).items()
    }
    solids = {
        plain(path.stem): path
        for path in (modules / "@lobehub" / "fluent-emoji-3d" / "assets").glob("*.webp")
    }
    emoji = read_labels(modules / "emojibase-data" / "en")
    icons = tuple(
        emoji[code] for code in sorted(emoji) if code in solids and names.get(code) in bodies
    )
    cached = cache_dir / f"icons_{SIZE}.npz"
    if cached.is_file():
        arrays = np.load(cached)
        if len(arrays["flat"]) == len(icons):
            return IconSet(icons, arrays["flat"], arrays["solid"])
    progress = tqdm(icons, desc="icons", mininterval=2.0)
    pairs = [
        (render_svg(bodies[names[i.codepoint]]["body"]), shrink(Image.open(solids[i.codepoint])))
        for i in progress
    ]
    flat, solid = (np.stack(side) for side in zip(*pairs, strict=True))
    np.savez_compressed(cached, flat=flat, solid=solid)
    return IconSet(icons, flat, solid)


def read_labels(folder: Path) -> dict[str, Icon]:
    """emojibase's English data by code point. Skin tones are nested in their emoji: left out.

    So are tags that are another icon's label: "cloud" must mean the cloud, not rain.
    """
    groups = {
        group["order"]: group["message"]
        for group in json.loads((folder / "messages.json").read_text())["groups"]
    }
    entries = [e for e in json.loads((folder / "data.json").read_text()) if "group" in e]
    labels = {entry["label"] for entry in entries}
    icons = {}
    for entry in entries:
        code = plain(entry["hexcode"])
        tags = tuple(tag for tag in entry.get("tags", ()) if tag not in labels)
        icons[code] = Icon(code, entry["label"], tags, groups[entry["group"]])
    return icons


def render_svg(body: str, size: int = SIZE, canvas: int = 32) -> np.ndarray:
    """An SVG body on a square canvas as (size, size, 3) uint8 on white, rendered 4x larger first.

    Args:
        canvas: its side in the body's units; iconify's Fluent Emoji have 32.
    """
    import resvg_py

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {canvas} {canvas}" width="{4 * size}" height="{4 * size}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white")
    data = base64.b64decode(png) if isinstance(png, str) else bytes(png)
    return shrink(Image.open(io.BytesIO(data)), size)


def shrink(image: Image.Image, size: int = SIZE) -> np.ndarray:
    """Composite on white, then reduce by Lanczos: in this order no transparent colour bleeds into
    the edges.
    """
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def recolour(pixels: np.ndarray, variant: str) -> np.ndarray:
    """A colour variant of flat icons: (..., 3) uint8 -> (..., 3) uint8. The variants make a style a
    word.

    Raises:
        ValueError: ``variant`` is not one of ``VARIANTS``.
    """
    if variant == "flat":
        return pixels
    rgb = pixels.astype(np.float32)
    luma = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    if variant == "grayscale":
        result = np.repeat(luma[..., None], 3, axis=-1)
    elif variant == "sepia":
        dark, light = np.array([60, 35, 20], np.float32), np.array([250, 225, 180], np.float32)
        result = dark + (light - dark) * luma[..., None] / 255
    elif variant == "night":
        result = rgb * np.array([0.28, 0.33, 0.60], np.float32)
    elif variant == "washed":
        result = 0.45 * rgb + 0.55 * 255
    else:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    return result.round().clip(0, 255).astype(np.uint8)


def split(icons: tuple[Icon, ...], seed: int = SPLIT_SEED) -> tuple[list[int], list[int]]:
    """Indices of the DreamBooth training and held-out icons.

    Both are drawn from the icons of ``OBJECT_CATEGORIES`` with labels of at most three words. The
    subjects of Table 4 are always held out, first and in the paper's order.

    Returns:
        (23 indices, 128 indices), disjoint; a function of the set of icons and ``seed`` only.
    """
    pool = sorted(
        (i for i, icon in enumerate(icons) if icon.is_object and len(icon.label.split()) <= 3),
        key=lambda i: icons[i].codepoint,
    )
    by_label = {icons[i].label: i for i in pool}
    subjects = [by_label[label] for label in SUBJECTS]
    others = [i for i in pool if i not in subjects]
    random.Random(f"split-{seed}").shuffle(others)
    end = TRAIN_COUNT + HELDOUT_COUNT - len(subjects)
    return others[:TRAIN_COUNT], subjects + others[TRAIN_COUNT:end]


def write_image_folder(folder: Path, icon_set: IconSet, indices: list[int]) -> None:
    """PNG files of the 3D style and a ``metadata.jsonl``, in order of ``indices``."""
    write_pictures(folder, [(icon_set.icons[i], icon_set.solid[i]) for i in indices])


def write_pictures(folder: Path, pictures: Sequence[tuple[Icon, np.ndarray]]) -> None:
    """A PNG file of each, and a ``metadata.jsonl`` (file_name, prompt, label, codepoint).

    Args:
        pictures: icons with (h, w, 3) uint8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for icon, pixels in pictures:
        name = f"{icon.codepoint}.png"
        Image.fromarray(pixels).save(folder / name, optimize=True)
        prompt = DREAMBOOTH_PROMPT.format(label=icon.label)
        rows.append(
            {"file_name": name, "prompt": prompt, "label": icon.label, "codepoint": icon.codepoint}
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
