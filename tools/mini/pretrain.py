"""Make the miniature from nothing: icons, VAE, tokenizer, text encoders, UNet, and figures.

    python -m tools.mini.pretrain --output_dir mini_out
    python -m tools.mini.pretrain --output_dir quick \\
        --vae_steps 20 --unet_steps 20 --settle_steps 5

The first line is what made the shipped weights: about two hours on two CPU cores; the second only
shows that every stage runs. Killed and started again with the same arguments it continues at its
last checkpoint, at most three minutes back. Everything that takes part in the result is a function
of ``--seed``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from bilora_diffusion.durable import replacing
from tools.mini import icons as icon_module
from tools.mini.icons import DREAMBOOTH_PROMPT, VARIANTS, IconSet
from tools.mini.text2image import (
    Latents,
    SettleSettings,
    TextToImage,
    TextToImageSettings,
    prediction_error,
    sampler,
    tokenize,
    train_text2image,
)
from tools.mini.tokenizer import RARE_WORD, build_tokenizer
from tools.mini.vae import VaeSettings, encode_all, psnr, train_vae


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line; the defaults are what made the shipped weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="checkpoints, pipeline, train/, heldout/, figures.json",
    )
    parser.add_argument(
        "--cache_dir", type=Path, help="npm packages and rendered icons (default: OUTPUT_DIR/cache)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="weights, data order and noise; the split has its own seed",
    )
    parser.add_argument("--vae_steps", type=int, default=VaeSettings.steps)
    parser.add_argument("--unet_steps", type=int, default=TextToImageSettings.steps)
    parser.add_argument("--settle_steps", type=int, default=SettleSettings.steps)
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 only where the CPU has instructions for it",
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


def autocast_dtype(precision: str) -> torch.dtype | None:
    """bfloat16 if asked for, or if "auto" and the CPU computes in it; emulated it is three times
    slower than float32.
    """
    if precision == "auto":
        flags = Path("/proc/cpuinfo")
        words = set(flags.read_text().split()) if flags.is_file() else set()
        precision = "bf16" if words & {"avx512_bf16", "amx_bf16"} else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def all_latents(vae: AutoencoderKL, icon_set: IconSet, path: Path) -> Latents:
    """Encode every flat icon, variant and mirror image once, or read them from ``path``.

    ``scaling_factor`` is 1 / standard deviation of the plain flat latents, so that the UNet sees
    unit variance.
    """
    if not path.is_file():
        count = len(icon_set.icons)
        stack = np.stack(
            [icon_module.recolour(icon_set.flat, variant) for variant in VARIANTS], axis=1
        )
        stack = np.stack([stack, stack[:, :, :, ::-1]], axis=2)
        mean, std = encode_all(vae, stack.reshape(-1, *stack.shape[3:]))
        shape = (count, len(VARIANTS), 2, *mean.shape[1:])
        with replacing(path) as aside:
            save_file({"mean": mean.reshape(shape), "std": std.reshape(shape)}, aside)
    stored = load_file(path)
    return Latents(stored["mean"], stored["std"], float(1 / stored["mean"][:, 0].std()))


def caption_texts(icon_set: IconSet) -> list[str]:
    """What the tokenizer learns from: labels eight times as often as tags, and the words of the
    captions.
    """
    texts = [text for icon in icon_set.icons for text in (*[icon.label] * 8, *icon.tags)]
    return (
        texts
        + [
            f"a {variant} icon of a label, an icon in the style of {variant}"
            for variant in VARIANTS
        ]
        * 50
    )


def save_pipeline(
    folder: Path, vae: AutoencoderKL, model: TextToImage, tokenizer: transformers.CLIPTokenizer
) -> None:
    """Write the pipeline in float16, in diffusers' format. The models are converted in place."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet,
        scheduler=cast(Any, sampler()),
        force_zeros_for_empty_prompt=False,  # the empty prompt was trained, zeros were not
        add_watermarker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)


def measure(
    vae: AutoencoderKL, model: TextToImage, tokenizer: transformers.CLIPTokenizer, icon_set: IconSet
) -> dict[str, float]:
    """The figures of the model card; PSNR in dB, errors as ``text2image.prediction_error``."""
    train, heldout = icon_module.split(icon_set.icons)
    figures = {"vae_psnr_unseen_3d_db": psnr(vae, icon_set.solid[train + heldout])}
    forms = (("solid", DREAMBOOTH_PROMPT), ("flat", "a flat icon of a {label}"))
    for style, form in forms:
        for name, indices in (("train", train), ("heldout", heldout)):
            mean, _ = encode_all(vae, getattr(icon_set, style)[indices])
            ids = tokenize(tokenizer, [form.format(label=icon_set.icons[i].label) for i in indices])
            figures[f"noise_error_{name}_{style}"] = prediction_error(
                model, mean * cast(Any, vae.config).scaling_factor, ids
            )
    for name, part in (("vae", vae), ("unet", model.unet), ("text_encoder", model.text_encoder)):
        figures[f"{name}_parameters"] = sum(parameter.numel() for parameter in part.parameters())
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Run every stage that is not done yet."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    output, seed = arguments.output_dir, arguments.seed
    output.mkdir(parents=True, exist_ok=True)
    autocast = autocast_dtype(arguments.precision)
    print(f"precision: {autocast or torch.float32}, threads: {arguments.threads}", flush=True)

    icon_set = icon_module.load_icons(arguments.cache_dir or output / "cache")
    train, heldout = icon_module.split(icon_set.icons)
    icon_module.write_image_folder(output / "train", icon_set, train)
    icon_module.write_image_folder(output / "heldout", icon_set, heldout)

    started = time.monotonic()
    vae_settings = VaeSettings(steps=arguments.vae_steps)
    vae, vae_seconds = train_vae(icon_set, train + heldout, vae_settings, seed, output, autocast)
    latents = all_latents(vae, icon_set, output / "latents.safetensors")
    vae.register_to_config(scaling_factor=latents.scaling_factor)
    print(
        f"VAE: PSNR on unseen 3D icons {psnr(vae, icon_set.solid[train + heldout]):.2f} dB",
        flush=True,
    )

    texts = caption_texts(icon_set)
    tokenizer = build_tokenizer(texts)
    rare = tokenizer.convert_tokens_to_ids(RARE_WORD + "</w>")
    if any(rare in ids for ids in tokenizer(texts).input_ids):
        raise ValueError(f"{RARE_WORD!r} occurs in a caption, so it cannot stand for a new style")

    settings = TextToImageSettings(steps=arguments.unet_steps)
    settle = SettleSettings(steps=arguments.settle_steps)
    model, unet_seconds = train_text2image(
        icon_set.icons, latents, tokenizer, settings, seed, output, autocast, settle=settle
    )
    figures = measure(vae, model, tokenizer, icon_set)
    save_pipeline(output / "pipeline", vae, model, tokenizer)
    size = sum(path.stat().st_size for path in (output / "pipeline").rglob("*") if path.is_file())
    figures |= {
        "seed": seed,
        "vae_steps": vae_settings.steps,
        "unet_steps": settings.steps,
        "settle_steps": settle.steps,
        "vae_seconds_per_step": vae_seconds,
        "unet_seconds_per_step": unet_seconds,
        "minutes_of_this_call": (time.monotonic() - started) / 60,
        "pipeline_bytes": size,
        "precision": str(autocast or torch.float32),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "packages": icon_module.PACKAGES,
    }
    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2), flush=True)


if __name__ == "__main__":
    main()
