"""Folders for the viewer: two short runs on the miniature, and scores of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw, PngImagePlugin

from app.scored import Key, Scored, ScoredImage, ScoredPrompt, ScoringModel
from bilora_diffusion.image import script as train
from tests.app.folders import scores_of, write
from tests.scripts.runs import flags

METHODS = ("lora", "bilora")
SUBJECTS = {"rabbit": "1f407.png", "cloud": "2601.png", "lion": "1f981.png", "frog": "1f438.png"}
SEEDS = (0, 1)
NEAREST = "1fa96.png"
"""A training picture of the miniature."""


def make_runs(root: Path) -> None:
    """Train ``root/lora`` and ``root/bilora`` for two steps, coarsely enough to see it.

    Both leave validation images of the end, and LoRA those of the base model.
    """
    for method in METHODS:
        AcceleratorState._reset_state()
        values: dict[str, Any] = {"rho": 1.0} if method == "bilora" else {"eval_on_start": True}
        values |= {"learning_rate": 0.02, "num_validation_images": 1}
        train.main(flags(root / method, method=method, **values))


def picture(adapter: int, prompt: int, seed: int) -> Image.Image:
    """An image that only this adapter makes: its colour tells it."""
    image = Image.new("RGB", (64, 64), ("white", "ivory")[adapter])
    box = (8, 8 + 8 * seed, 30 + 6 * prompt, 40 + 4 * prompt)
    ImageDraw.Draw(image).ellipse(box, fill=("teal", "orange")[adapter])
    return image


def make_scores(folder: Path, labels: Sequence[str]) -> Scored:
    """Write pictures of two adapters and measurements of them.

    As in real folders, files and PNG texts name the adapter. The scorer is another part with tests
    of its own, so brightness and contrast stand in for it.
    """
    texts = [f"a ToK icon of a {name}, in the style of ToK" for name in SUBJECTS]
    images: dict[Key, ScoredImage] = {}
    for adapter, label in enumerate(labels):
        for prompt, text in enumerate(texts):
            for seed in SEEDS:
                file = f"images/{label}/seed-{seed}/{prompt:03}-{label}.png"
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                written = PngImagePlugin.PngInfo()
                written.add_text("parameters", f'{{"adapter": "{label}"}}')
                image = picture(adapter, prompt, seed)
                image.save(folder / file, pnginfo=written)
                images[label, text, seed] = _score(file, image)
    prompts = [
        ScoredPrompt(text, name, reference)
        for text, (name, reference) in zip(texts, SUBJECTS.items(), strict=True)
    ]
    scorer, captioner = ScoringModel("test-CLIP", "For tests only."), ScoringModel("test-captioner")
    scored = scores_of(labels, prompts, images, SEEDS, scorer, captioner)
    write(scored, folder)
    return scored


def _score(file: str, image: Image.Image) -> ScoredImage:
    pixels = np.asarray(image, dtype=float) / 255
    brightness, contrast = float(pixels.mean()), float(pixels.std())
    scores = {"i2t": brightness, "t2t": contrast, "truth": 1 - brightness, "nearest": contrast / 2}
    return ScoredImage(file, scores, f"an icon of brightness {brightness:.1f}", NEAREST)
