"""Make mini-flow: a small Stable Diffusion 3 from the miniature's encoders and autoencoder.

    python -m tools.mini.flow --output_dir flow_out
    python -m tools.mini.flow --output_dir quick --steps 20 --settle_steps 5

The first line is what made the shipped weights: under two hours on two CPU cores. It resumes after
a kill, as ``tools.mini.pretrain`` does. Autoencoder, tokenizers and text encoders are the
miniature's, unchanged; the transformer is trained from nothing on the same flat icons and captions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bilora_diffusion.mini import pipeline_dir
from tools.mini import icons as icon_module
from tools.mini import trainer
from tools.mini.icons import DREAMBOOTH_PROMPT, IconSet
from tools.mini.pretrain import all_latents
from tools.mini.text2image import Latents, draw_examples
from tools.mini.vae import encode_all

WORDS = 20
"""Tokens that the tokenizers keep: the captions have no more, and each costs time."""
NO_T5 = ((16, 0.85), (77, 0.13), (256, 0.02))
"""How many zeros stand where T5's tokens would be, and how often; 256 is the pipeline's default."""


@dataclass(frozen=True)
class FlowSettings:
    """Sizes and length of the training; the defaults are the shipped weights'."""

    steps: int = 5500
    settle_steps: int = 1500
    batch_size: int = 32
    width: int = 192
    heads: int = 6
    layers: int = 8
    patch: int = 2
    learning_rate: float = 1e-3
    settle_learning_rate: float = 5e-4


class Conditioner:
    """The miniature's two encoders as Stable Diffusion 3 reads them, frozen.

    The first one has no projection in SDXL; here it has one, which changes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(folder / name, model_max_length=WORDS)
            for name in ("tokenizer", "tokenizer_2")
        ]
        first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        second = CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder_2", dtype=torch.float32
        )
        projected = CLIPTextModelWithProjection(first.config)
        projection = {"text_projection.weight": torch.eye(first.config.hidden_size)}
        projected.load_state_dict(_named(first) | projection)
        self.encoders = [projected.eval().requires_grad_(False), second.requires_grad_(False)]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Penultimate states side by side, (n, words, widths), and both poolings, (n, widths)."""
        states, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                list(texts), padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        return torch.cat(states, dim=-1), torch.cat(pooled, dim=-1)


