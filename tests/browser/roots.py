"""Real folders for the viewer: two short runs on the miniature and the scores of their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL.Image import Image

from app.scored import Key, Scored, ScoredImage, ScoredPrompt, ScoringModel
from bilora_diffusion.image import script as train
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from tests.app.scored_images import scores_of, write
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


def make_scores(root: Path) -> Scored:
    """Write ``root/scores``: images of both runs and measurements of them.

    The scorer is another part with tests of its own, so brightness and contrast stand in for it.
    """
    folder, pipeline = root / "scores", load_pipeline("mini", dtype=torch.float32)
    jobs = [(prompt, seed) for prompt in range(len(SUBJECTS)) for seed in SEEDS]
    texts = [f"a ToK icon of a {name}, in the style of ToK" for name in SUBJECTS]
    images: dict[Key, ScoredImage] = {}
    for method in METHODS:
        pipeline.load_lora_weights(str(root / method))
        drawn = generate(
            pipeline,
            [texts[prompt] for prompt, _ in jobs],
            [seed for _, seed in jobs],
            size=64,
            steps=6,
            guidance_scale=4.0,
        )
        pipeline.unload_lora_weights()
        for (prompt, seed), image in zip(jobs, drawn, strict=True):
            file = f"images/{method}/seed-{seed}/{prompt:03}.png"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / file)
            images[method, texts[prompt], seed] = _score(file, image)
    prompts = [
        ScoredPrompt(text, name, reference)
        for text, (name, reference) in zip(texts, SUBJECTS.items(), strict=True)
    ]
    scorer, captioner = ScoringModel("test-CLIP", "For tests only."), ScoringModel("test-captioner")
    scored = scores_of(METHODS, prompts, images, SEEDS, scorer, captioner)
    write(scored, folder)
    return scored


def _score(file: str, image: Image) -> ScoredImage:
    pixels = np.asarray(image, dtype=float) / 255
    brightness, contrast = float(pixels.mean()), float(pixels.std())
    scores = {"i2t": brightness, "t2t": contrast, "truth": 1 - brightness, "nearest": contrast / 2}
    return ScoredImage(file, scores, f"an icon of brightness {brightness:.1f}", NEAREST)
