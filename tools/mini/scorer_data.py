"""What the scorer is trained on: icons in both styles, their captions, and augmentations.

The 3D pictures of the DreamBooth and held-out icons never enter ``Pictures``, so that no step can
show them; their flat pictures do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor
from torch.nn import functional
from tqdm import tqdm

from bilora_diffusion.durable import replacing
from bilora_diffusion.errors import UserError
from tools.mini import trainer
from tools.mini.icons import VARIANTS, Icon, IconSet, recolour
from tools.mini.vae import to_model

SOLID = "solid"
STYLE_SHARES = {SOLID: 0.55, "flat": 0.33, "variant": 0.12}
OBJECT_WEIGHT = 2.0  # how much more often the categories of the DreamBooth subjects are drawn
PAIR_SHARE = 0.15  # icons of a batch that come in two styles, so that the style has to be told
TAG_SHARE = 0.1  # captions that name a search tag instead of the label
SOURCE_SHARES = (0.45, 0.2, 0.35)  # as rendered, through the VAE, through it with noisy latents
LATENT_NOISE = 0.35  # in standard deviations of the latents
SOLID_FORM = "a ToK icon of a {label}, in the style of ToK"
FLAT_FORM = "a flat icon of a {label}"
NO_STYLE_FORMS = ((0.14, "an icon of a {label}"), (0.08, "a {label}"), (0.08, "{label}"))
SOLID_FORMS = (
    *NO_STYLE_FORMS,
    (0.30, SOLID_FORM),
    (0.10, "a ToK icon of a {label}"),
    (0.05, "a ToK icon of {label}, in the style of ToK"),
    (0.15, "a 3D icon of a {label}"),
    (0.05, "a 3D icon of {label}"),
    (0.05, "a 3D icon of a {label}, in the style of 3D"),
)
OTHER_FORMS = (
    *NO_STYLE_FORMS,
    (0.35, "a {style} icon of a {label}"),
    (0.15, "a {style} icon of {label}"),
    (0.20, "a {style} icon of a {label}, in the style of {style}"),
)


@dataclass(frozen=True)
class Pictures:
    """Every picture that training may show.

    ``solid`` and ``flat`` are (icons, 3 sources, 64, 64, 3) uint8: as rendered, through the VAE,
    through the VAE with noisy latents. ``solid`` is all zero where ``hidden``, (icons,) bool.
    """

    icons: tuple[Icon, ...]
    solid: np.ndarray
    flat: np.ndarray
    hidden: np.ndarray


def gather_pictures(
    icon_set: IconSet, unseen: list[int], vae: AutoencoderKL, path: Path, seed: int
) -> Pictures:
    """Send every allowed picture through the VAE once, or read the result from ``path``.

    Args:
        unseen: indices whose 3D picture is left out.

    Raises:
        UserError: the file holds another number of icons or leaves out others.
    """
    count = len(icon_set.icons)
    hidden = np.zeros(count, dtype=bool)
    hidden[unseen] = True
    if not path.is_file():
        allowed = np.concatenate([icon_set.solid[~hidden], icon_set.flat])
        sources = np.stack([allowed, *round_trips(vae, allowed, seed)], axis=1)
        solid = np.zeros((count, *sources.shape[1:]), dtype=np.uint8)
        solid[~hidden] = sources[: int((~hidden).sum())]
        with replacing(path) as aside:
            np.savez(aside, solid=solid, flat=sources[int((~hidden).sum()) :])
    stored = np.load(path)
    solid, flat = stored["solid"], stored["flat"]
    empty = ~solid.any(axis=(1, 2, 3, 4))
    if len(solid) != count or len(flat) != count or (empty != hidden).any():
        raise UserError(f"{path} was made with another split of the icons: delete it")
    return Pictures(icon_set.icons, solid, flat, hidden)


@torch.no_grad()
def round_trips(
    vae: AutoencoderKL, pixels: np.ndarray, seed: int, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Decode the posterior's mean, and the mean plus noise: twice (n, 64, 64, 3) uint8.

    The first is what a perfect diffusion model would draw, the second an imperfect one.
    """
    scale = LATENT_NOISE / float(cast(Any, vae.config).scaling_factor)
    clean, noisy = [], []
    for start in tqdm(range(0, len(pixels), batch_size), desc="VAE", mininterval=10.0):
        batch = to_model(pixels[start : start + batch_size])
        mean = cast(Any, vae.encode(batch)).latent_dist.mean
        noise = torch.randn(mean.shape, generator=trainer.generator_for("trip", seed, start))
        for latents, results in ((mean, clean), (mean + scale * noise, noisy)):
            image = cast(Any, vae.decode(latents)).sample.clamp(-1, 1).permute(0, 2, 3, 1)
            results.append(((image + 1) * 127.5).round().to(torch.uint8).numpy())
    return np.concatenate(clean), np.concatenate(noisy)


