"""Generate images with a pipeline: embed the prompts, call the denoiser, decode the latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ..core.files import counted
from ..core.values import ADAPTER_GUIDANCE, guidance_title, unconditional_strength
from ..train.task import explain_memory_errors, precision
from .config import require_unconditional
from .families import family_of
from .families.base import Family
from .families.tensors import Conditions, join_rows, move, split_rows
from .guidance import scaled_encoders, scaled_unconditional
from .latents import require_finite
from .schedulers import build_scheduler, give_generators

# Advice in error messages, for images that are not finite and for too little memory.
OVERFLOW_FIX = "fp16 overflows in the model or its adapter, so use bf16 or fp32"
DIVERGED_FIX = "the adapter is too strong: use an earlier step, or train with a lower learning rate"
SMALLER_IMAGES = "sample smaller images"


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
    guidance_from: float | str = ADAPTER_GUIDANCE,
    scheduler: str | None = None,
    embeddings: tuple[Conditions, Conditions] | None = None,
    batch: int = 8,
    memory_fix: str = f"sample fewer images at a time, or {SMALLER_IMAGES}",
    on_step: Callable[[int], None] | None = None,
) -> list[Image]:
    """Generate one image per prompt. A seed gives the same initial noise on every device.

    Args:
        pipeline: pipeline of a supported family. Its text encoders are used only if ``embeddings``
            is None.
        prompts, seeds: n prompts and n seeds.
        size: side of square images, or (height, width), in pixels.
        negatives: n negative prompts; () for empty prompts.
        steps: number of sampler steps; None for the model's default.
        guidance_scale: scale of guidance; None for the model's default.
        guidance_from: model for the unconditional prediction: "adapter" for the adapted model,
            "base" for the model without its trained adapters, or a number between 0 and 1, the
            strength of the trained adapters in this prediction.
        scheduler: a value of ``--sampling_scheduler``; None for the pipeline's scheduler.
        embeddings: embeddings of the prompts and of the negative prompts, (n, ...) each.
        batch: maximum number of images to generate at a time.
        memory_fix: advice for the user if the memory is too small for a batch, without a period.
        on_step: called after each step with the number of the step, starting at 1.

    Returns:
        n PIL images in RGB mode.

    Raises:
        TrainingError: an image is not finite, or the device runs out of memory.
        UserError: ``guidance_from`` needs an unconditional prediction, but there is none at this
            scale; or the scheduler does not fit the model.
    """
    strength = unconditional_strength(guidance_from)
    if embeddings is None:
        positive = embed(pipeline, prompts)
        negative = embed_negative(pipeline, len(prompts), negatives, guidance_from)
    else:
        positive, negative = embeddings
    if isinstance(size, int):
        size = (size, size)
    height, width = size
    family: Family = family_of(pipeline)
    denoiser = family.model(pipeline)
    dtype = precision(denoiser)
    usual_steps, guidance = family.usual_sampling(pipeline)
    if guidance_scale is not None:
        guidance = guidance_scale
    if strength < 1:
        request = f"guidance from {guidance_title(guidance_from)}"
        require_unconditional(family, guidance, pipeline.config, family.configs(pipeline), request)
    sampler = bare_sampler(family, pipeline, scheduler)
    # Some pipelines convert latents to the dtype of the denoiser's first floating-point weight.
    # With 4-bit base weights, this can be the weight of an adapter, in fp32.
    is_mixed = getattr(denoiser, "is_loaded_in_4bit", False) and dtype != torch.float32
    computation = torch.autocast(denoiser.device.type, dtype, enabled=is_mixed)

    images: list[Image] = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        names = []
        for prompt, seed in zip(prompts[rows], seeds[rows], strict=True):
            names.append(f"'{prompt}' with seed {seed}")
        # Generators on the CPU, so that the noise does not depend on the device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
        conditional = {name: values[rows] for name, values in positive.items()}
        unconditional = {name: values[rows] for name, values in negative.items()}
        arguments = family.sampling(
            move(conditional, denoiser.device, dtype),
            move(unconditional, denoiser.device, dtype),
            guidance,
        )
        source_of_guidance = scaled_unconditional(family, denoiser, len(names), strength)
        give_generators(sampler.scheduler, generators)
        action = f"sampling {names[0]}"
        if len(names) > 1:
            action += f" together with {counted(len(names) - 1, 'other image')}"
        with explain_memory_errors(action, memory_fix), source_of_guidance, computation:
            output: Any = sampler(
                **arguments,
                generator=generators,
                height=height,
                width=width,
                num_inference_steps=steps or usual_steps,
                output_type="latent",
                callback_on_step_end=partial(_report_step, on_step),
            )
        latents = family.unpack_output(output.images, height, width)  # (n, c, h, w)
        images += decode(pipeline, latents, names)
    return images


def _report_step(
    on_step: Callable[[int], None] | None, _: Any, step: int, __: Any, values: dict[str, Any]
) -> dict[str, Any]:
    """Call ``on_step`` with the number of a finished step. diffusers counts steps from 0."""
    if on_step is not None:
        on_step(step + 1)
    return values


def bare_sampler(family: Family, pipeline: Any, scheduler: str | None = None) -> Any:
    """Build a pipeline of the same class that has only a denoiser and a scheduler.

    Its device is the denoiser's, independent of the devices of the encoders and the autoencoder.

    Args:
        scheduler: a value of ``--sampling_scheduler``; None for the pipeline's scheduler.
    """
    kind: Any = type(pipeline)
    arguments = inspect.signature(kind.__init__).parameters
    settings = {name: value for name, value in pipeline.config.items() if name in arguments}
    # All other parts are None.
    settings |= dict.fromkeys(set(pipeline.components) & set(arguments))
    # A new scheduler is built, since the state of the pipeline's scheduler must not change.
    settings["scheduler"] = build_scheduler(pipeline.scheduler, scheduler)
    settings[family.denoiser] = family.model(pipeline)
    sampler = kind(**settings)
    sampler.vae_scale_factor = pipeline.vae_scale_factor
    family.prepare_sampler(sampler)
    sampler.set_progress_bar_config(disable=True)
    return sampler


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor, names: Sequence[str]) -> list[Image]:
    """Decode latents, (n, c, h, w), scaled as the denoiser returns them, to PIL images.

    The computation is in the autoencoder's dtype.

    Args:
        names: names of the images, for messages.

    Raises:
        TrainingError: an image is not finite, or the device runs out of memory.
    """
    vae = pipeline.vae
    home_device = vae.device
    space = family_of(pipeline).latent_space(vae)
    decoded: list[Tensor] = []  # (1, 3, H, W) each
    try:
        # One image at a time, since a 1024-pixel image takes gigabytes in float32.
        for name, latent in zip(names, latents, strict=True):
            with explain_memory_errors(f"decoding {name}", SMALLER_IMAGES):
                vae.to(latents.device)  # with --offload it is on the CPU
                scaled = space.decode(latent[None].to(vae.dtype))
                decoded.append(space.decode_pixels(vae, scaled).cpu())
    finally:
        vae.to(home_device)
    fix = OVERFLOW_FIX if torch.float16 in (latents.dtype, vae.dtype) else DIVERGED_FIX
    for name, image in zip(names, decoded, strict=True):
        require_finite(f"the image of {name}", fix, image)
    pixels = torch.cat(decoded)  # (n, 3, H, W)
    return pipeline.image_processor.postprocess(pixels, output_type="pil")


def embed(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    """Embed prompts with the pipeline's text encoders and their adapters, on their device."""
    return family_of(pipeline).embed(pipeline, prompts)


def embed_negative(
    pipeline: Any,
    count: int,
    prompts: Sequence[str] = (),
    guidance_from: float | str = ADAPTER_GUIDANCE,
) -> Conditions:
    """Embed ``count`` negative prompts with the pipeline's text encoders.

    Args:
        prompts: the negative prompts; () for empty prompts.
        guidance_from: determines the strength of the encoders' adapters; see `generate`.
    """
    family = family_of(pipeline)
    with scaled_encoders(family, pipeline, unconditional_strength(guidance_from)):
        empty = family.negative(pipeline, embed(pipeline, [""] * count))
        if not any(prompts):
            return empty
        rows = split_rows(embed(pipeline, prompts))
    # The embedding of an empty prompt is the family's negative embedding, for example zeros.
    for number, (prompt, empty_row) in enumerate(zip(prompts, split_rows(empty), strict=True)):
        if not prompt:
            rows[number] = empty_row
    return join_rows(rows)
