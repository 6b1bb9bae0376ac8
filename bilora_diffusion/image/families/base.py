"""The interface of a family of image models: its parts, prompts, latents and forward call.

Everything else of a run - images, noise, methods, held-out loss, export - is shared. A kind is one
file here and one row in the table of this package.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...core.errors import UserError

STEPS = 25
"""Steps of the sampler by default."""
ATTENTION_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
"""Projections of attention, by diffusers' names."""
PROMPT_LAYERS = ("add_k_proj", "add_q_proj", "add_v_proj")
"""Those of the prompt's tokens, where these are attended to beside the image's."""
Conditions = dict[str, Any]
"""Inputs of a model beside the noisy latents, for n rows: tensors (n, ...), or lists of n
tensors where rows differ in length."""
Configs = Mapping[str, Mapping[str, Any]]
"""The configurations of denoiser and autoencoder, by the part."""


class Unconditional(Enum):
    """The place of guidance's unconditional prediction in a pipeline's calls of the denoiser."""

    FIRST_ROWS = "the first half of each batch's rows"
    LAST_ITEMS = "the last half of lists, which the denoiser joins so that rows are lost"
    SECOND_CALL = "every second call"
    NONE = "nowhere"


def split_rows(conditions: Conditions) -> list[Conditions]:
    """Each row by itself, on the CPU."""
    on_cpu = move(conditions, torch.device("cpu"), None)
    count = len(next(iter(on_cpu.values())))
    # A slice, not an index: a row keeps its dimension, or its list of one.
    return [{name: values[i : i + 1] for name, values in on_cpu.items()} for i in range(count)]


def join_rows(parts: Sequence[Conditions]) -> Conditions:
    """Rows one below the other."""
    joint: Conditions = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(first, Tensor):
            joint[name] = torch.cat(values)
        else:
            joint[name] = list(itertools.chain(*values))
    return joint


def move(conditions: Conditions, device: torch.device, dtype: torch.dtype | None) -> Conditions:
    """On a device, floating-point values in a dtype or as they are."""

    def move_tensor(value: Tensor) -> Tensor:
        return value.to(device, dtype if value.is_floating_point() else None)

    result: Conditions = {}
    for name, values in conditions.items():
        if isinstance(values, Tensor):
            result[name] = move_tensor(values)
        else:
            result[name] = [move_tensor(value) for value in values]
    return result


def pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (length, ...) as one tensor (n, longest, ...), zeros behind, and its mask of ones
    and zeros, (n, longest).
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded, (positions < lengths[:, None]).long()


