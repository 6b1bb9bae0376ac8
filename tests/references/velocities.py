"""Predictions of each flow-matching model by hand: patches one by one, prompts by the pipeline.

``velocity(pipeline, prompts, noisy, levels)`` gives noise minus image, (n, c, h, w), of noisy
latents (n, c, h, w) at noise levels (n,) in [0, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def velocity(pipeline: Any, prompts: list[str], noisy: Tensor, levels: Tensor) -> Tensor:
    """As the module says."""
    return _MODELS[type(pipeline).__name__](pipeline, prompts, noisy, levels)


def _sd3(pipeline: Any, prompts: list[str], noisy: Tensor, levels: Tensor) -> Tensor:
    sequence, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=77
    )
    return pipeline.transformer(noisy, sequence, pooled, 1000 * levels).sample


def _flux(pipeline: Any, prompts: list[str], noisy: Tensor, levels: Tensor) -> Tensor:
    sequence, pooled, text_places = pipeline.encode_prompt(prompts)
    height, width = noisy.shape[-2:]
    embedded = pipeline.transformer.config.guidance_embeds
    tokens = pipeline.transformer(
        hidden_states=_tokens(noisy),
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        timestep=levels,
        guidance=torch.full((len(prompts),), 3.5) if embedded else None,
        txt_ids=text_places,
        img_ids=_places(height // 2, width // 2, front=1),
    ).sample
    return _latents(tokens, height, width)


def _flux2(pipeline: Any, prompts: list[str], noisy: Tensor, levels: Tensor) -> Tensor:
    sequence, text_places = pipeline.encode_prompt(prompts)
    height, width = noisy.shape[-2:]
    pixels = [(i, j) for i in range(height) for j in range(width)]
    tokens = pipeline.transformer(
        hidden_states=torch.stack([noisy[:, :, i, j] for i, j in pixels], 1),
        encoder_hidden_states=sequence,
        timestep=levels,
        txt_ids=text_places,
        img_ids=_places(height, width, front=1, behind=1),
    ).sample
    result = torch.empty_like(noisy)
    for number, (i, j) in enumerate(pixels):
        result[:, :, i, j] = tokens[:, number]
    return result


def _z_image(pipeline: Any, prompts: list[str], noisy: Tensor, levels: Tensor) -> Tensor:
    rows = []
    for prompt, latents, level in zip(prompts, noisy, levels, strict=True):
        (sequence,), _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        time = (1000 - 1000 * level) / 1000
        (frame,) = pipeline.transformer([latents[:, None]], time[None], [sequence]).sample
        rows.append(-frame[:, 0])
    return torch.stack(rows)


def _qwen_image(pipeline: Any, prompts: list[str], noisy: Tensor, levels: Tensor) -> Tensor:
    height, width = noisy.shape[-2:]
    rows = []
    for prompt, latents, level in zip(prompts, noisy, levels, strict=True):
        sequence, mask = pipeline.encode_prompt(prompt)
        tokens = pipeline.transformer(
            hidden_states=_tokens(latents[None]),
            encoder_hidden_states=sequence,
            encoder_hidden_states_mask=mask,
            timestep=level[None],
            img_shapes=[[(1, height // 2, width // 2)]],
        ).sample
        rows.append(_latents(tokens, height, width)[0])
    return torch.stack(rows)


def _krea2(pipeline: Any, prompts: list[str], noisy: Tensor, levels: Tensor) -> Tensor:
    sequence, mask = pipeline.encode_prompt(prompts)
    height, width = noisy.shape[-2:]
    text_places = torch.zeros(sequence.shape[1], 3)
    tokens = pipeline.transformer(
        hidden_states=_tokens(noisy),
        encoder_hidden_states=sequence,
        timestep=levels,
        position_ids=torch.cat([text_places, _places(height // 2, width // 2, front=1)]),
        encoder_attention_mask=mask,
    ).sample
    return _latents(tokens, height, width)


def _lumina2(pipeline: Any, prompts: list[str], noisy: Tensor, levels: Tensor) -> Tensor:
    sequence, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return -pipeline.transformer(
        hidden_states=noisy,
        timestep=1 - levels,
        encoder_hidden_states=sequence,
        encoder_attention_mask=mask,
    ).sample


_MODELS = {
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "Flux2KleinPipeline": _flux2,
    "ZImagePipeline": _z_image,
    "QwenImagePipeline": _qwen_image,
    "Krea2Pipeline": _krea2,
    "Lumina2Pipeline": _lumina2,
}


def _corners(height: int, width: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(0, height, 2) for j in range(0, width, 2)]


def _tokens(latents: Tensor) -> Tensor:
    height, width = latents.shape[-2:]
    patches = [latents[:, :, i : i + 2, j : j + 2] for i, j in _corners(height, width)]
    return torch.stack([patch.flatten(1) for patch in patches], 1)


def _latents(tokens: Tensor, height: int, width: int) -> Tensor:
    count, _, channels = tokens.shape
    result = torch.empty(count, channels // 4, height, width)
    for number, (i, j) in enumerate(_corners(height, width)):
        result[:, :, i : i + 2, j : j + 2] = tokens[:, number].view(count, -1, 2, 2)
    return result


def _places(height: int, width: int, *, front: int = 0, behind: int = 0) -> Tensor:
    """Row and column of each token, with as many zeros before and behind."""
    places = [(i, j) for i in range(height) for j in range(width)]
    return torch.tensor([[*[0.0] * front, i, j, *[0.0] * behind] for i, j in places])
