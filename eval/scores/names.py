"""Names that ``eval.clip_scores`` is told on its command line, which is read before torch is
imported.
"""

from __future__ import annotations

from pathlib import Path

DEMO = Path("demo")
SCORERS = "embedded, open_clip:MODEL/TAG, open_clip:FOLDER or hf:ID_OR_FOLDER"
CAPTIONERS = "embedded, blip:ID_OR_FOLDER, coca:MODEL/TAG or coca:FOLDER"
DEFAULT_CAPTIONERS = {
    "blip": "Salesforce/blip-image-captioning-large",
    "coca": "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k",
}
GENERAL_SCORER = "open_clip:ViT-L-14/openai"
GENERAL_CAPTIONER = f"blip:{DEFAULT_CAPTIONERS['blip']}"
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""--mixed_precision -> torch's name of the dtype."""
