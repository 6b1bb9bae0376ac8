"""A Stable Diffusion XL pipeline: loaded whole, or refused where it can't be trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..errors import UserError
from ..mini import MINI, pipeline_dir
from ..train.soundness import (
    reading,
    require_finite,
    require_safetensors,
    require_whole,
    require_words,
)
from .inputs import pipeline_folder

ANOTHER = "give another --pretrained_model_name_or_path"
PARTS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
"""The models of the pipeline."""


def resolve(name: str) -> str:
    """The folder or hub id that a model name stands for; ``mini`` is the embedded miniature."""
    return str(pipeline_dir()) if name == MINI else name


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype | dict[str, torch.dtype],
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    vae: str | None = None,
) -> StableDiffusionXLPipeline:
    """Load a genuine SDXL pipeline with its VAE in float32 and everything else in ``dtype``.

    Args:
        name: folder, hub id, or ``mini``.
        dtype: of all parts, or of each by name with "default" for the rest.
        vae: another autoencoder (``--pretrained_vae_model_name_or_path``).

    Raises:
        UserError: nothing that can be loaded is there, only pickles are, weights are missing or not
            finite, or the parts don't fit together.
    """
    folder = pipeline_folder(name) or _download(
        name, vae, revision=revision, variant=variant, cache_dir=cache_dir
    )
    if name != MINI and variant and not any(folder.glob(f"*/*.{variant}.*")):
        raise UserError(f'--variant "{variant}" is of no file of "{name}": {ANOTHER}, or drop it.')
    parts: dict[str, Any] = {}
    for part, kind in PARTS.items():
        # The SDXL autoencoder overflows in half precision: latents are made and decoded in float32.
        own = dtype.get(part, dtype["default"]) if isinstance(dtype, dict) else dtype
        options: dict[str, Any] = {"dtype": torch.float32 if part == "vae" else own}
        if part == "vae" and vae:
            parts[part] = _load(
                f'the autoencoder "{vae}"', kind, vae, cache_dir=cache_dir, **options
            )
            continue
        if variant and any((folder / part).glob(f"*.{variant}.*")):
            options["variant"] = variant
        parts[part] = _load(f'the {part} of "{name}"', kind, folder, subfolder=part, **options)
    pipeline = reading(
        f'the base model "{name}"',
        f"correct its files, or {ANOTHER}",
        lambda: StableDiffusionXLPipeline.from_pretrained(
            folder, **parts, add_watermarker=False, use_safetensors=True
        ),
    )
    reading(f'the base model "{name}"', ANOTHER, lambda: require_fit(name, pipeline))
    pipeline.set_progress_bar_config(disable=True)
    for module in parts.values():
        module.requires_grad_(False)
        module.eval()
    return pipeline


def _download(name: str, vae: str | None, **options: Any) -> Path:
    """The folder in the hub's cache that holds a pipeline, without the autoencoder if another is
    given.
    """
    passed = {"vae": None} if vae else {}
    found = reading(
        f'the base model "{name}"',
        "pass --pretrained_model_name_or_path a hub id (or folder) of a Stable Diffusion XL"
        " pipeline, or 'mini' for the embedded miniature",
        lambda: StableDiffusionXLPipeline.download(name, use_safetensors=True, **options, **passed),
    )
    return Path(found)


def _load(what: str, kind: Any, place: str | Path, **options: Any) -> Any:
    """One model with all of its weights, from safetensors."""
    folder = Path(place).expanduser() / options.get("subfolder", "")
    require_safetensors(what, folder)
    model, found = reading(
        what,
        f"download or write it again, or {ANOTHER}",
        lambda: kind.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, **options
        ),
    )
    require_whole(what, found["missing_keys"])
    require_finite(what, model)
    return model


def require_fit(name: str, pipeline: Any) -> None:
    """Refuse a pipeline whose parts load, but can't be trained together.

    Args:
        name: as the user gave it.
        pipeline: of Stable Diffusion XL, whole and finite.

    Raises:
        UserError: one sentence with the model, the part and the fix.
    """
    _require_unet(name, pipeline)
    _require_vae(name, pipeline.vae)
    for suffix in ("", "_2"):
        encoder = getattr(pipeline, f"text_encoder{suffix}")
        _require_tokenizer(name, f"tokenizer{suffix}", pipeline, encoder)
    _require_scheduler(name, pipeline.scheduler)


def _require_unet(name: str, pipeline: Any) -> None:
    config: Any = pipeline.unet.config
    latent = pipeline.vae.config.latent_channels
    for side in ("in_channels", "out_channels"):
        if config[side] != latent:
            raise UserError(
                f'the UNet of "{name}" has {config[side]} {side} where its autoencoder has {latent}'
                " (9 are an inpainting model's): give a text-to-image model, and the autoencoder"
                " that belongs to it."
            )
    encoders = [pipeline.text_encoder.config, pipeline.text_encoder_2.config]
    width = sum(encoder.hidden_size for encoder in encoders)
    wanted = config.cross_attention_dim
    if wanted != width and set(wanted if isinstance(wanted, list | tuple) else ()) != {width}:
        raise UserError(
            f'the UNet of "{name}" has cross_attention_dim {wanted} where its text encoders give'
            f" {width}: {ANOTHER}."
        )
    if config.addition_embed_type != "text_time":
        raise UserError(
            f'the UNet of "{name}" has addition_embed_type {config.addition_embed_type}, and that'
            f" of Stable Diffusion XL has text_time: {ANOTHER}."
        )
    given = encoders[1].projection_dim + 6 * config.addition_time_embed_dim
    if config.projection_class_embeddings_input_dim != given:
        raise UserError(
            f'the UNet of "{name}" has projection_class_embeddings_input_dim'
            f" {config.projection_class_embeddings_input_dim} where prompt and sizes give {given}:"
            f" {ANOTHER}."
        )
    side = config.sample_size
    if not (isinstance(side, int) and side > 0):
        raise UserError(
            f'the UNet of "{name}" has sample_size {side!r}: write the side of its latents into'
            " unet/config.json, 128 for Stable Diffusion XL."
        )


def _require_vae(name: str, vae: Any) -> None:
    scale = vae.config.scaling_factor
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise UserError(
            f'the autoencoder of "{name}" has scaling_factor {scale!r}: write a number above 0 into'
            " its config.json, 0.13025 for Stable Diffusion XL."
        )
    for key in ("latents_mean", "latents_std"):
        values = getattr(vae.config, key, None)
        if values is not None and len(values) != vae.config.latent_channels:
            raise UserError(
                f'the autoencoder of "{name}" has {len(values)} values of {key} for'
                f" {vae.config.latent_channels} channels: correct its config.json."
            )


def _require_tokenizer(name: str, part: str, pipeline: Any, encoder: Any) -> None:
    what, tokenizer = f'the {part} of "{name}"', getattr(pipeline, part)
    fix = f"put its files into the folder {part}, or {ANOTHER}"
    require_words(what, tokenizer, encoder.get_input_embeddings().num_embeddings, fix)
    length, most = tokenizer.model_max_length, encoder.config.max_position_embeddings
    if not (isinstance(length, int) and 0 < length <= most):
        raise UserError(
            f"{what} has model_max_length {length!r} where the text encoder reads {most} tokens:"
            f" correct {part}/tokenizer_config.json."
        )


def _require_scheduler(name: str, scheduler: Any) -> None:
    kind = type(scheduler).__name__
    steps = scheduler.config.get("num_train_timesteps")
    if not (isinstance(steps, int) and steps > 0):
        raise UserError(
            f'the scheduler of "{name}" has num_train_timesteps {steps!r}: write a whole number'
            " above 0 into scheduler/scheduler_config.json, 1000 for Stable Diffusion XL."
        )
    if "EDM" in kind:
        return
    what, fix = f'the scheduler of "{name}"', f"correct its scheduler_config.json, or {ANOTHER}"
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"{what} is a {kind}, which has no noise levels that Stable Diffusion XL is trained on:"
            f" {fix}."
        )
    trained: Any = reading(what, fix, lambda: DDPMScheduler.from_config(scheduler.config))
    levels = trained.alphas_cumprod
    if not bool(torch.isfinite(levels).all() and (levels >= 0).all() and (levels < 1).all()):
        raise UserError(f"{what} has noise levels outside 0 to 1: {fix}.")
