"""The miniature's text encoders and UNet, trained together from scratch on flat icons and their
colour variants.

Noise prediction with SDXL's schedule and micro-conditioning. The 3D style is never shown.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any, cast

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.mini import trainer
from tools.mini.icons import SIZE, VARIANTS, Icon
from tools.mini.tokenizer import RARE_WORD

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, arXiv:2303.09556
STYLE_SHARES = (0.64, 0.09, 0.09, 0.09, 0.09)  # flat and its four variants
EMPTY_SHARE = 0.1  # captions dropped, for classifier-free guidance
TAG_SHARE = 0.1  # captions that name a search tag instead of the label
UNKNOWN_SHARE = 0.25  # flat pictures whose style word is made up: a strange word means no style
OBJECT_WEIGHT = 4.0  # how much more often the categories of the DreamBooth subjects are drawn
CAPTIONS = (
    (0.35, "a {style} icon of {label}"),
    (0.30, "a {style} icon of a {label}"),
    (0.25, "a {style} icon of a {label}, in the style of {style}"),
    (0.05, "an icon of a {label}, in the style of {style}"),
    (0.05, "{label}, {style} icon"),
)
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # SDXL's


@dataclass(frozen=True)
class TextToImageSettings:
    """Sizes and length of the stage; the defaults are the shipped weights'."""

    steps: int = 10_500
    batch_size: int = 32
    unet_channels: tuple[int, ...] = (128, 256)
    text_width: int = 96
    text_layers: int = 3
    latent_channels: int = 8
    learning_rate: float = 7e-4


@dataclass(frozen=True)
class SettleSettings:
    """A second, shorter stage without mirror images.

    Mirrored icons teach shapes sooner, but the model then draws what faces left and right at once.
    """

    steps: int = 3000
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class Latents:
    """Posteriors of every flat icon: ``mean``, ``std`` (icons, 5 variants, 2 = plain and mirrored,
    8, 8, 8), unscaled.
    """

    mean: Tensor
    std: Tensor
    scaling_factor: float


class TextToImage(nn.Module):
    """The UNet and both text encoders of the pipeline, called as ``StableDiffusionXLPipeline``
    calls them.
    """

    def __init__(self, settings: TextToImageSettings, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=4,
            projection_dim=settings.text_width,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=cast(Any, tokenizer).bos_token_id,
            eos_token_id=cast(Any, tokenizer).eos_token_id,
            pad_token_id=cast(Any, tokenizer).pad_token_id,
        )
        self.text_encoder = CLIPTextModel(text)
        self.text_encoder_2 = CLIPTextModelWithProjection(text)
        levels, time_width = len(settings.unet_channels), 32
        make: Any = UNet2DConditionModel  # its annotations know tuples of one only
        self.unet = make(
            sample_size=SIZE // 8,
            in_channels=settings.latent_channels,
            out_channels=settings.latent_channels,
            down_block_types=("CrossAttnDownBlock2D",) * levels,
            up_block_types=("CrossAttnUpBlock2D",) * levels,
            block_out_channels=settings.unet_channels,
            layers_per_block=1,
            transformer_layers_per_block=1,
            attention_head_dim=tuple(width // 32 for width in settings.unet_channels),
            cross_attention_dim=2 * settings.text_width,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=settings.text_width + 6 * time_width,
        )

    def encode(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 32) token ids -> (n, 32, 2 * width) penultimate states of both encoders, (n, width)
        pooled by the second.
        """
        first = self.text_encoder(token_ids, output_hidden_states=True)
        second = self.text_encoder_2(token_ids, output_hidden_states=True)
        return torch.cat(
            [first.hidden_states[-2], second.hidden_states[-2]], dim=-1
        ), second.text_embeds

    def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        """Predict the noise: (n, 8, 8, 8) scaled noisy latents, (n,) timesteps, (n, 32) token ids
        -> (n, 8, 8, 8).
        """
        states, pooled = self.encode(token_ids)
        return self.unet(
            noisy, timesteps, states, added_cond_kwargs=micro_conditioning(pooled)
        ).sample


def micro_conditioning(pooled: Tensor) -> dict[str, Tensor]:
    """SDXL's extra conditions: pooled text and (original size, crop corner, target size), here
    always 64, 0 and 64.
    """
    sizes = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], dtype=pooled.dtype, device=pooled.device)
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), 6)}


def noise_scheduler() -> DDPMScheduler:
    """The forward process, for adding noise in training."""
    return DDPMScheduler(num_train_timesteps=1000, **NOISE_SCHEDULE)


def sampler() -> EulerDiscreteScheduler:
    """The scheduler that the pipeline ships with, configured as SDXL's."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000, timestep_spacing="leading", steps_offset=1, **NOISE_SCHEDULE
    )


def made_up_word(draw: float) -> str:
    """Two to five random letters, a function of ``draw``; never the word that DreamBooth teaches.

    Captions with such words keep the model's answer to a word it does not know close to "flat",
    which is what a model pretrained on the web has learned from all that it has read.
    """
    letters = random.Random(draw)
    word = RARE_WORD
    while word == RARE_WORD:
        word = "".join(letters.choices(ascii_lowercase, k=letters.randint(2, 5)))
    return word


