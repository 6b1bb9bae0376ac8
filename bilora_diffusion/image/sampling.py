"""Images from a pipeline whose text is embedded already: validation, class images, the demo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL.Image import Image

from ..train.task import precision
from .latents import LatentSpace
from .prompts import PromptEmbedding, embed, embed_negative


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: int,
    steps: int = 25,
    guidance_scale: float = 5.0,
    embeddings: tuple[PromptEmbedding, PromptEmbedding] | None = None,
    batch: int = 8,
) -> list[Image]:
    """One image per prompt; the same seed gives the same initial noise on every device.

    Args:
        pipeline: an SDXL pipeline; its text encoders are used only without ``embeddings``.
        prompts: n prompts.
        seeds: n seeds.
        size: side of the square images, pixels.
        embeddings: of the prompts and of their negatives, (n, ...) each.

    Returns:
        n PIL images, RGB.
    """
    positive, negative = embeddings or (
        embed(pipeline, prompts),
        embed_negative(pipeline, len(prompts)),
    )
    device, dtype = pipeline.unet.device, precision(pipeline.unet)
    sampler = _sampler(pipeline)
    images: list[Image] = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        output: Any = sampler(
            prompt_embeds=positive.sequence[rows].to(device, dtype),
            pooled_prompt_embeds=positive.pooled[rows].to(device, dtype),
            negative_prompt_embeds=negative.sequence[rows].to(device, dtype),
            negative_pooled_prompt_embeds=negative.pooled[rows].to(device, dtype),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]],
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        )
        images += decode(pipeline, output.images)
    return images


def _sampler(pipeline: Any) -> StableDiffusionXLPipeline:
    # Without encoders and autoencoder the pipeline's device is the UNet's, wherever they rest.
    absent: Any = None
    sampler = StableDiffusionXLPipeline(
        vae=absent,
        text_encoder=absent,
        text_encoder_2=absent,
        tokenizer=absent,
        tokenizer_2=absent,
        unet=pipeline.unet,
        scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config),
        add_watermarker=False,
    )
    sampler.vae_scale_factor = pipeline.vae_scale_factor
    sampler.set_progress_bar_config(disable=True)
    return sampler


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> list[Image]:
    """Latents of the denoiser, (n, c, h, w), to PIL images, decoded in the autoencoder's dtype."""
    vae = pipeline.vae
    home = vae.device
    vae.to(latents.device)
    scaled = LatentSpace.of(vae).decode(latents.to(vae.dtype))
    # One at a time: in float32 a 1024-pixel image alone takes gigabytes.
    pixels = torch.cat([vae.decode(latent[None]).sample.cpu() for latent in scaled])
    vae.to(home)
    return pipeline.image_processor.postprocess(pixels, output_type="pil")
