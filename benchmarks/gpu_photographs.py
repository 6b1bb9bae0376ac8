"""Photographs for ``gpu_day --real``: the training and held-out folders, and the experiment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bilora_diffusion.core.durable import write_text
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.base_model import read_base_model
from bilora_diffusion.image.image_files import list_folder

ROOT = Path(__file__).resolve().parents[1]


def split_photographs(images: Path, folder: Path) -> None:
    """Copy photographs and captions: every fifth into ``heldout``, the others into ``train``.

    An existing folder is kept unchanged, since an earlier call has trained on it.

    Args:
        images: Folder of photographs, each with its caption in a .txt file.
        folder: Folder that gets ``train`` and ``heldout``.

    Raises:
        UserError: There are fewer than 5 photographs, or one has no caption.
    """
    if folder.exists():
        return
    listing = list_folder(images)
    photographs = listing.images
    if len(photographs) < 5:
        raise UserError(
            f"{images} has {len(photographs)} photographs, too few to hold one out:"
            " give at least 5."
        )
    captions = listing.captions(photographs)
    for image, caption in zip(photographs, captions, strict=True):
        if not caption:
            raise UserError(
                f"{image.name} in {images} has no caption, so no sample can be compared with it:"
                f" write {image.stem}.txt, or call `bilora caption {images}`."
            )
    for number, (image, caption) in enumerate(zip(photographs, captions, strict=True)):
        part = folder / ("heldout" if number % 5 == 4 else "train")
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, part)
        write_text(part / f"{image.stem}.txt", f"{caption}\n")


def experiment_of(model: str, photographs: Path) -> dict[str, Any]:
    """Return the experiment of ``--real``: LoRA and Bi-LoRA on photographs, scored by samples.

    Args:
        model: Folder or hub id of the base model.
        photographs: Folder that `split_photographs` wrote.
    """
    _, guidance = read_base_model(model).usual_sampling
    options = {
        "pretrained_model_name_or_path": model,
        "dataset": str(photographs / "train"),
        "validation_dataset": str(photographs / "heldout"),
        "gradient_accumulation_steps": 1,
        "report_to": "none",
    }
    return {
        "recipe": str(ROOT / "recipes" / "sdxl.yaml"),
        "options": options,
        "variants": {"LoRA": {"method": "lora"}, "Bi-LoRA": {"method": "bilora"}},
        "seeds": [0],
        "scores": {
            "prompts": "heldout",
            "steps": [200, 400],
            "guidances": [f"adapter:{guidance:g}"],
        },
    }
