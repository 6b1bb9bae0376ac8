"""The miniature's autoencoder: ``AutoencoderKL``, 64 x 64 x 3 pixels to 8 x 8 x 8 latents.

It sees all flat icons, their colour variants and the 3D icons, except the 3D icons of the
DreamBooth training and held-out sets: those have to be as new to it as a user's photographs are to
SDXL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from tools.mini import trainer
from tools.mini.icons import VARIANTS, IconSet, recolour

KL_WEIGHT = 2e-3  # times the KL divergence in nats per pixel
GRADIENT_WEIGHT = 0.5
SHARES = {"solid": 0.5, "flat": 0.3, "variant": 0.2}  # of a batch


@dataclass(frozen=True)
class VaeSettings:
    """Sizes and length of the stage; the defaults are the shipped weights'."""

    steps: int = 2200
    batch_size: int = 24
    channels: tuple[int, ...] = (16, 32, 64, 128)
    latent_channels: int = 8
    learning_rate: float = 1.2e-3


def build_vae(settings: VaeSettings) -> AutoencoderKL:
    """A freshly initialized autoencoder that halves the size once per level but the first."""
    levels = len(settings.channels)
    make: Any = AutoencoderKL  # its annotations know tuples of one only
    return make(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.channels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=8,
        sample_size=64,
    )


def to_model(pixels: np.ndarray) -> Tensor:
    """(n, 64, 64, 3) uint8 -> (n, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def draw_batch(
    icon_set: IconSet, unseen: set[int], seed: int, step: int, batch_size: int
) -> Tensor:
    """The pictures of one step, (batch, 3, 64, 64): styles in the proportions of ``SHARES``, each
    flipped at random.
    """
    generator = trainer.generator_for("vae", seed, step)
    seen = np.array([i for i in range(len(icon_set.icons)) if i not in unseen])

    def pick(choices: np.ndarray | list[str], count: int) -> list:
        return [
            choices[i] for i in torch.randint(len(choices), (count,), generator=generator).tolist()
        ]

    solid_count = round(SHARES["solid"] * batch_size)
    variant_count = round(SHARES["variant"] * batch_size)
    everything = np.arange(len(icon_set.icons))
    pictures = [icon_set.solid[i] for i in pick(seen, solid_count)]
    pictures += [
        icon_set.flat[i] for i in pick(everything, batch_size - solid_count - variant_count)
    ]
    variants = zip(
        pick(everything, variant_count), pick(list(VARIANTS[1:]), variant_count), strict=True
    )
    pictures += [recolour(icon_set.flat[i], variant) for i, variant in variants]
    flips = torch.rand(batch_size, generator=generator) < 0.5
    return to_model(
        np.stack(
            [p[:, ::-1] if flip else p for p, flip in zip(pictures, flips.tolist(), strict=True)]
        )
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + ``GRADIENT_WEIGHT`` x L1 of the differences of neighbouring pixels, which keeps
    edges sharp.
    """
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + GRADIENT_WEIGHT * edges


def train_vae(
    icon_set: IconSet,
    unseen: list[int],
    settings: VaeSettings,
    seed: int,
    folder: Path,
    autocast: torch.dtype | None = None,
    stop_after: int | None = None,
) -> tuple[AutoencoderKL, float]:
    """Train from scratch or from ``folder/vae.safetensors``.

    Args:
        unseen: indices whose 3D picture is never shown.
        autocast: dtype for matrix products, None for float32 throughout.

    Returns:
        (averaged weights in a model whose ``scaling_factor`` is not set yet, seconds per step)
    """
    torch.manual_seed(seed)  # the initial weights
    vae = cast(Any, build_vae(settings)).to(
        memory_format=torch.channels_last
    )  # a quarter faster on a CPU
    hidden = set(unseen)

    def loss_at(step: int) -> Tensor:
        target = draw_batch(icon_set, hidden, seed, step, settings.batch_size)
        target = target.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            posterior = vae.encode(target).latent_dist
            latents = posterior.sample(trainer.generator_for("vae-noise", seed, step))
            output = vae.decode(latents).sample.float()
            divergence = posterior.kl().float().mean() / target[0, 0].numel()
        return reconstruction_loss(output, target) + KL_WEIGHT * divergence

    plan = trainer.Plan(settings.steps, settings.learning_rate, decay_fraction=0.8, ema_decay=0.995)
    identity = {"stage": "vae", "seed": seed, **vars(settings)}
    seconds = trainer.fit(vae, loss_at, plan, folder / "vae.safetensors", identity, stop_after)
    return vae, seconds


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, pixels: np.ndarray, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior, each (n, channels, 8, 8), not scaled."""
    means, stds = [], []
    for start in tqdm(range(0, len(pixels), batch_size), desc="encode", mininterval=10.0):
        posterior = cast(Any, vae.encode(to_model(pixels[start : start + batch_size]))).latent_dist
        means.append(posterior.mean.contiguous())
        stds.append(posterior.std.contiguous())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Encode to the posterior's mean and decode: (n, 64, 64, 3) uint8 -> the same."""
    outputs = []
    for start in range(0, len(pixels), batch_size):
        posterior = cast(Any, vae.encode(to_model(pixels[start : start + batch_size]))).latent_dist
        image = cast(Any, vae.decode(posterior.mean)).sample.clamp(-1, 1).permute(0, 2, 3, 1)
        outputs.append(((image + 1) * 127.5).round().to(torch.uint8).numpy())
    return np.concatenate(outputs)


def psnr(vae: AutoencoderKL, pixels: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions, in dB."""
    error = (reconstruct(vae, pixels).astype(np.float32) - pixels) / 255
    return float(np.mean(-10 * np.log10(np.square(error).mean(axis=(1, 2, 3)))))
