"""The interface of a family of image models: its parts, prompts, latents and forward call.

Images, noise, methods, held-out loss and export are the same for all families. A family is one file
here and one row in the table of this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from .tensors import Conditions, unpack

STEPS = 25  # default of the sampler
# Projections of attention, by diffusers' names.
ATTENTION_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
# Projections of the prompt's tokens, in models that have separate ones.
PROMPT_LAYERS = ("add_k_proj", "add_q_proj", "add_v_proj")
# Configurations of denoiser and autoencoder, by the part's name.
Configs = Mapping[str, Mapping[str, Any]]


class Unconditional(Enum):
    """Where a pipeline computes guidance's unconditional prediction."""

    FIRST_ROWS = "the first half of each batch's rows"
    LAST_ITEMS = "the second half of lists, which the denoiser joins, so that rows are lost"
    SECOND_CALL = "every second call"
    NONE = "nowhere"


def mu_of(tokens: int, config: Mapping[str, Any]) -> float:
    """Logarithm of the shift, linear in the number of tokens; for {} with FLUX.1's values.

    https://github.com/black-forest-labs/flux/blob/main/src/flux/sampling.py
    """
    few_tokens = config.get("base_image_seq_len", 256)
    many_tokens = config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few_tokens) / (many_tokens - few_tokens)


