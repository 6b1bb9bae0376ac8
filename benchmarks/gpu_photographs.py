"""The photographs of ``gpu_day --real``: training and held-out ones, and the experiment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bilora_diffusion.core.durable import write_text
from bilora_diffusion.image.base_model import read_base_model
from bilora_diffusion.image.image_files import list_folder

ROOT = Path(__file__).resolve().parents[1]
# Captions of the held-out photographs, each a line
PROMPTS = "prompts.txt"


def split_photographs(images: Path, folder: Path, prompt: str | None) -> None:
    """Copy photographs and captions: every fifth into ``heldout``, the others into ``train``.

    A folder that exists stays as it is, since an earlier call has trained on it.

    Args:
        images: folder of photographs, with or without captions in .txt files.
        folder: where they are copied to.
        prompt: caption of photographs without one.
    """
    if folder.exists():
        return
    prompts = []
    for number, image in enumerate(list_folder(images).images):
        part = folder / ("heldout" if number % 5 == 4 else "train")
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, part)
        caption = image.with_suffix(".txt")
        if caption.exists():
            shutil.copy(caption, part)
        elif prompt:
            write_text(part / caption.name, f"{prompt}\n")
        copy = part / caption.name
        if part.name == "heldout" and copy.exists():
            prompts.append(" ".join(copy.read_text(encoding="utf-8").split()))
    # Each once: photographs may share a caption.
    write_text(folder / PROMPTS, "\n".join(dict.fromkeys(prompts)) + "\n")


def experiment_of(model: str, photographs: Path) -> dict[str, Any]:
    """The experiment of ``--real``: LoRA and Bi-LoRA on photographs, scored by samples.

    Args:
        model: folder or hub id.
        photographs: folder of `split_photographs`.
    """
    _, guidance = read_base_model(model).usual_sampling
    options = {
        "pretrained_model_name_or_path": model,
        "dataset": str(photographs / "train"),
        "validation_dataset": str(photographs / "heldout"),
        "gradient_accumulation_steps": 1,
        "max_train_steps": 400,
        "checkpointing_steps": 200,
        "report_to": "none",
    }
    return {
        "recipe": str(ROOT / "recipes" / "sdxl.yaml"),
        "options": options,
        "variants": {"LoRA": {"method": "lora"}, "Bi-LoRA": {"method": "bilora"}},
        "seeds": [0],
        "scores": {
            "prompts": str(photographs / PROMPTS),
            "steps": [200, 400],
            "guidances": [f"adapter:{guidance:g}"],
        },
    }
