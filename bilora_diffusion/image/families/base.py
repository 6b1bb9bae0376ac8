"""The interface of a family of image models: its parts, prompts, latents and forward call.

Everything else of a run - images, noise, methods, held-out loss, export - is shared. A kind is one
file here and one row in the table of this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ..latent_space import LatentSpace

STEPS = 25
"""In which images are drawn by default."""
Conditions = dict[str, Any]
"""Inputs of a model beside the noisy latents, for n rows: tensors (n, ...), or lists of n
tensors where rows differ in length."""
Configs = Mapping[str, Mapping[str, Any]]
"""The configurations of denoiser and autoencoder, by the part."""


def rows(conditions: Conditions) -> list[Conditions]:
    """Each row on its own, on the CPU."""
    there = moved(conditions, torch.device("cpu"), None)
    count = len(next(iter(there.values())))
    return [{name: values[i : i + 1] for name, values in there.items()} for i in range(count)]


def joined(parts: Sequence[Conditions]) -> Conditions:
    """Rows one below the other."""
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(first, Tensor)
        else [row for part in parts for row in part[name]]
        for name, first in parts[0].items()
    }


def moved(conditions: Conditions, device: torch.device, dtype: torch.dtype | None) -> Conditions:
    """On a device, floating-point values in a dtype or as they are."""

    def move(value: Tensor) -> Tensor:
        return value.to(device, dtype if value.is_floating_point() else None)

    return {
        name: move(values) if isinstance(values, Tensor) else [move(value) for value in values]
        for name, values in conditions.items()
    }


def padded(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (length, ...) as one tensor (n, longest, ...), zeros behind, and its mask of ones
    and zeros, (n, longest).
    """
    lengths = torch.tensor([len(tensor) for tensor in tensors], device=tensors[0].device)
    whole = nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)
    return whole, (torch.arange(whole.shape[1], device=whole.device) < lengths[:, None]).long()


def packed(latents: Tensor) -> Tensor:
    """Patches of 2 x 2 latents (n, c, h, w) as tokens, (n, h/2 w/2, 4 c)."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse, for latents of this height and width."""
    patches = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(patches, 2)


