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
from .pipeline import load_base
from .sampling import generate

PRECISIONS = DTYPES | {"fp32": torch.float32}


def ensure_class_images(cfg: DreamBoothConfig, accelerator: Accelerator) -> None:
    """Fill ``class_data_dir`` up to ``num_class_images``.

    The work is shared among processes; each image has a seed of its own, so that an interrupted
    run goes on where it stopped.
    """
    folder = Path(str(cfg.class_data_dir))
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(len(look(folder).images), cfg.num_class_images)
    # Nobody may count after another process has begun to write.
    accelerator.wait_for_everyone()
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    if mine:
        precision = cfg.prior_generation_precision
        device = accelerator.device
        dtype = PRECISIONS[precision] if precision else cfg.family.precision(device)
        pipeline = load_base(cfg, dtype).to(device)
        batches = range(0, len(mine), cfg.sample_batch_size)
        for start in tqdm(batches, "class images", disable=not accelerator.is_main_process):
            part = mine[start : start + cfg.sample_batch_size]
            images = generate(
                pipeline,
                [str(cfg.class_prompt)] * len(part),
                [cfg.seed + number for number in part],
                size=cfg.resolution,
            )
            for number, image in zip(part, images, strict=True):
                mark = hashlib.sha256(image.tobytes()).hexdigest()[:12]
                image.save(folder / f"{number}-{mark}.png")
    accelerator.wait_for_everyone()