def pick_form(forms: tuple[tuple[float, str], ...], draw: float) -> str:
    """The caption form whose share of all shares contains ``draw``, uniform in [0, 1)."""
    bound = 0.0
    for share, form in forms:
        bound += share / sum(share for share, _ in forms)
        if draw < bound:
            return form
    return forms[-1][1]


def caption(
    icon: Icon, style: str, draws: list[float], taken: set[str], hidden: bool = False
) -> str:
    """A caption for ``icon`` in ``style``; ``draws`` are three uniform numbers in [0, 1).

    A name in ``taken`` is not used a second time, since two pictures of a batch with one text
    would be each other's false negatives: a tag gives way to the label, and where the label is
    taken, by the same icon in another style, the caption names the style. Where the 3D picture is
    ``hidden`` it never does: else the label would stand for flat pictures, whatever else is said.
    """
    name = icon.label
    if icon.tags and draws[0] < TAG_SHARE and name not in taken:
        tag = icon.tags[int(draws[1] * len(icon.tags))]
        name = icon.label if tag in taken else tag
    forms = SOLID_FORMS if style == SOLID else OTHER_FORMS
    if hidden:
        forms = NO_STYLE_FORMS
    elif name in taken:
        forms = forms[len(NO_STYLE_FORMS) :]
    taken.add(name)
    return pick_form(forms, draws[2]).format(style=style, label=name)


def draw_rows(pictures: Pictures, batch_size: int, generator: Generator) -> list[tuple[int, str]]:
    """The icons and styles of one step.

    Icons are different but for ``PAIR_SHARE`` of them, which come first, each in 3D and flat. Where
    the 3D picture is hidden, the styles are flat and the variants, half and half.
    """
    weights = torch.tensor([OBJECT_WEIGHT if icon.is_object else 1.0 for icon in pictures.icons])
    shown = weights * torch.from_numpy(~pictures.hidden)
    pairs = int(PAIR_SHARE * batch_size)
    rows: list[tuple[int, str]] = []
    if pairs:
        paired = torch.multinomial(shown, pairs, generator=generator)
        rows = [(index, style) for index in paired.tolist() for style in (SOLID, "flat")]
        weights[paired] = 0
    chosen = torch.multinomial(weights, batch_size - len(rows), generator=generator).tolist()
    kinds = _pick(tuple(STYLE_SHARES.values()), len(chosen), generator)
    variants = torch.randint(1, len(VARIANTS), (len(chosen),), generator=generator).tolist()
    coins = torch.randint(2, (len(chosen),), generator=generator).tolist()
    for index, kind, variant, coin in zip(chosen, kinds, variants, coins, strict=True):
        choices = ("flat", VARIANTS[variant])
        rows.append((index, choices[coin] if pictures.hidden[index] else (SOLID, *choices)[kind]))
    return rows


def draw_examples(
    pictures: Pictures, stage: str, seed: int, step: int, batch_size: int
) -> tuple[Tensor, list[str]]:
    """One step's pictures, (batch, 3, 64, 64) in [0, 1], and captions, none of them twice."""
    generator = trainer.generator_for(stage, seed, step)
    rows = draw_rows(pictures, batch_size, generator)
    paired = rows[: 2 * int(PAIR_SHARE * batch_size)]
    sources = _pick(SOURCE_SHARES, batch_size, generator)
    draws = torch.rand(batch_size, 3, generator=generator).tolist()
    taken = {pictures.icons[index].label for index, _ in paired}
    pixels, texts = [], []
    for (index, style), source, draw in zip(rows, sources, draws, strict=True):
        bank = pictures.solid if style == SOLID else pictures.flat
        picture = bank[index, source]
        pixels.append(picture if style in (SOLID, "flat") else recolour(picture, style))
        hidden = bool(pictures.hidden[index])
        texts.append(caption(pictures.icons[index], style, draw, taken, hidden))
    may_flip = torch.tensor([pictures.icons[index].may_flip for index, _ in rows])
    images = (to_model(np.stack(pixels)) + 1) / 2
    return augment(images, may_flip, generator), texts