def pad_if_needed(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """As `pad`, without a mask where nothing is padded: attention is faster so."""
    padded, mask = pad(sequences)
    is_padded = any(len(sequence) != len(sequences[0]) for sequence in sequences)
    return padded, mask.bool() if is_padded else None


def unpad(sequences: Tensor, mask: Tensor) -> list[Tensor]:
    """Of sequences (n, length, ...) the tokens that the mask (n, length) has, (count, ...) each."""
    return [row[mask_row.bool()] for row, mask_row in zip(sequences, mask, strict=True)]


def pack(latents: Tensor) -> Tensor:
    """Patches of 2 x 2 latents (n, c, h, w) as tokens, (n, h/2 w/2, 4 c)."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse, for latents of this height and width."""
    patches = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(patches, 2)


def latent_pixels(vae: Mapping[str, Any]) -> int:
    """Pixels a side of one latent, from an autoencoder's configuration."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


@dataclass(frozen=True)
class LatentSpace:
    """Encoding of images by an autoencoder, scaling for the denoiser, and the way back."""

    scale: float  # what centered latents are multiplied with
    mean: Tensor | None = None  # of each channel, (1, c, 1, 1), if the autoencoder has it
    std: Tensor | None = None  # likewise
    shift: float = 0.0  # of all channels
    samples_posterior: bool = True  # latents are samples of an image's Gaussian, else its mean

    @classmethod
    def from_config(cls, vae: Any, *, samples_posterior: bool = True) -> Self:
        """Read the scaling from the autoencoder's configuration."""

        def per_channel(name: str) -> Tensor | None:
            values = getattr(vae.config, name, None)
            return None if values is None else torch.tensor(values).view(1, -1, 1, 1)

        mean, std = per_channel("latents_mean"), per_channel("latents_std")
        if (mean is None) != (std is None):
            raise ValueError("its autoencoder has one of latents_mean and latents_std alone")
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = getattr(vae.config, "scaling_factor", None) or 1.0
        return cls(scale, mean, std, shift, samples_posterior)

    def encode(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser sees them, (n, c, h, w)."""
        if self.mean is None or self.std is None:
            return (latents - self.shift) * self.scale
        return (latents - self.mean.to(latents)) * self.scale / self.std.to(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder sees them, (n, c, h, w)."""
        if self.mean is None or self.std is None:
            return latents / self.scale + self.shift
        return latents * self.std.to(latents) / self.scale + self.mean.to(latents)

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images (n, 3, H, W), (n, c, h, w) each."""
        posterior = vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1] of latents as the autoencoder sees them."""
        return vae.decode(latents).sample


@dataclass(frozen=True)
class Activations:
    """What a training step holds beside weights, for ``--dry_run``: coefficients that were fitted
    to what a tracer of every tensor gave (results/dry_run_memory).

    Args:
        prompt_tokens: tokens of a prompt.
        checkpointed: numbers per token and unit of the model's width that each block keeps with
            gradient checkpointing.
        recomputed: numbers that one block holds beside these while it is computed again.
        block: numbers that each block keeps without gradient checkpointing.
    """

    prompt_tokens: int
    checkpointed: float
    recomputed: float
    block: float


@dataclass(frozen=True)
class ComfyUI:
    """How ComfyUI loads a family's models and samples from them; names are its nodes and files.

    Args:
        checkpoints: file of a model on the hub that has another name there.
        text_encoders: files; none where they are in the checkpoint.
        text_encoder_type: what their loader is given as type.
        text_encoders_by_size: other files, by a word in the checkpoint's name.
        autoencoder: file; None where it is in the checkpoint.
        latent_node: of the empty latent.
        shift_node: of the shift of noise levels; "" without one.
        scheduler: of the node KSampler.
        scheduler_node: in place of that.
        embeds_guidance: the model has an embedding of guidance and reads no negative prompt.
        unread_groups: groups of ``--lora_layers`` that it does not read whole.
        unread_layers: what it leaves out of them, for a sentence.
    """

    checkpoints: Mapping[str, str] = field(default_factory=dict)
    text_encoders: tuple[str, ...] = ()
    text_encoder_type: str = ""
    text_encoders_by_size: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    autoencoder: str | None = None
    latent_node: str = "EmptySD3LatentImage"
    shift_node: str = ""
    scheduler: str = "simple"
    scheduler_node: str = ""
    embeds_guidance: bool = False
    unread_groups: frozenset[str] = frozenset()
    unread_layers: str = ""


@dataclass(frozen=True)
class Family:
    """A kind of image model, with what a run may change about it."""

    title: ClassVar[str]
    pipeline: ClassVar[str]  # diffusers' class, as ``model_index.json`` has it
    # models of the README's table: name -> id on the hub
    examples: ClassVar[Mapping[str, str]] = {}
    tested_on: ClassVar[str] = "tiny weights"  # for that table
    parts: ClassVar[Mapping[str, str]] = {}  # its models and their classes
    optional: ClassVar[frozenset[str]] = frozenset()  # those that a pipeline may lack
    denoiser: ClassVar[str] = "transformer"  # trained; keys in adapters' files begin with its name
    # projections of attention, which get adapters by default
    targets: ClassVar[tuple[str, ...]] = ATTENTION_LAYERS
    feed_forward: ClassVar[tuple[str, ...]] = ("ff",)  # modules, with all their linear layers
    flow: ClassVar[bool] = True  # predicts a velocity along straight paths (``flow``)
    weighting: ClassVar[str] = "none"  # of noise levels, by default
    guidance: ClassVar[float] = 5.0  # of its images by default
    unconditional: ClassVar[Unconditional] = Unconditional.SECOND_CALL
    unguided: ClassVar[float] = 1.0  # up to this guidance there is no unconditional prediction
    reads_negative_prompt: ClassVar[bool] = True  # where there is one
    few_steps: ClassVar[int] = STEPS  # of the sampler, for its distilled models
    undistilled: ClassVar[str] = "the model that it was made from"
    patch: ClassVar[int] = 16  # pixels a side of the smallest patch, which divides the resolution
    side: ClassVar[int] = 1024  # pixels, where the configuration does not say
    activations: ClassVar[Activations]
    comfyui: ClassVar[ComfyUI | None] = None  # None: ComfyUI has no names for its layers

    max_sequence_length: int = 512  # tokens of a prompt, where the model leaves that open
    guidance_scale: float = 3.5  # that a model with a guidance embedding is told in training

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders among the parts."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Embeddings of prompts by the pipeline's own encoders, as and where they are now."""
        raise NotImplementedError

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], **options: Any) -> Any:
        """What the pipeline's own ``encode_prompt`` returns for prompts."""
        return pipeline.encode_prompt(
            list(prompts),  # a new list: some pipelines write into it
            device=pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
            **options,
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

    def latent_space(self, vae: Any) -> LatentSpace:
        """The latent space of the denoiser."""
        return LatentSpace.from_config(vae)

    def tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image of so many pixels."""
        return height // self.patch * (width // self.patch)

    def mu(self, pipeline: Any, tokens: int) -> float:
        """The logarithm of the shift of the noise levels for so many tokens, where it depends on
        them: linear between two numbers of tokens.
        """
        config = pipeline.scheduler.config
        fewest_tokens = config.get("base_image_seq_len", 256)
        most_tokens = config.get("max_image_seq_len", 4096)
        lowest, highest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (highest - lowest) * (tokens - fewest_tokens) / (most_tokens - fewest_tokens)
        return lowest + slope

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        """Arguments of the pipeline's call: the embedded prompts and the guidance; here of those
        that take a sequence, and perhaps one pooled vector, of each prompt.
        """
        names = {"sequence": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
        arguments: Conditions = {names[name]: values for name, values in positive.items()}
        for name, values in negative.items():
            arguments[f"negative_{names[name]}"] = values
        return {**arguments, "guidance_scale": guidance}

    def prepare_sampler(self, sampler: Any) -> None:
        """Give a pipeline that has denoiser and scheduler only what else its call reads."""

    def unpack_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents (n, c, h, w) of what the pipeline gives as ``output_type="latent"`` for images of
        so many pixels: these, or tokens of 2 x 2 of them.
        """
        return latents if latents.ndim == 4 else unpack(latents, height // 8, width // 8)

    def pixels(self, pipeline: Any) -> int:
        """Side of the images that a loaded pipeline was made for."""
        return self.side_of(self.configs(pipeline))

    def configs(self, pipeline: Any) -> Configs:
        """The configurations of a loaded pipeline's denoiser and autoencoder."""
        return {self.denoiser: self.model(pipeline).config, "vae": pipeline.vae.config}

    def side_of(self, configs: Configs) -> int:
        """The same from the configurations of denoiser and autoencoder."""
        side = configs[self.denoiser].get("sample_size")
        if not isinstance(side, int):
            return self.side
        return side * latent_pixels(configs["vae"])

    def model(self, pipeline: Any) -> Any:
        """The denoiser of a pipeline."""
        return getattr(pipeline, self.denoiser)

    def is_distilled(self, pipeline: Any) -> bool:
        """Test that a loaded model is distilled to a few steps without guidance."""
        return bool(pipeline.config.get("is_distilled", False))

    def usual_sampling(self, pipeline: Any) -> tuple[int, float]:
        """Steps and guidance of a loaded model's images by default."""
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
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
        return torch.bfloat16 if has_bf16 else torch.float32

    def is_guided(self, guidance: float, index: Mapping[str, Any], configs: Configs) -> bool:
        """Test that a model's pipeline makes an unconditional prediction at this guidance.

        Args:
            index: the pipeline's own configuration, as ``model_index.json`` has it.
            configs: of the parts.
        """
        return self.unconditional is not Unconditional.NONE and guidance > self.unguided

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
