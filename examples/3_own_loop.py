"""Bi-LoRA in your own training loop: plain PyTorch and the models of diffusers.

    python examples/3_own_loop.py            # two runs of 160 steps: two minutes on a CPU

The UNet of the embedded miniature learns the style of 23 icons. The script prints the UNet's loss
on held-out icons. After about 80 steps, both methods overfit the 23 icons and this loss rises.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from bilora_diffusion import BiLoRAConfig, attach, mini

# Layers of the UNet that get adapters.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BATCH_SIZE = 4
LEARNING_RATE = 1e-3
# Number of steps between evaluations.
EVALUATION_STEPS = 40


def load(folder: Path, pipeline: Any, count: int) -> dict[str, Tensor]:
    """Encode the first `count` icons of a folder as latents, and their prompts as embeddings."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    pixels = [np.asarray(Image.open(folder / row["file_name"]))[..., :3] for row in rows]
    # (icons, height, width, 3) from 0 to 255 -> (icons, 3, height, width) from -1 to 1
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    # The mode instead of a sample, since latents are encoded only once.
    latents = pipeline.vae.encode(images).latent_dist.mode() * pipeline.vae.config.scaling_factor
    prompts = [row["prompt"] for row in rows]
    text, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"latents": latents, "text": text, "pooled": pooled}


def loss(unet: Any, scheduler: Any, data: dict[str, Tensor], rows: Tensor, seed: int) -> Tensor:
    """Compute the mean squared error of the predicted noise on some icons.

    The seed determines the noise and the timesteps.
    """
    random = torch.Generator().manual_seed(seed)
    latents = data["latents"][rows]
    noise = torch.randn(latents.shape, generator=random)  # (rows, 8, 8, 8)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=random)
    # SDXL's conditioning: original size, crop and target size.
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(len(rows), 1)
    added = {"text_embeds": data["pooled"][rows], "time_ids": sizes}
    noisy = scheduler.add_noise(latents, noise, timesteps)
    text = data["text"][rows]
    return F.mse_loss(unet(noisy, timesteps, text, added_cond_kwargs=added).sample, noise)


def train(auxiliary_rate: float, rho: float, steps: int) -> list[float]:
    """Train the adapters; return the loss on held-out icons every `EVALUATION_STEPS` steps."""
    kind: Any = StableDiffusionXLPipeline
    pipeline = kind.from_pretrained(mini.pipeline_dir(), dtype=torch.float32)
    pipeline.unet.requires_grad_(False)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        training_icons = load(mini.train_dir(), pipeline, 23)
        heldout_icons = load(mini.heldout_dir(), pipeline, 64)
    count = len(training_icons["latents"])
    torch.manual_seed(0)
    config = BiLoRAConfig(
        rank=4,
        alpha=8,
        rho=rho,
        auxiliary_learning_rate=auxiliary_rate,
        target_modules=ATTENTION,
    )
    bilora = attach(pipeline.unet, config)
    optimizer = torch.optim.AdamW(bilora.param_groups(lr=LEARNING_RATE))
    bilora.bind(optimizer)  # projects after every optimizer.step()
    heldout_losses = []
    for step in range(steps + 1):
        if step % EVALUATION_STEPS == 0:
            with bilora.evaluating(), torch.no_grad():
                all_rows = torch.arange(64)
                losses = []
                # The same noise at each evaluation, so that losses can be compared.
                for seed in range(8):
                    losses.append(loss(pipeline.unet, scheduler, heldout_icons, all_rows, seed))
                heldout_losses.append(float(torch.stack(losses).mean()))
        # Both runs use the same batches, which depend on the step alone.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(step))
        rows = order[:BATCH_SIZE]
        loss(pipeline.unet, scheduler, training_icons, rows, seed=10_000 + step).backward()
        torch.nn.utils.clip_grad_norm_(bilora.clip_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return heldout_losses


def main(argv: Sequence[str] | None = None) -> None:
    """Print the held-out loss of LoRA and of Bi-LoRA."""
    parser = argparse.ArgumentParser(description="LoRA and Bi-LoRA in a plain loop.")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rho", type=float, default=0.05)
    args = parser.parse_args(argv)
    print("held-out loss x 1000 at", *range(0, args.steps + 1, EVALUATION_STEPS))
    # With a learning rate of 0, the auxiliary stays zero, which is plain LoRA.
    for name, auxiliary_rate in (("LoRA", 0.0), ("Bi-LoRA", LEARNING_RATE)):
        losses = train(auxiliary_rate, args.rho, args.steps)
        texts = [f"{1000 * value:.1f}" for value in losses]
        print(f"{name:22}", *texts, flush=True)


if __name__ == "__main__":
    main()