def _named(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a text model under the names they have beside a projection."""
    return {
        name if name.startswith("text_model.") else f"text_model.{name}": value
        for name, value in model.state_dict().items()
    }


def transformer(settings: FlowSettings, text_width: int) -> Any:
    """An untrained one for 8 x 8 latents of 8 channels."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=settings.patch,
        in_channels=8,
        out_channels=8,
        num_layers=settings.layers,
        attention_head_dim=settings.width // settings.heads,
        num_attention_heads=settings.heads,
        joint_attention_dim=text_width,
        caption_projection_dim=settings.width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def velocity_loss(
    model: nn.Module, text: tuple[Tensor, Tensor], zeros: int, drawn: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Mean squared error of the velocity, 0-d.

    Args:
        text: states (n, words, width) and pooled (n, width).
        zeros: tokens in T5's place.
        drawn: clean latents and noise (n, 8, 8, 8), and noise levels in (0, 1), (n,).
    """
    states, pooled = text
    clean, noise, sigma = drawn
    along = sigma.view(-1, 1, 1, 1)
    absent = states.new_zeros(len(states), zeros, states.shape[-1])
    velocity = model(
        (1 - along) * clean + along * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=torch.cat([states, absent], dim=1),
        pooled_projections=pooled,
    ).sample
    return (velocity - (noise - clean)).square().mean()


def train(
    icon_set: IconSet,
    latents: Latents,
    settings: FlowSettings,
    seed: int,
    folder: Path,
    stop_after: int | None = None,
) -> tuple[Any, Conditioner, float]:
    """From scratch or from the checkpoints in ``folder``: the transformer with averaged weights,
    the encoders, and the seconds of a step. ``stop_after`` ends within the first stage.
    """
    read = Conditioner(pipeline_dir())
    torch.manual_seed(seed)
    model = transformer(settings, sum(e.config.hidden_size for e in read.encoders))

    def stage(name: str, mirrored: bool) -> Callable[[int], Tensor]:
        def loss_at(step: int) -> Tensor:
            clean, texts, noise, numbers = draw_examples(
                icon_set.icons, latents, seed, step, settings.batch_size, mirrored
            )
            # Logit-normal levels, one in each of as many equal shares (Esser et al. 2024).
            share = (numbers + 0.5) / 1000
            sigma = torch.special.ndtri(share).sigmoid()
            random = trainer.generator_for(f"flow {name}", seed, step)
            shares = torch.tensor([share for _, share in NO_T5])
            zeros, _ = NO_T5[int(torch.multinomial(shares, 1, generator=random))]
            return velocity_loss(model, read(texts), zeros, (clean, noise, sigma))

        return loss_at

    seconds = 0.0
    rates = (settings.learning_rate, settings.settle_learning_rate)
    for name, steps, rate, mirrored in zip(
        ("flow", "flow-settle"),
        (settings.steps, settings.settle_steps),
        rates,
        (True, False),
        strict=True,
    ):
        plan = trainer.Plan(steps, rate, decay_fraction=0.6, ema_decay=0.999, warmup_steps=200)
        identity: dict[str, object] = {"stage": name, "seed": seed, **vars(settings)}
        checkpoint = folder / f"{name}.safetensors"
        seconds = trainer.fit(model, stage(name, mirrored), plan, checkpoint, identity, stop_after)
        if stop_after is not None:
            break
    return model, read, seconds


def pipeline_of(model: Any, read: Conditioner, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The pipeline without T5."""
    absent: Any = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=read.encoders[0],
        tokenizer=read.tokenizers[0],
        text_encoder_2=read.encoders[1],
        tokenizer_2=read.tokenizers[1],
        **absent,
    )


@torch.no_grad()
def velocity_error(model: Any, read: Conditioner, clean: Tensor, texts: Sequence[str]) -> float:
    """Mean squared error of the velocity at ten noise levels with fixed noise."""
    text, total = read(texts), 0.0
    for number in range(10):
        noise = torch.randn(clean.shape, generator=trainer.generator_for("evaluation", 0, number))
        sigma = torch.full((len(clean),), (number + 0.5) / 10)
        total += float(velocity_loss(model, text, NO_T5[0][0], (clean, noise, sigma)))
    return total / 10


def figures(model: Any, read: Conditioner, vae: Any, icon_set: IconSet) -> dict[str, float]:
    """The figures of the model card."""
    train_icons, heldout = icon_module.split(icon_set.icons)
    found = {"transformer_parameters": float(sum(p.numel() for p in model.parameters()))}
    for style, form in (("solid", DREAMBOOTH_PROMPT), ("flat", "a flat icon of a {label}")):
        for name, indices in (("train", train_icons), ("heldout", heldout)):
            mean, _ = encode_all(vae, getattr(icon_set, style)[indices])
            texts = [form.format(label=icon_set.icons[i].label) for i in indices]
            clean = mean * vae.config.scaling_factor
            found[f"velocity_error_{name}_{style}"] = velocity_error(model, read, clean, texts)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, and write the pipeline in float16 and ``figures.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, help="npm packages and rendered icons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=FlowSettings.steps)
    parser.add_argument("--settle_steps", type=int, default=FlowSettings.settle_steps)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    output = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)
    icon_set = icon_module.load_icons(arguments.cache_dir or output / "cache")
    vae: Any = AutoencoderKL.from_pretrained(pipeline_dir() / "vae", torch_dtype=torch.float32)
    vae.requires_grad_(False).eval()
    stored = all_latents(vae, icon_set, output / "latents.safetensors")
    latents = Latents(stored.mean, stored.std, vae.config.scaling_factor)
    vae.register_to_config(shift_factor=0.0)
    settings = FlowSettings(steps=arguments.steps, settle_steps=arguments.settle_steps)
    model, read, seconds = train(icon_set, latents, settings, arguments.seed, output)
    found = figures(model, read, vae, icon_set) | {"seconds_per_step": seconds}
    pipeline_of(model, read, vae).to(dtype=torch.float16).save_pretrained(output / "pipeline")
    for file in (output / "pipeline").glob("*/*.json"):  # half of the tokenizers' is blanks
        known = json.loads(file.read_text())
        known.pop("_name_or_path", None)  # where this machine has the autoencoder
        file.write_text(json.dumps(known, ensure_ascii=False, separators=(",", ":")) + "\n")
    (output / "figures.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    main()
