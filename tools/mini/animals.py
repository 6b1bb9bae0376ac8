"""A second set of pictures for the miniature: 12 animals of Noto Emoji, and 64 others held out.

    python -m tools.mini.animals --output_dir animals

Pictures of one family in a style that the miniature has not been shown, so few that adapters soon
learn them by heart. Copy ``train/`` and ``heldout/`` to ``bilora_diffusion/mini/animals``. npm is
needed, and the extra "mini".
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from .icons import Icon, fetch_packages, plain, read_labels, render_svg, write_pictures

NOTO = "@iconify-json/noto"
PACKAGES = {
    NOTO: "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "emojibase-data": "17.0.0",
}
FAMILY = ("mammals", "birds", "amphibians", "reptiles", "marine life", "bugs")
"""Emojibase's subgroups of animals."""
MOST_WORDS = 2
TRAIN_COUNT, HELDOUT_COUNT = 12, 64
SPLIT_SEED = 0


def animals(labels: Path, known: Path) -> list[Icon]:
    """The animals with short labels that pretraining has seen flat, by code point.

    Args:
        labels: emojibase's folder of one language.
        known: iconify's folder of the flat icons.
    """
    names = json.loads((labels / "messages.json").read_text())["subgroups"]
    family = {group["order"] for group in names if group["message"] in FAMILY}
    entries = json.loads((labels / "data.json").read_text())
    wanted = {plain(one["hexcode"]) for one in entries if one.get("subgroup") in family}
    flat = set(map(plain, json.loads((known / "chars.json").read_text())))
    icons = read_labels(labels)
    return [
        icons[code]
        for code in sorted(wanted & flat)
        if code in icons and len(icons[code].label.split()) <= MOST_WORDS
    ]


def split(icons: Sequence[Icon], seed: int = SPLIT_SEED) -> tuple[list[Icon], list[Icon]]:
    """12 to learn from and 64 to hold out; a function of the icons and the seed alone."""
    order = sorted(icons, key=lambda icon: icon.codepoint)
    random.Random(f"animals-{seed}").shuffle(order)
    return order[:TRAIN_COUNT], order[TRAIN_COUNT : TRAIN_COUNT + HELDOUT_COUNT]


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``train/`` and ``heldout/``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, help="default: OUTPUT_DIR/cache")
    args = parser.parse_args(argv)
    modules = fetch_packages(args.cache_dir or args.output_dir / "cache", PACKAGES)
    drawn = json.loads((modules / NOTO / "icons.json").read_text())
    chars = json.loads((modules / NOTO / "chars.json").read_text())
    bodies = {plain(code): drawn["icons"].get(name) for code, name in chars.items()}
    flat = modules / "@iconify-json" / "fluent-emoji-flat"
    icons = [i for i in animals(modules / "emojibase-data" / "en", flat) if bodies.get(i.codepoint)]
    for name, part in zip(("train", "heldout"), split(icons), strict=True):
        pictures = [
            (icon, render_svg(bodies[icon.codepoint]["body"], canvas=drawn["height"]))
            for icon in part
        ]
        write_pictures(args.output_dir / name, pictures)
        print(f"{name}: {', '.join(icon.label for icon in part)}")


if __name__ == "__main__":
    main()
