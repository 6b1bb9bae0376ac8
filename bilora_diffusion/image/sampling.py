"""Sample images with a pipeline, with guidance from the adapted or the base model, or in between.

A LoRA is trained on captions, but changes the unconditional prediction too. So the difference that
guidance amplifies, conditional - unconditional, has less of what it learned. With guidance from the
base model the adapters act in the conditional prediction only, at the same cost (Phunyaphibarn et
al. 2025, https://arxiv.org/abs/2503.20240, for full fine-tuning; Zhong et al. 2025,
https://arxiv.org/abs/2504.01521, for domains). In between they act in the unconditional prediction
too, at a lower strength (Steering Guidance, https://arxiv.org/abs/2508.00319):

    with scaled_unconditional(family, denoiser, count=4, strength=0.5):
        images = pipeline(...)  # four
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor, nn

from .. import adapters
from ..adapters import LoraLayer
from ..core.files import counted
from ..core.values import ADAPTER_GUIDANCE, guidance_title, unconditional_strength
from ..train.task import explain_memory_errors, precision
from .config import require_unconditional
from .families import family_of
from .families.base import Family, Unconditional
from .families.tensors import Conditions, join_rows, move, split_rows
from .latents import require_finite

# Fixes in messages, for images that are not finite and for too little memory.
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
    embeddings: tuple[Conditions, Conditions] | None = None,
    batch: int = 8,
    memory_fix: str = f"sample fewer images at a time, or {SMALLER_IMAGES}",
    on_step: Callable[[int], None] | None = None,
) -> list[Image]:
    """Sample one image per prompt. A seed gives the same initial noise on every device.

    Args:
        pipeline: pipeline of a known family; its text encoders are used only without
            ``embeddings``.
        prompts, seeds: n prompts and n seeds.
        size: side of the square images, or height and width; in pixels.
        negatives: n negative prompts; () for empty prompts.
        steps: steps of the sampler; None for the model's default, as for the guidance scale.
        guidance_from: model of the unconditional prediction: "adapter" for the adapted model,
            "base" for the model without its adapters, or a number between 0 and 1, the strength of
            the adapters in it.
        embeddings: embeddings of prompts and negative prompts, (n, ...) each.
        batch: number of images that are sampled together.
        memory_fix: what the user can do if the memory is too small for a batch, without a period.
        on_step: called after each step with its number, from 1.

    Returns:
        n PIL images, RGB.

    Raises:
        TrainingError: an image is not finite, or the memory is full.
        UserError: guidance from another model than the adapted one, at a scale without an
            unconditional prediction.
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
    sampler = bare_sampler(family, pipeline)

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
        action = f"sampling {names[0]}"
        if len(names) > 1:
            action += f" together with {counted(len(names) - 1, 'other image')}"
        with explain_memory_errors(action, memory_fix), source_of_guidance:
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
    """The callback of a pipeline at the end of each step; diffusers counts steps from 0."""
    if on_step is not None:
        on_step(step + 1)
    return values


def bare_sampler(family: Family, pipeline: Any) -> Any:
    """Build a pipeline of the same class with only denoiser and scheduler.

    Its device is that of the denoiser, whatever the devices of encoders and autoencoder.
    """
    kind: Any = type(pipeline)
    arguments = inspect.signature(kind.__init__).parameters
    settings = {name: value for name, value in pipeline.config.items() if name in arguments}
    # All other parts are None.
    settings |= dict.fromkeys(set(pipeline.components) & set(arguments))
    # A scheduler has a state. That of the pipeline's scheduler must not change.
    settings["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    settings[family.denoiser] = family.model(pipeline)
    sampler = kind(**settings)
    sampler.vae_scale_factor = pipeline.vae_scale_factor
    family.prepare_sampler(sampler)
    sampler.set_progress_bar_config(disable=True)
    return sampler


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor, names: Sequence[str]) -> list[Image]:
    """Decode latents of the denoiser, (n, c, h, w), to PIL images, in the autoencoder's dtype.

    Args:
        names: names of the images, for messages.

    Raises:
        TrainingError: an image is not finite, or the memory is full.
    """
    vae = pipeline.vae
    home_device = vae.device
    space = family_of(pipeline).latent_space(vae)
    decoded: list[Tensor] = []  # (1, 3, H, W) each
    try:
        # One at a time: in float32 a 1024-pixel image alone takes gigabytes.
        for name, latent in zip(names, latents, strict=True):
            with explain_memory_errors(f"decoding {name}", SMALLER_IMAGES):
                vae.to(latents.device)  # it may be on the CPU, with --offload
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
        prompts: () for empty ones.
        guidance_from: the encoders' adapters act at its strength; see `generate`.
    """
    family = family_of(pipeline)
    with scaled_encoders(family, pipeline, unconditional_strength(guidance_from)):
        empty = family.negative(pipeline, embed(pipeline, [""] * count))
        if not any(prompts):
            return empty
        rows = split_rows(embed(pipeline, prompts))
    # An empty prompt is embedded as the family's negative prompt, such as zeros.
    for number, (prompt, empty_row) in enumerate(zip(prompts, split_rows(empty), strict=True)):
        if not prompt:
            rows[number] = empty_row
    return join_rows(rows)


@contextmanager
def scaled_unconditional(
    family: Family, denoiser: nn.Module, count: int, strength: float
) -> Iterator[None]:
    """Context manager: in unconditional predictions the denoiser's adapters have a lower strength.

    At strength 1, or without an active adapter, nothing changes. `Family.unconditional` says which
    predictions are unconditional.

    Args:
        denoiser: the denoiser with its adapters.
        count: number of images of the pipeline's call; the context is for one call.
        strength: factor of the adapters' change; 0 for the base model.
    """
    acting: list[LoraLayer] = []
    if strength != 1:
        acting = [layer for _, layer in adapters.layers(denoiser) if _is_acting(layer)]
    if not acting:
        yield
    elif family.unconditional is Unconditional.FIRST_ROWS and all(map(_is_plain, acting)):
        # One call of the denoiser, in which A x of the unconditional rows is scaled.
        with _scaled_first_rows(acting, count, strength):
            yield
    elif family.unconditional is Unconditional.SECOND_CALL:
        forward = _scaled_second_call(denoiser.forward, acting, strength)
        with _replaced_forward(denoiser, forward):
            yield
    else:
        # Two calls instead of one, each with half of the rows.
        is_first = family.unconditional is Unconditional.FIRST_ROWS
        forward = _halves(denoiser.forward, acting, count, strength, is_first=is_first)
        with _replaced_forward(denoiser, forward):
            yield


@contextmanager
def scaled_encoders(family: Family, pipeline: Any, strength: float) -> Iterator[None]:
    """Context manager: the adapters of a pipeline's text encoders have a lower strength."""
    if strength == 1:
        yield
        return
    encoder_layers: list[LoraLayer] = []
    for name in family.encoders:
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            encoder_layers += [layer for _, layer in adapters.layers(encoder)]
    with adapters.scaled(encoder_layers, strength):
        yield


