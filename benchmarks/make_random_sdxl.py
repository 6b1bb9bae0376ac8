"""Write a full-size Stable Diffusion XL pipeline with random weights, to train on real shapes.

    python benchmarks/make_random_sdxl.py random_sdxl               # 6.9 GB, half a minute
    python benchmarks/make_random_sdxl.py random_tiny --size tiny   # the same form, 10 MB
    python train_dreambooth_bilora.py --pretrained_model_name_or_path random_sdxl --dataset mini \\
        --resolution 128 --max_train_steps 2 --output_dir out

``StableDiffusionXLPipeline.from_pretrained`` loads the folder. It makes noise, not pictures: it is
for shapes, memory and time. Models are made and written one after the other, so no more than the
UNet is ever in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from random_models import (
    TEXT_LENGTH,
    UNET,
    materialize,
    sdxl_text_encoder,
    sdxl_text_encoder_2,
    sdxl_unet,
    sdxl_vae,
)
from shapes import DTYPES, require
from torch import nn
from transformers import CLIPTokenizer

from bilora_diffusion.errors import UserError, run_cli
from bilora_diffusion.mini import pipeline_dir

SHARD = "2GB"  # largest file, and so the largest copy that writing can need
BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "unet": sdxl_unet,
    "vae": sdxl_vae,
    "text_encoder": sdxl_text_encoder,
    "text_encoder_2": sdxl_text_encoder_2,
}


def write_pipeline(
    folder: Path, *, dtype: str = "bf16", size: str = "full", seed: int = 0
) -> dict[str, int]:
    """Write the pipeline into ``folder``, which appears only once it is whole.

    Args:
        folder: a new folder (or an empty one); its parents are made.
        dtype: precision of the files, ``bf16``, ``fp16`` or ``fp32``.
        size: ``full`` (SDXL base 1.0) or ``tiny`` (same blocks and names, narrow).

    Returns:
        Number of parameters of each model.

    Raises:
        UserError: an unknown dtype or size, a folder in use, or too little space on the disk.
    """
    require("--dtype is", dtype, DTYPES)
    require("--size is", size, UNET)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already exists and is not an empty folder; name a new one or remove it."
        )
    counts = {name: _count(build, size) for name, build in BUILDERS.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(folder.parent, sum(counts.values()) * DTYPES[dtype].itemsize)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        unfinished = Path(aside) / "pipeline"
        for number, (name, build) in enumerate(BUILDERS.items()):
            model: Any = materialize(
                lambda b=build: b(size), dtype=DTYPES[dtype], seed=seed + number
            )
            model.save_pretrained(unfinished / name, max_shard_size=SHARD)
            del model
        _write_rest(unfinished, size)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    return counts


def _write_rest(folder: Path, size: str) -> None:
    """Tokenizers, scheduler and ``model_index.json``, from a pipeline that takes no memory."""
    with torch.device("meta"):
        models: dict[str, Any] = {name: build(size) for name, build in BUILDERS.items()}
    pipeline = StableDiffusionXLPipeline(
        **models,
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


def _tokenizer(**special_tokens: str) -> CLIPTokenizer:
    """The miniature's vocabulary (it takes any string, byte by byte) with CLIP's own length."""
    small = CLIPTokenizer.from_pretrained(pipeline_dir(), subfolder="tokenizer")
    rules = json.loads(small.backend_tokenizer.to_str())["model"]["merges"]
    return CLIPTokenizer(
        vocab=small.get_vocab(),
        merges=cast(Any, [tuple(rule) for rule in rules]),
        model_max_length=TEXT_LENGTH,
        **special_tokens,
    )


def _count(build: Callable[[str], nn.Module], size: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(size).parameters())


def _check_space(where: Path, needed: int) -> None:
    free = shutil.disk_usage(where).free
    if free < needed * 1.05:
        raise UserError(
            f"the pipeline takes {needed / 1e9:.1f} GB and {where} has {free / 1e9:.1f} GB free;"
            " name a folder on a larger disk or use --size tiny."
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(description="Write an SDXL pipeline with random weights.")
    parser.add_argument("folder", type=Path, help="new folder for the pipeline")
    parser.add_argument("--dtype", default="bf16", help="bf16 (default), fp16 or fp32")
    parser.add_argument("--size", default="full", help="full (SDXL base 1.0, default) or tiny")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    counts = write_pipeline(args.folder, dtype=args.dtype, size=args.size, seed=args.seed)
    for name, count in counts.items():
        print(f"{name}: {count:,} parameters")
    size = sum(counts.values()) * DTYPES[args.dtype].itemsize
    print(f"{args.folder}: {size / 1e6:,.1f} MB in {args.dtype}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
