"""Make the miniature's scorer: a small CLIP, by open_clip's classes and its ``ClipLoss``.

    python -m tools.mini.scorer_training --output_dir scorer_out
    python -m tools.mini.scorer_training --output_dir quick --steps 5

The first line is what made the shipped weights; copy ``scorer_out/scorer`` to
``bilora_diffusion/mini/scorer``. Killed and started again with the same arguments it continues at
its last checkpoint, at most a minute back. Weights, data order and augmentations are a function of
``--seed``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from bilora_diffusion import durable
from bilora_diffusion.errors import UserError, run_cli
from bilora_diffusion.mini import pipeline_dir, scorer
from tools.mini import icons as icon_module
from tools.mini import trainer
from tools.mini.scorer_data import (
    FLAT_FORM,
    SOLID_FORM,
    Pictures,
    draw_examples,
    gather_pictures,
)
from tools.mini.scorer_figures import measure, measure_styles

MEAN = STD = (0.5, 0.5, 0.5)
MAX_LOGIT_SCALE = 100.0  # as CLIP's: Radford et al. 2021, arXiv:2103.00020, section 2.5
PAD = "<|pad|>"  # its own token, so that the end of a text occurs once and pooling is certain


@dataclass(frozen=True)
class ScorerSettings:
    """Sizes and length of the training; the defaults are the shipped weights'."""

    steps: int = 1200
    batch_size: int = 96
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.1
    embed_dim: int = 192
    layers: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 24
    text_width: int = 128
    text_layers: int = 3
    norm_batches: int = 40


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """The miniature's tokenizer from ``folder``, with a padding token of its own."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def model_config(settings: ScorerSettings, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of the scorer."""
    special: Any = tokenizer
    return {
        "embed_dim": settings.embed_dim,
        "vision_cfg": {
            "image_size": icon_module.SIZE,
            "layers": list(settings.layers),
            "width": settings.width,
        },
        "text_cfg": {
            "context_length": tokenizer.model_max_length,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": scorer.NAME,  # open_clip reads the folder's own files instead
            "width": settings.text_width,
            "heads": 4,
            "layers": settings.text_layers,
            "pool_type": "eos",
            "eos_id": special.eos_token_id,
            "pad_id": special.pad_token_id,
        },
    }


def train_scorer(
    pictures: Pictures,
    tokenizer: CLIPTokenizer,
    settings: ScorerSettings,
    seed: int,
    folder: Path,
    stop_after: int | None = None,
) -> tuple[nn.Module, float]:
    """Train from scratch or from ``folder/scorer.safetensors``.

    Args:
        stop_after: leave after this many steps of this call, with a checkpoint; for the tests.

    Returns:
        (averaged weights in a model in eval mode, seconds per step)

    Raises:
        UserError: the checkpoint was written with other settings.
    """
    from open_clip import ClipLoss
    from open_clip.model import CLIP

    torch.manual_seed(seed)  # the initial weights
    model: Any = CLIP(**model_config(settings, tokenizer))
    model = model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    contrastive = ClipLoss()

    def loss_at(step: int) -> Tensor:
        images, texts = draw_examples(pictures, "scorer", seed, step, settings.batch_size)
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        image_features, text_features, scale = model(normalize(images), ids.input_ids)
        return contrastive(image_features, text_features, scale.clamp(max=MAX_LOGIT_SCALE))

    plan = trainer.Plan(
        settings.steps,
        settings.learning_rate,
        decay_fraction=0.9,
        ema_decay=0.995,
        warmup_steps=min(100, settings.steps),
        weight_decay=settings.weight_decay,
        checkpoint_seconds=60.0,
    )
    identity: dict[str, object] = {"stage": "scorer", "seed": seed, **vars(settings)}
    checkpoint = folder / "scorer.safetensors"
    try:
        seconds = trainer.fit(model, loss_at, plan, checkpoint, identity, stop_after)
    except ValueError as error:
        raise UserError(str(error)) from error
    fit_norms(model, pictures, settings, seed)
    return model, seconds


def fit_norms(model: Any, pictures: Pictures, settings: ScorerSettings, seed: int) -> None:
    """Set the batch norms' statistics to those of the averaged weights on training pictures.

    Training itself never reads them, so that checkpoints can do without.
    """

    def batches() -> Iterator[Tensor]:
        for step in range(settings.norm_batches):
            yield normalize(
                draw_examples(pictures, "scorer-norms", seed, step, settings.batch_size)[0]
            )

    torch.optim.swa_utils.update_bn(batches(), model.visual)
    model.eval()


def normalize(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], as the exported preprocessing does, in the layout of the model."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def export(
    folder: Path,
    model: nn.Module,
    tokenizer: CLIPTokenizer,
    settings: ScorerSettings,
    labels: Sequence[str],
) -> None:
    """Write a folder for open_clip's ``local-dir:``: float16 weights, config, tokenizer, bank."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": model_config(settings, tokenizer),
        "preprocess_cfg": {
            "mean": MEAN,
            "std": STD,
            "size": icon_module.SIZE,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    tokenizer.save_pretrained(folder)
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    with durable.replacing(folder / "open_clip_model.safetensors") as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    bank = [form.format(label=label) for form in (SOLID_FORM, FLAT_FORM) for label in labels]
    durable.write_text(folder / scorer.CAPTIONS_FILE, "".join(f"{line}\n" for line in bank))
    durable.write_text(folder / "open_clip_config.json", durable.dump_json(config))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line; the defaults are what made the shipped weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="checkpoint, and the result in scorer/"
    )
    parser.add_argument(
        "--cache_dir", type=Path, help="npm packages and rendered icons (default: OUTPUT_DIR/cache)"
    )
    parser.add_argument("--seed", type=int, default=0, help="weights, data order, augmentations")
    parser.add_argument("--steps", type=int, default=ScorerSettings.steps)
    parser.add_argument("--batch_size", type=int, default=ScorerSettings.batch_size)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Train, export, and measure what was exported.

    Raises:
        UserError: a number is below 1, or the checkpoint in the folder has other settings.
    """
    for name in ("steps", "batch_size", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} is too small: give 1 or more")
    torch.set_num_threads(arguments.threads)
    output, started = arguments.output_dir, time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    icon_set = icon_module.load_icons(arguments.cache_dir or output / "cache")
    train, heldout = icon_module.split(icon_set.icons)
    settings = ScorerSettings(steps=arguments.steps, batch_size=arguments.batch_size)
    vae = cast(
        AutoencoderKL,
        AutoencoderKL.from_pretrained(pipeline_dir() / "vae", dtype=torch.float),
    )
    path = output / f"pictures-{arguments.seed}.npz"
    pictures = gather_pictures(icon_set, train + heldout, vae, path, arguments.seed)
    tokenizer = build_tokenizer(pipeline_dir() / "tokenizer")
    model, seconds = train_scorer(pictures, tokenizer, settings, arguments.seed, output)
    folder = output / "scorer"
    export(folder, model, tokenizer, settings, [icon.label for icon in icon_set.icons])
    names = [icon_set.icons[i].label for i in heldout]
    figures = {
        "figures": measure(folder),
        "styles": measure_styles(icon_set.solid[heldout], icon_set.flat[heldout], names, folder),
        "settings": {"seed": arguments.seed, **vars(settings)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    durable.write_text(folder / "figures.json", durable.dump_json(figures))
    minutes = (time.monotonic() - started) / 60
    print(durable.dump_json(figures), f"{seconds:.3f} s/step, {minutes:.1f} minutes in this call")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet; return the exit code."""
    return run_cli(functools.partial(run, parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
