"""Class images of prior preservation: sampled from the base model until there are enough."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..train.running import DTYPES
from .config import DreamBoothConfig
from .listing import look
from .pipeline import load_pipeline
from .sampling import generate

PRECISIONS = DTYPES | {"fp32": torch.float32}


def ensure_class_images(cfg: DreamBoothConfig, accelerator: Accelerator) -> int:
    """Fill ``class_data_dir`` up to ``num_class_images``; returns how many were made.

    The work is shared among processes; each image has a seed of its own, so that an interrupted
    run goes on where it stopped.
    """
    folder = Path(str(cfg.class_data_dir))
    folder.mkdir(parents=True, exist_ok=True)
    present = len(look(folder).images)
    # Nobody may count after another process has begun to write.
    accelerator.wait_for_everyone()
    missing = list(range(present, cfg.num_class_images))
    if missing:
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        _sample(cfg, accelerator, folder, mine)
    accelerator.wait_for_everyone()
    return len(missing)


def _sample(
    cfg: DreamBoothConfig, accelerator: Accelerator, folder: Path, numbers: list[int]
) -> None:
    base = cfg.pretrained_model_name_or_path
    if cfg.prior_generation_precision is None:
        dtype = cfg.family.precision(accelerator.device)
    else:
        dtype = PRECISIONS[cfg.prior_generation_precision]
    pipeline = load_pipeline(
        base,
        dtype=dtype,
        revision=cfg.revision,
        variant=cfg.variant,
        cache_dir=cfg.cache_dir,
        vae=cfg.pretrained_vae_model_name_or_path,
    )
    pipeline.to(accelerator.device)
    bar = tqdm(total=len(numbers), desc="class images", disable=not accelerator.is_main_process)
    for start in range(0, len(numbers), cfg.sample_batch_size):
        part = numbers[start : start + cfg.sample_batch_size]
        images = generate(
            pipeline,
            [str(cfg.class_prompt)] * len(part),
            [cfg.seed + number for number in part],
            size=cfg.resolution,
        )
        for number, image in zip(part, images, strict=True):
            mark = hashlib.sha256(image.tobytes()).hexdigest()[:12]
            image.save(folder / f"{number}-{mark}.png")
        bar.update(len(part))
    bar.close()
