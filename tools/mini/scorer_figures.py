"""How well a scorer recognizes the held-out 3D icons, whose pictures its training never showed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bilora_diffusion.mini import heldout_dir, scorer
from tools.mini.scorer_data import FLAT_FORM, SOLID_FORM


def read_heldout() -> tuple[list[Image.Image], list[str]]:
    """The 128 held-out 3D pictures and their labels."""
    folder = heldout_dir()
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    images = []
    for row in rows:
        with Image.open(folder / row["file_name"]) as image:
            images.append(image.convert("RGB"))
    return images, [row["label"] for row in rows]


def recall(similarity: Tensor, k: int) -> float:
    """Share of rows i of (n, n) whose entry i is among the row's ``k`` largest."""
    best = similarity.topk(k, dim=1).indices
    return float((best == torch.arange(len(similarity))[:, None]).any(dim=1).float().mean())


@torch.no_grad()
def measure(folder: Path | None = None) -> dict[str, float]:
    """Retrieval on the held-out icons, shares in [0, 1], and mean cosines.

    Args:
        folder: a scorer's; the shipped one by default.

    Returns:
        ``image_to_text_top1``, ``_top5``, ``text_to_image_top1``, ``_top5``: among the 128, texts
        in the form of ``SOLID_FORM``. ``caption_object_top1``, ``caption_style_top1``: the object
        and the style of the caption retrieved from the whole bank. ``style_preference``: share of
        pictures closer to their own object in the 3D form than in the flat one.
        ``matched_cosine``, ``mismatched_cosine``: means over right and over all wrong pairs.
    """
    model, preprocess, tokenize = scorer.load(folder)
    encoders: Any = model
    images, labels = read_heldout()
    pixels = torch.stack([preprocess(image) for image in images])
    pictures = encoders.encode_image(pixels, normalize=True)

    def texts(lines: list[str]) -> Tensor:
        parts = [lines[start : start + 256] for start in range(0, len(lines), 256)]
        return torch.cat([encoders.encode_text(tokenize(p), normalize=True) for p in parts])

    right = [SOLID_FORM.format(label=label) for label in labels]
    flat = [FLAT_FORM.format(label=label) for label in labels]
    similarity = pictures @ texts(right).T
    bank = scorer.captions(folder)
    found = [bank[i] for i in (pictures @ texts(bank).T).argmax(dim=1).tolist()]
    diagonal = similarity.diagonal()
    wrong = ~torch.eye(len(labels), dtype=torch.bool)
    return {
        "image_to_text_top1": recall(similarity, 1),
        "image_to_text_top5": recall(similarity, 5),
        "text_to_image_top1": recall(similarity.T, 1),
        "text_to_image_top5": recall(similarity.T, 5),
        "caption_object_top1": _share(
            f in pair for f, *pair in zip(found, right, flat, strict=True)
        ),
        "caption_style_top1": _share(" ToK " in line for line in found),
        "style_preference": float((diagonal > (pictures * texts(flat)).sum(dim=1)).float().mean()),
        "matched_cosine": float(diagonal.mean()),
        "mismatched_cosine": float(similarity[wrong].mean()),
    }


@torch.no_grad()
def measure_styles(
    solid: np.ndarray, flat: np.ndarray, labels: list[str], folder: Path | None = None
) -> dict[str, float]:
    """Whether the score of a text tells the right style of an object from the other one.

    Args:
        solid, flat: the same icons in both styles, (n, 64, 64, 3) uint8.
        labels: n names.

    Returns:
        ``solid_above_flat``: share of icons whose 3D picture is closer to the text in the 3D form
        than the flat picture is; ``flat_above_solid``: the reverse for the text in the flat form.
    """
    model, preprocess, tokenize = scorer.load(folder)
    encoders: Any = model
    seen = []
    for pixels in (solid, flat):
        batch = torch.stack([preprocess(Image.fromarray(picture)) for picture in pixels])
        seen.append(encoders.encode_image(batch, normalize=True))
    result = {}
    for name, form, right, wrong in (
        ("solid_above_flat", SOLID_FORM, *seen),
        ("flat_above_solid", FLAT_FORM, *reversed(seen)),
    ):
        ids = tokenize([form.format(label=label) for label in labels])
        texts = encoders.encode_text(ids, normalize=True)
        result[name] = _share(((right * texts).sum(1) > (wrong * texts).sum(1)).tolist())
    return result


def _share(hits: Any) -> float:
    values = list(hits)
    return sum(values) / len(values)