def latent_pixels(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along a side, from an autoencoder's configuration."""
    _, levels = read_entry(vae, ("block_out_channels", "dim_mult"), "its autoencoder")
    # Each level but the last halves the sides.
    return 2 ** (len(levels) - 1)


def autoencoder_width(vae: Mapping[str, Any]) -> int:
    """Channels of an autoencoder's outermost layer, from its configuration."""
    name, value = read_entry(vae, ("base_dim", "block_out_channels"), "its autoencoder")
    return value[0] if name == "block_out_channels" else value


def read_entry(config: Mapping[str, Any], names: Sequence[str], model: str) -> tuple[str, Any]:
    """Name and value of the first of these entries that a model's configuration has.

    Args:
        config: the configuration.
        names: of entries with the same meaning in different classes of models.
        model: what the configuration belongs to, for the message.

    Raises:
        UserError: it has none of them.
    """
    for name in names:
        if config.get(name):
            return name, config[name]
    raise UserError(
        f"the configuration of {model} has none of {', '.join(names)}: give another model, or"
        " extend the reader of the entry in bilora_diffusion/image/families."
    )


@dataclass(frozen=True)
class LatentSpace:
    """Encoding and decoding with an autoencoder, and the denoiser's scale of latents."""

    scale: float  # factor of centered latents
    mean: Tensor | None = None  # of each channel, (1, c, 1, 1), if the autoencoder has it
    std: Tensor | None = None  # of each channel, (1, c, 1, 1), if the autoencoder has it
    shift: float = 0.0  # of all channels
    # Latents are sampled from an image's Gaussian; else they are its mean.
    samples_posterior: bool = True

    @classmethod
    def from_config(cls, vae: Any, *, samples_posterior: bool = True) -> Self:
        """Read the scaling from the autoencoder's configuration."""

        def per_channel(name: str) -> Tensor | None:
            values = getattr(vae.config, name, None)
            if values is None:
                return None
            return torch.tensor(values).view(1, -1, 1, 1)

        mean = per_channel("latents_mean")
        std = per_channel("latents_std")
        if (mean is None) != (std is None):
            raise ValueError("its autoencoder has one of latents_mean and latents_std alone")
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = getattr(vae.config, "scaling_factor", None) or 1.0
        return cls(scale, mean, std, shift, samples_posterior)

    def encode(self, latents: Tensor) -> Tensor:
        """Convert latents of the autoencoder, (n, c, h, w), to the denoiser's scale."""
        if self.mean is None or self.std is None:
            return (latents - self.shift) * self.scale
        return (latents - self.mean.to(latents)) * self.scale / self.std.to(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Convert latents of the denoiser, (n, c, h, w), to the autoencoder's scale."""
        if self.mean is None or self.std is None:
            return latents / self.scale + self.shift
        return latents * self.std.to(latents) / self.scale + self.mean.to(latents)

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images (n, 3, H, W), (n, c, h, w) each."""
        posterior = vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def decode_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode latents in the autoencoder's scale to images (n, 3, H, W) in [-1, 1]."""
        return vae.decode(latents).sample


@dataclass(frozen=True)
class Activations:
    """Memory of a training step's activations, for ``--dry_run``.

    The coefficients, fitted to the tensors of traced steps (results/dry_run_memory), are numbers
    per token and unit of the model's width.
    """

    prompt_tokens: int
    checkpointed: float  # for each block, with gradient checkpointing
    recomputed: float  # in addition, for the block that is computed again
    block: float  # for each block, without gradient checkpointing


@dataclass(frozen=True)
class ComfyUI:
    """ComfyUI's nodes and files for a family of models."""

    checkpoints: Mapping[str, str] = field(default_factory=dict)  # file, by the id on the hub
    text_encoders: tuple[str, ...] = ()  # files; () if the checkpoint includes them
    text_encoder_type: str = ""  # for their loader
    # Files for checkpoints whose name contains a word, by the word.
    text_encoders_by_size: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    autoencoder: str | None = None  # file; None if the checkpoint includes it
    latent_node: str = "EmptySD3LatentImage"
    shift_node: str = ""  # shifts the noise levels; "" without a shift
    scheduler: str = "simple"  # of the node KSampler
    scheduler_node: str = ""  # instead of KSampler's scheduler
    embeds_guidance: bool = False  # the model has an embedding of guidance, no negative prompt
    # Groups of --lora_layers that it reads only in part
    unread_groups: frozenset[str] = frozenset()
    unread_layers: str = ""  # the layers of these groups that it does not read, for a message


@dataclass(frozen=True)
class Family:
    """A family of image models. Fields are the settings that a run can change."""

    title: ClassVar[str]
    pipeline: ClassVar[str]  # diffusers' class, as in ``model_index.json``
    examples: ClassVar[Mapping[str, str]] = {}  # for the tables of models: name -> id on the hub
    tested_on: ClassVar[str] = "tiny weights"  # for these tables
    parts: ClassVar[Mapping[str, str]] = {}  # name -> class of its models
    optional: ClassVar[frozenset[str]] = frozenset()  # parts that a pipeline may lack
    # The trained model; keys in LoRA files begin with its name.
    denoiser: ClassVar[str] = "transformer"
    # Projections of attention, which get adapters by default.
    targets: ClassVar[tuple[str, ...]] = ATTENTION_LAYERS
    # Modules whose linear layers are the feed-forward layers.
    feed_forward: ClassVar[tuple[str, ...]] = ("ff",)
    flow: ClassVar[bool] = True  # predicts a velocity (`noise_schedules.FlowMatching`)
    weighting: ClassVar[str] = "none"  # default of --weighting_scheme
    default_guidance: ClassVar[float] = 5.0  # default guidance scale of images
    unconditional: ClassVar[Unconditional] = Unconditional.SECOND_CALL
    unguided_scale: ClassVar[float] = 1.0  # the largest scale without unconditional prediction
    reads_negative_prompt: ClassVar[bool] = True  # used in the unconditional prediction
    few_steps: ClassVar[int] = STEPS  # default number of steps of distilled models
    # The model to train in place of a distilled one, for a message
    undistilled_model: ClassVar[str] = "the model that it was made from"
    patch: ClassVar[int] = 16  # pixels; the resolution is a multiple of it
    side: ClassVar[int] = 1024  # default resolution in pixels, if the configuration has none
    activations: ClassVar[Activations]
    comfyui: ClassVar[ComfyUI | None] = None  # None: ComfyUI has no names for its layers

    max_sequence_length: int = 512  # tokens of a prompt that are read
    guidance_scale: float = 3.5  # for models with a guidance embedding, in training

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders among the parts."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Embed prompts with the pipeline's encoders and their adapters, on their device."""
        raise NotImplementedError

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], **options: Any) -> Any:
        """Call the pipeline's ``encode_prompt``."""
        return pipeline.encode_prompt(
            list(prompts),  # a new list: some pipelines write into it
            device=pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
            **options,
        )

    def negative(self, pipeline: Any, empty: Conditions) -> Conditions:
        """Embeddings of the default negative prompt, from those of empty prompts."""
        return empty

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        """Predict, (n, c, h, w): a flow model predicts the velocity, noise minus image.

        Args:
            model: the denoiser.
            noisy: latents in the model's dtype, (n, c, h, w).
            levels: (n,); sigma in [0, 1] for a flow model, else the timestep.
            conditions: conditions of the n rows, on the model's device.
        """
        raise NotImplementedError

    def latent_space(self, vae: Any) -> LatentSpace:
        """The latent space of the denoiser."""
        return LatentSpace.from_config(vae)

    def tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image; height and width are in pixels."""
        return height // self.patch * (width // self.patch)

    def mu(self, pipeline: Any, tokens: int) -> float:
        """Logarithm of the shift in sampling, if it depends on the number of tokens."""
        return mu_of(tokens, pipeline.scheduler.config)

    def training_shift(self, tokens: int) -> float | None:
        """The shift s in training, of levels s t / (1 + (s - 1) t); None: as in sampling."""
        return None

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        """Arguments of the pipeline's call for embedded prompts and a guidance scale.

        The default is for pipelines that take a sequence for each prompt, and optionally a pooled
        vector.
        """
        names = {"sequence": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
        arguments: Conditions = {names[name]: values for name, values in positive.items()}
        for name, values in negative.items():
            arguments[f"negative_{names[name]}"] = values
        return {**arguments, "guidance_scale": guidance}

    def prepare_sampler(self, sampler: Any) -> None:
        """Add what the call of a pipeline with only denoiser and scheduler needs."""

    def unpack_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Convert a pipeline's output of the type "latent" to latents (n, c, h, w).

        Args:
            latents: latents, or tokens of 2 x 2 latents.
            height, width: size of the images in pixels.
        """
        if latents.ndim == 4:
            return latents
        # A token is a patch of 2 x 2 latents.
        return unpack(latents, 2 * (height // self.patch), 2 * (width // self.patch))

    def native_side(self, pipeline: Any) -> int:
        """Resolution in pixels that a loaded pipeline was trained on."""
        return self.side_of(self.configs(pipeline))

    def configs(self, pipeline: Any) -> Configs:
        """The configurations of a loaded pipeline's denoiser and autoencoder."""
        return {self.denoiser: self.model(pipeline).config, "vae": pipeline.vae.config}

    def side_of(self, configs: Configs) -> int:
        """Resolution in pixels that a model was trained on, from its configurations."""
        side = configs[self.denoiser].get("sample_size")
        if not isinstance(side, int):
            return self.side
        return side * latent_pixels(configs["vae"])

    def width(self, config: Mapping[str, Any]) -> int:
        """Width of the denoiser's tokens, from its configuration."""
        names = ("dim", "hidden_size", "num_attention_heads")
        name, value = read_entry(config, names, f"this {self.title}'s denoiser")
        if name == "num_attention_heads":
            return value * config["attention_head_dim"]
        return value

    def model(self, pipeline: Any) -> Any:
        """The denoiser of a pipeline."""
        return getattr(pipeline, self.denoiser)

    def is_distilled(self, pipeline: Any) -> bool:
        """Test that a loaded model is distilled to a few steps without guidance."""
        return bool(pipeline.config.get("is_distilled", False))

    def usual_sampling(self, pipeline: Any) -> tuple[int, float]:
        """Default number of steps and guidance scale of a loaded model's images."""
        if self.is_distilled(pipeline):
            return self.few_steps, 0.0
        return STEPS, self.default_guidance

    def precision(self, device: torch.device) -> torch.dtype:
        """Default dtype of sampling on a device: 16 bits on a GPU, fp32 on a CPU.

        Flow models need bf16, since fp16's range is too small.
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
        """Test that a model's pipeline makes an unconditional prediction at this guidance scale.

        Args:
            index: the pipeline's configuration, as in ``model_index.json``.
        """
        return self.unconditional is not Unconditional.NONE and guidance > self.unguided_scale

    def embeds_guidance(self, configs: Configs) -> bool:
        """Test that a model has a guidance embedding, so that training must give a scale."""
        return False

    def remark(self, name: str, pipeline: Any) -> str | None:
        """A warning about a model before it is trained, as one sentence, or None.

        Args:
            name: name of the model, as the user gave it.
        """
        if not self.is_distilled(pipeline):
            return None
        return (
            f'"{name}" is distilled to a few steps without guidance, which training undoes: train'
            f" on {self.undistilled_model}, and sample with this one, or give --assistant_lora a"
            " training adapter for it."
        )

    def require_resolution(self, resolution: int, configs: Configs) -> None:
        """Refuse a resolution in pixels that the model does not support."""
        if resolution % self.patch:
            nearest = max(self.patch, resolution // self.patch * self.patch)
            raise UserError(
                f"a side of {resolution} pixels does not divide into {self.title}'s patches of"
                f" {self.patch} pixels: give {nearest}, a multiple of {self.patch}."
            )