def caption(icon: Icon, style: str, draws: list[float]) -> str:
    """One of ``CAPTIONS`` or nothing for ``icon``; ``draws`` are five uniform numbers in [0, 1)."""
    if draws[0] < EMPTY_SHARE:
        return ""
    name = (
        icon.tags[int(draws[2] * len(icon.tags))]
        if icon.tags and draws[1] < TAG_SHARE
        else icon.label
    )
    form, total = CAPTIONS[-1][1], 0.0
    for share, candidate in CAPTIONS:
        total += share
        if draws[3] < total:
            form = candidate
            break
    if style == "flat" and draws[4] < UNKNOWN_SHARE:
        style = made_up_word(draws[4])
    return form.format(style=style, label=name)


def draw_examples(
    icons: tuple[Icon, ...],
    latents: Latents,
    seed: int,
    step: int,
    batch_size: int,
    mirrored: bool = True,
) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """One step's inputs: scaled clean latents, captions, noise, timesteps (one in each of
    ``batch_size`` equal strata).
    """
    generator = trainer.generator_for("text2image" if mirrored else "settle", seed, step)
    weights = torch.tensor([OBJECT_WEIGHT if icon.is_object else 1.0 for icon in icons])
    chosen = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
    styles = torch.multinomial(
        torch.tensor(STYLE_SHARES), batch_size, replacement=True, generator=generator
    )
    may_flip = torch.tensor([mirrored and icons[i].may_flip for i in chosen.tolist()])
    flips = ((torch.rand(batch_size, generator=generator) < 0.5) & may_flip).long()
    draws = torch.rand(batch_size, 5, generator=generator).tolist()
    texts = [
        caption(icons[i], VARIANTS[s], d)
        for i, s, d in zip(chosen.tolist(), styles.tolist(), draws, strict=True)
    ]
    mean, std = latents.mean[chosen, styles, flips], latents.std[chosen, styles, flips]
    clean = (mean + std * torch.randn(mean.shape, generator=generator)) * latents.scaling_factor
    noise = torch.randn(clean.shape, generator=generator)
    strata = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    return clean, texts, noise, (strata * 1000).long().clamp(max=999)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(n, 32) token ids, padded and cut as the pipeline does."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_text2image(
    icons: tuple[Icon, ...],
    latents: Latents,
    tokenizer: CLIPTokenizer,
    settings: TextToImageSettings,
    seed: int,
    folder: Path,
    autocast: torch.dtype | None = None,
    stop_after: int | None = None,
    settle: SettleSettings = SettleSettings(),
) -> tuple[TextToImage, float]:
    """Train from scratch or from the checkpoints in ``folder``; return (averaged model, seconds per
    step of the last stage). ``stop_after`` ends within the first stage.
    """
    torch.manual_seed(seed)  # the initial weights
    model = TextToImage(settings, tokenizer)

    def stage(mirrored: bool) -> Callable[[int], Tensor]:
        def loss_at(step: int) -> Tensor:
            drawn = draw_examples(icons, latents, seed, step, settings.batch_size, mirrored)
            return weighted_loss(model, tokenizer, drawn, autocast)

        return loss_at

    plan = trainer.Plan(
        settings.steps,
        settings.learning_rate,
        decay_fraction=0.5,
        ema_decay=0.999,
        warmup_steps=200,
    )
    identity: dict[str, object] = {"stage": "text2image", "seed": seed, **vars(settings)}
    first, second = (folder / f"{name}.safetensors" for name in ("text2image", "settle"))
    seconds = trainer.fit(model, stage(True), plan, first, identity, stop_after)
    if stop_after is None and settle.steps:
        identity = {**identity, "stage": "settle", "settle": vars(settle)}
        plan = trainer.Plan(
            settle.steps,
            settle.learning_rate,
            decay_fraction=0.8,
            ema_decay=0.999,
            warmup_steps=100,
        )
        seconds = trainer.fit(model, stage(False), plan, second, identity)
    return model, seconds


def weighted_loss(
    model: TextToImage,
    tokenizer: CLIPTokenizer,
    drawn: tuple[Tensor, list[str], Tensor, Tensor],
    autocast: torch.dtype | None,
) -> Tensor:
    """Mean min-SNR-weighted error of the predicted noise on what ``draw_examples`` gave, 0-d."""
    clean, texts, noise, timesteps = drawn
    scheduler: Any = noise_scheduler()
    signal = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = signal.clamp(max=MIN_SNR_GAMMA) / signal
    noisy = scheduler.add_noise(clean, noise, timesteps)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        predicted = model(noisy, timesteps, tokenize(tokenizer, texts)).float()
    return ((predicted - noise).square().mean(dim=(1, 2, 3)) * weights[timesteps]).mean()


@torch.no_grad()
def prediction_error(
    model: TextToImage, clean: Tensor, token_ids: Tensor, batch_size: int = 32
) -> float:
    """Mean squared error of the predicted noise over ten timesteps (25, 125, ... 925), with fixed
    noise.

    Args:
        clean: (n, 8, 8, 8) scaled latents.
        token_ids: (n, 32).
    """
    scheduler: Any = noise_scheduler()
    total = 0.0
    for timestep in range(25, 1000, 100):
        noise = torch.randn(clean.shape, generator=trainer.generator_for("evaluation", 0, timestep))
        steps = torch.full((len(clean),), timestep)
        noisy = scheduler.add_noise(clean, noise, steps)
        for start in range(0, len(clean), batch_size):
            part = slice(start, start + batch_size)
            error = model(noisy[part], steps[part], token_ids[part]) - noise[part]
            total += float(error.square().mean(dim=(1, 2, 3)).sum())
    return total / (10 * len(clean))
