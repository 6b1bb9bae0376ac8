"""What makes the parts of an image pipeline unfit for one another, whatever its kind."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import UserError, reading
from ..train.soundness import require_words

ANOTHER = "give another --pretrained_model_name_or_path"


def latent_channels(vae: Any) -> int:
    """Channels of an autoencoder's latents."""
    return vae.config.get("z_dim") or vae.config.latent_channels


def require_vae(name: str, vae: Any) -> None:
    """Refuse an autoencoder whose latents can't be scaled.

    Raises:
        UserError: a scale or a shift that is no number, or statistics of other channels.
    """
    scale, shift = vae.config.get("scaling_factor", 1.0), vae.config.get("shift_factor") or 0.0
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise UserError(
            f'the autoencoder of "{name}" has scaling_factor {scale!r}: write a number above 0 into'
            " its config.json, 0.13025 for Stable Diffusion XL."
        )
    if not (isinstance(shift, int | float) and math.isfinite(shift)):
        raise UserError(
            f'the autoencoder of "{name}" has shift_factor {shift!r}: write a number into its'
            " config.json, or null for none."
        )
    for key in ("latents_mean", "latents_std"):
        values = getattr(vae.config, key, None)
        if values is not None and len(values) != latent_channels(vae):
            raise UserError(
                f'the autoencoder of "{name}" has {len(values)} values of {key} for'
                f" {latent_channels(vae)} channels: correct its config.json."
            )


def require_channels(name: str, model: Any, vae: Any, packing: int) -> None:
    """Refuse a transformer that sees latents of other channels than the autoencoder's.

    Args:
        name: as the user gave it.
        model: the transformer.
        packing: places of a latent that are one token's channels.

    Raises:
        UserError: it names both numbers.
    """
    sees, has = model.config.in_channels, latent_channels(vae)
    if sees != packing * has:
        raise UserError(
            f'the transformer of "{name}" sees latents of {sees / packing:g} channels, and the'
            f" autoencoder makes {has}: give the autoencoder that belongs to it."
        )


def require_tokenizer(
    name: str, part: str, pipeline: Any, encoder: Any, *, cut: bool = True
) -> None:
    """Refuse a tokenizer of other words or longer texts than its encoder reads.

    Args:
        name: of the model, as the user gave it.
        part: such as "tokenizer_2".
        pipeline: that has it.
        encoder: that reads its tokens.
        cut: whether texts are cut to the tokenizer's length; else the pipeline cuts them.

    Raises:
        UserError: it knows none, makes numbers that the encoder does not know, or is too long.
    """
    what, tokenizer = f'the {part} of "{name}"', getattr(pipeline, part)
    fix = f"put its files into the folder {part}, or {ANOTHER}"
    require_words(what, tokenizer, encoder.get_input_embeddings().num_embeddings, fix)
    length = tokenizer.model_max_length
    most = getattr(encoder.config, "max_position_embeddings", None)
    if cut and most is not None and not (isinstance(length, int) and 0 < length <= most):
        raise UserError(
            f"{what} has model_max_length {length!r} where the text encoder reads {most} tokens:"
            f" correct {part}/tokenizer_config.json."
        )


def require_scheduler(name: str, scheduler: Any, *, flow: bool) -> None:
    """Refuse a scheduler without the noise levels that its model is trained on.

    Args:
        flow: whether the model predicts the velocity of a flow.

    Raises:
        UserError: no levels, or others.
    """
    kind = type(scheduler).__name__
    steps = scheduler.config.get("num_train_timesteps")
    if not (isinstance(steps, int) and steps > 0):
        raise UserError(
            f'the scheduler of "{name}" has num_train_timesteps {steps!r}: write a whole number'
            " above 0 into scheduler/scheduler_config.json, 1000 for most models."
        )
    what, fix = f'the scheduler of "{name}"', f"correct its scheduler_config.json, or {ANOTHER}"
    if flow:
        if "FlowMatch" not in kind:
            raise UserError(f"{what} is a {kind}, which has no straight paths to noise: {fix}.")
        return
    if "EDM" in kind:
        return
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"{what} is a {kind}, which has no noise levels that Stable Diffusion XL is trained on:"
            f" {fix}."
        )
    from diffusers import DDPMScheduler  # here, so that options are read without it

    trained: Any = reading(what, fix, lambda: DDPMScheduler.from_config(scheduler.config))
    levels = trained.alphas_cumprod
    if not bool(torch.isfinite(levels).all() and (levels >= 0).all() and (levels < 1).all()):
        raise UserError(f"{what} has noise levels outside 0 to 1: {fix}.")
