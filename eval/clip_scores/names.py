"""Scores, and names of the command line, which is read before torch is imported."""

from __future__ import annotations

from pathlib import Path

from ..table import Metric

DEMO = Path("demo")
SCORERS = "embedded, open_clip:MODEL/TAG or open_clip:FOLDER"
CAPTIONERS = "embedded or blip:ID_OR_FOLDER"
IMAGE_MODELS = "dinov2:ID_OR_FOLDER, such as dinov2:facebook/dinov2-base"
BLIP = "Salesforce/blip-image-captioning-large"
GENERAL_SCORER = "open_clip:ViT-L-14/openai"
GENERAL_CAPTIONER = f"blip:{BLIP}"
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""--mixed_precision -> torch's name of the dtype."""


def _cosine(title: str, explanation: str, higher_is_better: bool | None = True) -> Metric:
    return Metric(title, explanation, higher_is_better, scale=100, form=".2f")


METRICS = {
    "i2t": _cosine("CLIP I2T", "cosine of the embeddings of image and prompt"),
    "t2t": _cosine("CLIP T2T", "cosine of the embeddings of prompt and caption of the image"),
    "truth": _cosine("ground truth", "cosine of the embeddings of image and held-out picture"),
    "nearest": _cosine(
        "memorization",
        "cosine of the embeddings of image and nearest training picture; a learned style raises it"
        " too, so look at the images that are nearest",
        False,
    ),
    "dino_truth": _cosine(
        "DINO ground truth", "cosine of DINOv2's embeddings of image and held-out picture"
    ),
    "dino_nearest": _cosine(
        "DINO memorization",
        "cosine of DINOv2's embeddings of image and its nearest training picture",
        False,
    ),
    "drift": _cosine(
        "unchanged", "cosine of the embeddings of image and base model's image, general prompts"
    ),
}
"""All scores; the first two are the paper's (Table 4). Values are raw, and shown times 100."""
