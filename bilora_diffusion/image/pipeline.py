"""The frozen parts of a Stable Diffusion XL pipeline, loaded once and kept by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..errors import UserError
from ..mini import pipeline_dir
from ..train.soundness import reading, require_finite, require_safetensors, require_whole
from .pipeline_checks import ANOTHER, require_fit

MINI = "mini"
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
    where = resolve(name)
    folder = Path(where).expanduser()
    if not folder.is_dir():
        folder = _download(name, vae, revision=revision, variant=variant, cache_dir=cache_dir)
    if where == name and variant and not any(folder.glob(f"*/*.{variant}.*")):
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