def scale_of(vae: Mapping[str, Any]) -> int:
    """Pixels a side of one latent, from an autoencoder's configuration."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


@dataclass(frozen=True)
class Family:
    """A kind of image model, with what a run may change about it."""

    title: ClassVar[str]
    pipeline: ClassVar[str]  # diffusers' class, as ``model_index.json`` has it
    parts: ClassVar[Mapping[str, str]] = {}  # its models and their classes
    optional: ClassVar[frozenset[str]] = frozenset()  # those that a pipeline may lack
    denoiser: ClassVar[str] = "transformer"  # trained; keys in adapters' files begin with its name
    # projections of attention, which get adapters by default
    targets: ClassVar[tuple[str, ...]] = ("to_k", "to_q", "to_v", "to_out.0")
    feed_forward: ClassVar[tuple[str, ...]] = ("ff",)  # modules, with all their linear layers
    flow: ClassVar[bool] = True  # predicts a velocity along straight paths (``flow``)
    weighting: ClassVar[str] = "none"  # of noise levels, by default
    guidance: ClassVar[float] = 5.0  # with which its images are drawn by default
    unguided: ClassVar[float] = 1.0  # up to this guidance no negative prompt is read
    few_steps: ClassVar[int] = STEPS  # in which its distilled models draw
    undistilled: ClassVar[str] = "the model that it was made from"
    patch: ClassVar[int] = 16  # pixels a side of the smallest patch, which divides the resolution
    side: ClassVar[int] = 1024  # pixels, where the configuration does not say

    max_sequence_length: int = 512  # tokens of a prompt, where the model leaves that open
    guidance_scale: float = 3.5  # that a model with a guidance embedding is told in training

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders among the parts."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Embeddings of prompts by the pipeline's own encoders, as and where they are now."""
        raise NotImplementedError

    def encoded(self, pipeline: Any, prompts: Sequence[str], **more: Any) -> Any:
        """What the pipeline's own ``encode_prompt`` makes of prompts."""
        return pipeline.encode_prompt(
            list(prompts),  # a list of its own: some pipelines write into it
            device=pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
            **more,
        )

    def negative(self, pipeline: Any, empty: Conditions) -> Conditions:
        """The negative prompt of guidance, given the embedding of empty prompts."""
        return empty

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        """The denoiser's prediction, (n, c, h, w): of a flow model the velocity, noise minus image.

        Args:
            model: the denoiser.
            noisy: latents in the model's dtype, (n, c, h, w).
            levels: (n,): sigma in [0, 1] of a flow model, else the timestep.
            conditions: of the n rows, on the model's device.
        """
        raise NotImplementedError

    def space(self, vae: Any) -> LatentSpace:
        """The latent space of the denoiser."""
        return LatentSpace.of(vae)

    def tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image of so many pixels."""
        return height // self.patch * (width // self.patch)

    def mu(self, pipeline: Any, tokens: int) -> float:
        """The logarithm of the shift of the noise levels for so many tokens, where it depends on
        them.
        """
        config = pipeline.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return least + (most - least) * (tokens - low) / (high - low)

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        """Arguments of the pipeline's call: the embedded prompts and the guidance; here of those
        that take a sequence, and perhaps one pooled vector, of each prompt.
        """
        names = {"sequence": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
        told = {names[name]: values for name, values in positive.items()}
        against = {f"negative_{names[name]}": values for name, values in negative.items()}
        return {**told, **against, "guidance_scale": guidance}

    def ready(self, sampler: Any) -> None:
        """Give a pipeline that has denoiser and scheduler only what else its call reads."""

    def unpacked(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents (n, c, h, w) of what the pipeline gives as ``output_type="latent"`` for images of
        so many pixels: these, or tokens of 2 x 2 of them.
        """
        return latents if latents.ndim == 4 else unpacked(latents, height // 8, width // 8)

    def pixels(self, pipeline: Any) -> int:
        """Side of the images that a loaded pipeline was made for."""
        return self.side_of(
            {self.denoiser: self.model(pipeline).config, "vae": pipeline.vae.config}
        )

    def side_of(self, configs: Configs) -> int:
        """The same from the configurations of denoiser and autoencoder."""
        side = configs[self.denoiser].get("sample_size")
        if not isinstance(side, int):
            return self.side
        return side * scale_of(configs["vae"])

    def model(self, pipeline: Any) -> Any:
        """The denoiser of a pipeline."""
        return getattr(pipeline, self.denoiser)

    def is_distilled(self, pipeline: Any) -> bool:
        """Test that a loaded model is distilled to a few steps without guidance."""
        return bool(pipeline.config.get("is_distilled", False))

    def drawing(self, pipeline: Any) -> tuple[int, float]:
        """Steps and guidance with which a loaded model's images are drawn by default."""
        if self.is_distilled(pipeline):
            return self.few_steps, 0.0
        return STEPS, self.guidance

    def precision(self, device: torch.device) -> torch.dtype:
        """Dtype of images on a device by default: 16 bits on a GPU, for a flow model those of bf16,
        whose range fp16 lacks.
        """
        if device.type not in ("cuda", "mps"):
            return torch.float32
        if not self.flow:
            return torch.float16
        if device.type == "cuda":
            there = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            there = torch.backends.mps.is_macos_or_newer(14, 0)
        return torch.bfloat16 if there else torch.float32

    def told_guidance(self, configs: Configs) -> bool:
        """Test that a model has an embedding of guidance, which training must give."""
        return False

    def remark(self, name: str, pipeline: Any) -> str | None:
        """A remark about a model before it is trained, as one sentence, or None.

        Args:
            name: as the user gave it.
            pipeline: loaded.
        """
        if not self.is_distilled(pipeline):
            return None
        return (
            f'"{name}" is distilled to a few steps without guidance, which training undoes: train'
            f" on {self.undistilled}, and draw with this one."
        )

    def require_resolution(self, resolution: int, configs: Configs) -> None:
        """Refuse a side that the model can't take."""
        if resolution % self.patch:
            nearest = max(self.patch, resolution // self.patch * self.patch)
            raise UserError(
                f"a side of {resolution} pixels does not divide into {self.title}'s patches of"
                f" {self.patch} pixels: give {nearest}, a multiple of {self.patch}."
            )
