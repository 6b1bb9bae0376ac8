"""Images from a pipeline whose text is embedded already: validation, class images, the demo."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL.Image import Image

from ..core.values import ADAPTER_GUIDANCE, BASE_GUIDANCE
from ..train.task import precision
from .families import family_of
from .families.base import Conditions, Family, move
from .guidance import unconditional_by_base
from .inputs import require_unconditional
from .latents import require_finite
from .prompts import embed, embed_negative

OVERFLOW_FIX = "the model or what it is trained to overflows, so use bf16 or fp32 instead of fp16"


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: int | tuple[int, int],
    negatives: Sequence[str] = (),
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_from: str = ADAPTER_GUIDANCE,
    embeddings: tuple[Conditions, Conditions] | None = None,
    batch: int = 8,
    on_step: Callable[[int], None] | None = None,
) -> list[Image]:
    """One image per prompt; the same seed gives the same initial noise on every device.

    Args:
        pipeline: of a known kind; its text encoders are used only without ``embeddings``.
        prompts: n prompts.
        seeds: n seeds.
        size: side of the square images, or height and width; pixels.
        negatives: n negative prompts; none are empty ones.
        steps, guidance_scale: of the sampler and of the prompt; None is what is usual for the
            model.
        guidance_from: the model of the unconditional prediction: "adapter", the adapted one, or
            "base", the same without its adapters.
        embeddings: of the prompts and of their negatives, (n, ...) each.
        on_step: called with the number of each step, from 1, when it was taken.

    Returns:
        n PIL images, RGB.

    Raises:
        TrainingError: an image is not finite.
        UserError: the base model's prediction is asked for, and the model makes none.
    """
    is_base = guidance_from == BASE_GUIDANCE
    if embeddings is None:
        positive = embed(pipeline, prompts)
        negative = embed_negative(pipeline, len(prompts), negatives, guidance_from)
    else:
        positive, negative = embeddings
    height, width = (size, size) if isinstance(size, int) else size
    family: Family = family_of(pipeline)
    model = family.model(pipeline)
    dtype = precision(model)
    usual_steps, usual_guidance = family.usual_sampling(pipeline)
    guidance = usual_guidance if guidance_scale is None else guidance_scale
    if is_base:
        require_unconditional(family, guidance, pipeline.config, family.configs(pipeline))
    sampler = bare_sampler(family, pipeline)

    def callback(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return values

    images: list[Image] = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        conditional = {name: values[rows] for name, values in positive.items()}
        unconditional = {name: values[rows] for name, values in negative.items()}
        arguments = family.sampling(
            move(conditional, model.device, dtype),
            move(unconditional, model.device, dtype),
            guidance,
        )
        count = len(prompts[rows])
        with unconditional_by_base(family, model, count) if is_base else nullcontext():
            output: Any = sampler(
                **arguments,
                # A generator on the CPU for each image: its noise does not depend on the device.
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]],
                height=height,
                width=width,
                num_inference_steps=steps or usual_steps,
                output_type="latent",
                callback_on_step_end=callback,
            )
        names = []
        for prompt, seed in zip(prompts[rows], seeds[rows], strict=True):
            names.append(f"'{prompt}' with seed {seed}")
        latents = family.unpack_output(output.images, height, width)  # (n, c, h, w)
        images += decode(pipeline, latents, names)
    return images


def bare_sampler(family: Family, pipeline: Any) -> Any:
    """A pipeline like the given one with denoiser and scheduler only.

    Without encoders and autoencoder the pipeline's device is the denoiser's, wherever they rest.
    """
    kind: Any = type(pipeline)
    arguments = inspect.signature(kind.__init__).parameters
    settings = {name: value for name, value in pipeline.config.items() if name in arguments}
    settings |= dict.fromkeys(set(pipeline.components) & set(arguments))  # None
    # A scheduler has a state: the pipeline's own is left alone.
    settings["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    settings[family.denoiser] = family.model(pipeline)
    sampler = kind(**settings)
    sampler.vae_scale_factor = pipeline.vae_scale_factor
    family.prepare_sampler(sampler)
    sampler.set_progress_bar_config(disable=True)
    return sampler


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor, names: Sequence[str]) -> list[Image]:
    """Latents of the denoiser, (n, c, h, w), to PIL images, decoded in the autoencoder's dtype."""
    vae = pipeline.vae
    home_device = vae.device
    vae.to(latents.device)
    space = family_of(pipeline).latent_space(vae)
    scaled = space.decode(latents.to(vae.dtype))
    # One at a time: in float32 a 1024-pixel image alone takes gigabytes.
    pixels = torch.cat([space.pixels(vae, latent[None]).cpu() for latent in scaled])
    vae.to(home_device)
    for name, image in zip(names, pixels, strict=True):
        require_finite(f"the image of {name}", OVERFLOW_FIX, image)
    return pipeline.image_processor.postprocess(pixels, output_type="pil")
