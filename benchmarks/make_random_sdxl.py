"""Write a full-size Stable Diffusion XL pipeline with random weights, to train on real shapes.

    python benchmarks/make_random_sdxl.py random_sdxl               # 6.9 GB, half a minute
    python benchmarks/make_random_sdxl.py random_tiny --size tiny   # the same form, 10 MB
    python train_dreambooth_bilora.py --pretrained_model_name_or_path random_sdxl --dataset mini \\
        --resolution 128 --max_train_steps 2 --output_dir out

It makes noise, not pictures: it is for shapes, memory and time. Models are made in bf16 and written
one after the other, so no more than the UNet is ever in memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import random_models as models
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from bilora_diffusion.errors import UserError, run_cli
from bilora_diffusion.mini import pipeline_dir

SHARD = "2GB"  # largest file, and so the largest copy that writing can need
SIZES = ("full", "tiny")
BUILDERS: dict[str, Callable[[str], Any]] = {
    "unet": models.sdxl_unet,
    "vae": models.sdxl_vae,
    "text_encoder": models.sdxl_text_encoder,
    "text_encoder_2": models.sdxl_text_encoder_2,
}


def write_pipeline(folder: Path, size: str = "full") -> dict[str, int]:
    """Write the pipeline into ``folder``; returns how many parameters each model has.

    Raises:
        UserError: a folder in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already exists and is not an empty folder; name a new one or remove it."
        )
    with torch.device("meta"):
        empty = {name: build(size) for name, build in BUILDERS.items()}
    for seed, (name, build) in enumerate(BUILDERS.items()):
        model = models.materialize(lambda b=build: b(size), dtype=torch.bfloat16, seed=seed)
        model.save_pretrained(folder / name, max_shard_size=SHARD)
        del model
    _write_rest(folder, empty)
    return {name: sum(p.numel() for p in model.parameters()) for name, model in empty.items()}


def _write_rest(folder: Path, parts: dict[str, Any]) -> None:
    """Tokenizers, scheduler and ``model_index.json``, from a pipeline that takes no memory."""
    pipeline = StableDiffusionXLPipeline(
        **parts,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(pad_token="!"),
        scheduler=cast(Any, EulerDiscreteScheduler)(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        getattr(pipeline, name).save_pretrained(folder / name)
    pipeline.save_config(folder)


def _tokenizer(**special_tokens: Any) -> CLIPTokenizer:
    """The miniature's vocabulary (it takes any string, byte by byte) with CLIP's own length."""
    place: dict[str, Any] = {"subfolder": "tokenizer", "model_max_length": models.TEXT_LENGTH}
    return CLIPTokenizer.from_pretrained(pipeline_dir(), **place, **special_tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(description="Write an SDXL pipeline with random weights.")
    parser.add_argument("folder", type=Path, help="new folder for the pipeline")
    parser.add_argument("--size", default="full", choices=SIZES, help="full: SDXL base 1.0")
    args = parser.parse_args(argv)
    for name, count in write_pipeline(args.folder, args.size).items():
        print(f"{name}: {count:,} parameters")


if __name__ == "__main__":
    sys.exit(run_cli(main))