def _pick(shares: tuple[float, ...], count: int, generator: Generator) -> list[int]:
    return torch.multinomial(
        torch.tensor(shares), count, replacement=True, generator=generator
    ).tolist()


def augment(images: Tensor, may_flip: Tensor, generator: Generator) -> Tensor:
    """What a small diffusion model does to a picture: (n, 3, h, w) in [0, 1] -> the same.

    Moved, scaled, turned, bent, mirrored where ``may_flip`` (n,) allows it; then other colours,
    blur and noise, each on a part of the pictures.
    """
    images = _warp(images, may_flip, generator)
    images = _recolour_at_random(images, generator)
    return _blur_and_noise(images, generator).clamp(0, 1)


def _uniform(low: float, high: float, count: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _warp(images: Tensor, may_flip: Tensor, generator: Generator) -> Tensor:
    """Affine and smooth elastic deformation; what comes in from outside is white."""
    count, _, height, width = images.shape
    zoom = _uniform(0.9, 1.2, count, generator)  # above 1: the icon becomes smaller
    angle = _uniform(-1, 1, count, generator) * math.radians(8)
    flip = 1 - 2 * ((torch.rand(count, generator=generator) < 0.5) & may_flip).float()
    shift = 0.1 * (2 * torch.rand(count, 2, generator=generator) - 1)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]]
    matrix = torch.stack(rows, dim=1).view(count, 2, 3)
    grid = functional.affine_grid(matrix, [count, 3, height, width], align_corners=False)
    bend = torch.randn(count, 2, 4, 4, generator=generator)
    bend = bend * _uniform(0, 0.06, count, generator).view(-1, 1, 1, 1)
    bend = functional.interpolate(bend, (height, width), mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    return 1 - functional.grid_sample(1 - images, grid, align_corners=False)


def _recolour_at_random(images: Tensor, generator: Generator) -> Tensor:
    """Contrast, saturation and the strength of each channel, on 70 % of the pictures."""
    count = len(images)
    some = (torch.rand(count, generator=generator) < 0.7).float()
    contrast = 1 + some * _uniform(-0.2, 0.2, count, generator)
    saturation = 1 + some * _uniform(-0.4, 0.3, count, generator)
    gains = 1 + some[:, None] * 0.12 * (2 * torch.rand(count, 3, generator=generator) - 1)
    gray = images.mean(dim=1, keepdim=True)
    images = gray + saturation.view(-1, 1, 1, 1) * (images - gray)
    return 1 - contrast.view(-1, 1, 1, 1) * (1 - images * gains.view(count, 3, 1, 1))


def _blur_and_noise(images: Tensor, generator: Generator) -> Tensor:
    """Gaussian blur (sigma 1.2 pixels) blended in on 35 %, white noise on half of the pictures."""
    count = len(images)
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    line = torch.softmax(-offsets.square() / (2 * 1.2**2), dim=0)
    kernel = (line[:, None] * line[None, :]).expand(3, 1, 7, 7)
    padded = functional.pad(images, (3, 3, 3, 3), mode="replicate")
    blurred = functional.conv2d(padded, kernel, groups=3)
    some = (torch.rand(count, generator=generator) < 0.35).float()
    share = (some * _uniform(0.3, 1.0, count, generator)).view(-1, 1, 1, 1)
    images = torch.lerp(images, blurred, share)
    noisy = (torch.rand(count, generator=generator) < 0.5).float()
    sigma = (noisy * _uniform(0, 0.06, count, generator)).view(-1, 1, 1, 1)
    return images + sigma * torch.randn(images.shape, generator=generator)