def _acting_names(layer: LoraLayer) -> list[str]:
    """Names of the active adapters of a layer."""
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_acting(layer: LoraLayer) -> bool:
    """Test that a layer's adapters change its output; at strength 0 only DoRA's do."""
    variants = cast(Any, layer).lora_variant
    return any(layer.scaling[name] or name in variants for name in _acting_names(layer))


def _is_plain(layer: LoraLayer) -> bool:
    """Test that scaling A x of a row scales the change that the adapters make to its output."""
    if layer.merged:  # into the base weight
        return False
    for name in _acting_names(layer):
        # DoRA also scales the base layer's output.
        is_variant = name in cast(Any, layer).lora_variant
        if is_variant or layer.lora_bias[name]:
            return False
    return True


@contextmanager
def _scaled_first_rows(layers: list[LoraLayer], count: int, strength: float) -> Iterator[None]:
    """Context manager: the adapters' change of the first half of the rows is scaled."""

    # hidden = A x, (2 count, ..., rank)
    def scale_first_rows(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
        if len(hidden) != 2 * count:
            raise RuntimeError(f"{len(hidden)} rows for {count} images with guidance")
        if strength == 0:
            # B 0 = 0: the base layer's output is unchanged, to the bit, also if A x overflows.
            return torch.cat([torch.zeros_like(hidden[:count]), hidden[count:]])
        return torch.cat([strength * hidden[:count], hidden[count:]])

    with ExitStack() as stack:
        for layer in layers:
            for name in _acting_names(layer):
                hook = layer.lora_A[name].register_forward_hook(scale_first_rows)
                stack.callback(hook.remove)
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context manager: replaces a module's forward."""
    # A class defines its forward; a module that accelerate offloads has its own.
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _scaled_second_call(
    forward: Callable[..., Any], layers: list[LoraLayer], strength: float
) -> Any:
    """A forward that scales adapters in its second, fourth, ... calls, which are unconditional."""
    calls = itertools.count()

    def alternating(*args: Any, **kwargs: Any) -> Any:
        is_unconditional = next(calls) % 2 == 1
        with adapters.scaled(layers if is_unconditional else [], strength):
            return forward(*args, **kwargs)

    return alternating


def _halves(
    forward: Callable[..., Any],
    layers: list[LoraLayer],
    count: int,
    strength: float,
    *,
    is_first: bool,
) -> Any:
    """A forward that splits a batch of 2 ``count`` rows into two calls.

    The call for the unconditional half scales the adapters.

    Args:
        strength: factor of the adapters' change in that call.
        is_first: True if the unconditional half is the first.
    """

    def by_halves(*args: Any, **kwargs: Any) -> Any:
        outputs: list[Any] = []
        for half in (slice(0, count), slice(count, 2 * count)):
            is_unconditional = (half.start == 0) == is_first
            half_args, half_kwargs = _rows((args, kwargs), half, 2 * count)
            with adapters.scaled(layers if is_unconditional else [], strength):
                outputs.append(forward(*half_args, **half_kwargs)[0])
        if isinstance(outputs[0], Tensor):
            return (torch.cat(outputs),)
        return ([*outputs[0], *outputs[1]],)  # lists of images

    return by_halves


def _rows(values: Any, rows: slice, count: int) -> Any:
    """Select rows of each tensor and list in the nested arguments of a call.

    Args:
        count: number of rows of the batch; values of another length stay as they are.
    """
    if isinstance(values, dict):
        return {name: _rows(value, rows, count) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_rows(value, rows, count) for value in values)
    is_batch = isinstance(values, list) or (isinstance(values, Tensor) and values.dim() > 0)
    if is_batch and len(values) == count:
        return values[rows]
    return values
