"""The interface of a family of image models: its parts, prompts, latents and forward call.

All families share everything else: images, noise, training methods, held-out loss and export. A
family is one file in this folder and one row of the table in ``__init__.py``.
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

STEPS = 25  # default number of sampling steps
# Attention projections, by diffusers' names.
ATTENTION_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
# Attention projections of the prompt tokens, in models that have separate ones.
PROMPT_LAYERS = ("add_k_proj", "add_q_proj", "add_v_proj")
# Configurations of the denoiser and the autoencoder, by the part's name.
Configs = Mapping[str, Mapping[str, Any]]


class Unconditional(Enum):
    """Where a pipeline computes the unconditional prediction of classifier-free guidance."""

    FIRST_ROWS = "the first half of each batch's rows"
    # The denoiser joins the items for some layers, which do not see one row for each item.
    LAST_ITEMS = "the second half of the lists of images and prompts"
    SECOND_CALL = "every second call"
    NONE = "nowhere"


def mu_of(tokens: int, config: Mapping[str, Any]) -> float:
    """Return mu, the logarithm of the noise-level shift; mu is linear in the number of tokens.

    Entries that ``config`` lacks have FLUX.1's values:
    https://github.com/black-forest-labs/flux/blob/main/src/flux/sampling.py
    """
    few_tokens = config.get("base_image_seq_len", 256)
    many_tokens = config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few_tokens) / (many_tokens - few_tokens)


def latent_pixels(vae: Mapping[str, Any]) -> int:
    """Return the number of pixels per latent along a side, from an autoencoder's configuration."""
    _, levels = read_entry(vae, ("block_out_channels", "dim_mult"), "the autoencoder")
    # Each level except the last one halves the sides.
    return 2 ** (len(levels) - 1)


def autoencoder_width(vae: Mapping[str, Any]) -> int:
    """Return the number of channels of an autoencoder's outermost layer, from its configuration."""
    name, value = read_entry(vae, ("base_dim", "block_out_channels"), "the autoencoder")
    return value[0] if name == "block_out_channels" else value


def read_entry(config: Mapping[str, Any], names: Sequence[str], model: str) -> tuple[str, Any]:
    """Return the name and value of the first of these entries that a configuration has.

    Args:
        config: the configuration of a model.
        names: names of entries that mean the same in different model classes.
        model: name of the model, for the error message.

    Raises:
        UserError: the configuration has none of the entries.
    """
    for name in names:
        if config.get(name):
            return name, config[name]
    raise UserError(
        f"the configuration of {model} has none of {', '.join(names)}: give another model, or"
        " add the name of its entry to bilora_diffusion/image/families/base.py."
    )


@dataclass(frozen=True)
class LatentSpace:
    """Conversion between images, an autoencoder's latents and the denoiser's scaled latents."""

    scale: float  # factor of the centered latents
    mean: Tensor | None = None  # per channel, (1, c, 1, 1); None if the autoencoder has none
    std: Tensor | None = None  # per channel, (1, c, 1, 1); None if the autoencoder has none
    shift: float = 0.0  # subtracted from all channels if there is no mean
    # Whether latents are sampled from the encoder's Gaussian; otherwise they are its mean.
    samples_posterior: bool = True

    @classmethod
    def from_config(cls, vae: Any, *, samples_posterior: bool = True) -> Self:
        """Build the latent space from the scaling in the autoencoder's configuration."""

        def per_channel(name: str) -> Tensor | None:
            values = getattr(vae.config, name, None)
            if values is None:
                return None
            return torch.tensor(values).view(1, -1, 1, 1)

        mean = per_channel("latents_mean")
        std = per_channel("latents_std")
        if (mean is None) != (std is None):
            raise UserError(
                "The autoencoder's config.json has only one of latents_mean and latents_std:"
                " download the model again, or give another one."
            )
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = getattr(vae.config, "scaling_factor", None) or 1.0
        return cls(scale, mean, std, shift, samples_posterior)

    def encode(self, latents: Tensor) -> Tensor:
        """Convert the autoencoder's latents, (n, c, h, w), to the denoiser's scale."""
        if self.mean is None or self.std is None:
            return (latents - self.shift) * self.scale
        return (latents - self.mean.to(latents)) * self.scale / self.std.to(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Convert the denoiser's latents, (n, c, h, w), to the autoencoder's scale."""
        if self.mean is None or self.std is None:
            return latents / self.scale + self.shift
        return latents * self.std.to(latents) / self.scale + self.mean.to(latents)

    def distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (n, c, h, w) each, of the latents of images.

        Args:
            pixels: images in [-1, 1], (n, 3, H, W).
        """
        posterior = vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def decode_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode latents in the autoencoder's scale to images (n, 3, H, W) in [-1, 1]."""
        return vae.decode(latents).sample


@dataclass(frozen=True)
class Activations:
    """Coefficients of the activation memory of a training step, for ``--dry_run``.

    Those after ``prompt_tokens`` count stored values per token and unit of the denoiser's width.
    They were fitted to the tensors of traced training steps (results/dry_run_memory).
    """

    prompt_tokens: int  # tokens of a prompt, added to the tokens of each image
    checkpointed: float  # for each block, with gradient checkpointing
    recomputed: float  # with gradient checkpointing, once, for the block that is recomputed
    block: float  # for each block, without gradient checkpointing


@dataclass(frozen=True)
class ComfyUI:
    """Names of ComfyUI's nodes and of files, without ".safetensors", for a family of models."""

    checkpoints: Mapping[str, str] = field(default_factory=dict)  # file name by hub id
    text_encoders: tuple[str, ...] = ()  # file names; () if the checkpoint includes them
    text_encoder_type: str = ""  # input "type" of their loader; "" for none
    # Text encoder files of checkpoints whose name contains a word, by that word.
    text_encoders_by_size: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    autoencoder: str | None = None  # file name; None if the checkpoint includes it
    latent_node: str = "EmptySD3LatentImage"
    shift_node: str = ""  # node that shifts the noise levels; "" for no shift
    scheduler: str = "simple"  # input of the node KSampler
    scheduler_node: str = ""  # node that replaces KSampler's scheduler; "" for none
    embeds_guidance: bool = False  # the model has a guidance embedding and no negative prompt
    # Groups of --lora_layers that ComfyUI reads only in part.
    unread_groups: frozenset[str] = frozenset()
    unread_layers: str = ""  # layers of these groups that ComfyUI does not read, for a message


@dataclass(frozen=True)
class Family:
    """A family of image models. Its instance fields are the settings that a run can change."""

    title: ClassVar[str]
    pipeline: ClassVar[str]  # diffusers' class name, as in ``model_index.json``
    examples: ClassVar[Mapping[str, str]] = {}  # name -> hub id, for tables of models
    tested_on: ClassVar[str] = "tiny weights"  # cell of the same tables
    parts: ClassVar[Mapping[str, str]] = {}  # name -> class of the part
    # Parts and tokenizers that a pipeline may lack.
    optional: ClassVar[frozenset[str]] = frozenset()
    # Name of the denoiser among the parts; its keys in LoRA files for diffusers begin with it.
    denoiser: ClassVar[str] = "transformer"
    # Layers that get adapters by default.
    targets: ClassVar[tuple[str, ...]] = ATTENTION_LAYERS
    # Modules whose linear layers are the feed-forward layers.
    feed_forward: ClassVar[tuple[str, ...]] = ("ff",)
    flow: ClassVar[bool] = True  # whether its models use `FlowMatching`
    weighting: ClassVar[str] = "none"  # default of --weighting_scheme
    default_guidance: ClassVar[float] = 5.0  # default guidance scale for sampling
    unconditional: ClassVar[Unconditional] = Unconditional.SECOND_CALL
    unguided_scale: ClassVar[float] = 1.0  # largest scale without an unconditional prediction
    reads_negative_prompt: ClassVar[bool] = True  # for the unconditional prediction
    few_steps: ClassVar[int] = STEPS  # default number of sampling steps of distilled models
    # The model to train instead of a distilled one, as a message names it.
    undistilled_model: ClassVar[str] = "the model it was distilled from"
    patch: ClassVar[int] = 16  # pixels; the resolution must be a multiple of it
    side: ClassVar[int] = 1024  # default resolution in pixels, if the configuration has none
    activations: ClassVar[Activations]
    comfyui: ClassVar[ComfyUI | None] = None  # None if ComfyUI has no names for the layers

    max_sequence_length: int = 512  # maximum number of prompt tokens
    guidance_scale: float = 3.5  # in training, for models with a guidance embedding

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders among the parts."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """Embed prompts with the text encoders and their adapters, on the encoders' device."""
        raise NotImplementedError

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], **options: Any) -> Any:
        """Call the pipeline's ``encode_prompt`` with the family's prompt length."""
        return pipeline.encode_prompt(
            list(prompts),  # a new list: some pipelines write into it
            device=pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
            **options,
        )

    def negative(self, pipeline: Any, empty: Conditions) -> Conditions:
        """Return the embeddings of the default negative prompt, given those of empty prompts."""
        return empty

    def predict(
        self, model: nn.Module, noisy: Tensor, levels: Tensor, conditions: Conditions
    ) -> Tensor:
        """Return the model's prediction, (n, c, h, w).

        A flow model predicts the velocity, noise minus image.

        Args:
            model: the denoiser.
            noisy: latents in the model's dtype, (n, c, h, w).
            levels: noise levels, (n,): sigma in [0, 1] for a flow model, otherwise the timestep.
            conditions: the model's other inputs, for n rows, on the model's device.
        """
        raise NotImplementedError

    def latent_space(self, vae: Any) -> LatentSpace:
        """Return the denoiser's latent space."""
        return LatentSpace.from_config(vae)

    def tokens(self, height: int, width: int) -> int:
        """Return the number of tokens of an image; height and width are in pixels."""
        return height // self.patch * (width // self.patch)

    def mu(self, pipeline: Any, tokens: int) -> float:
        """Return the logarithm of the sampling shift, which can depend on the number of tokens."""
        return mu_of(tokens, pipeline.scheduler.config)

    def training_shift(self, tokens: int) -> float | None:
        """Return the shift s of the training levels s t / (1 + (s - 1) t).

        None if training uses the sampling shift.
        """
        return None

    def sampling(self, positive: Conditions, negative: Conditions, guidance: float) -> Conditions:
        """Return the arguments of the pipeline's call for embedded prompts and a guidance scale.

        This default is for pipelines that take a sequence and, optionally, a pooled vector for
        each prompt.
        """
        names = {"sequence": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
        arguments: Conditions = {names[name]: values for name, values in positive.items()}
        for name, values in negative.items():
            arguments[f"negative_{names[name]}"] = values
        return {**arguments, "guidance_scale": guidance}

    def prepare_sampler(self, sampler: Any) -> None:
        """Add attributes that a pipeline without encoders and autoencoder needs for a call."""

    def unpack_output(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Convert a pipeline's output of type "latent" to latents, (n, c, h, w).

        Args:
            latents: latents, or tokens that are patches of 2 x 2 latents.
            height, width: size of the images in pixels.
        """
        if latents.ndim == 4:
            return latents
        return unpack(latents, 2 * (height // self.patch), 2 * (width // self.patch))

    def native_side(self, pipeline: Any) -> int:
        """Return the resolution in pixels that a loaded pipeline was trained on."""
        return self.side_of(self.configs(pipeline))

    def configs(self, pipeline: Any) -> Configs:
        """Return the configurations of a loaded pipeline's denoiser and autoencoder."""
        return {self.denoiser: self.model(pipeline).config, "vae": pipeline.vae.config}

    def side_of(self, configs: Configs) -> int:
        """Return the resolution in pixels that a model was trained on, from its configurations."""
        side = configs[self.denoiser].get("sample_size")
        if not isinstance(side, int):
            return self.side
        return side * latent_pixels(configs["vae"])

    def width(self, config: Mapping[str, Any]) -> int:
        """Return the width of the denoiser's tokens, from the denoiser's configuration."""
        names = ("dim", "hidden_size", "num_attention_heads")
        name, value = read_entry(config, names, f"this {self.title}'s denoiser")
        if name == "num_attention_heads":
            return value * config["attention_head_dim"]
        return value

    def model(self, pipeline: Any) -> Any:
        """Return a pipeline's denoiser."""
        return getattr(pipeline, self.denoiser)

    def is_distilled(self, pipeline: Any) -> bool:
        """Return whether a model is known to be distilled to a few steps without guidance."""
        return bool(pipeline.config.get("is_distilled", False))

    def usual_sampling(self, pipeline: Any) -> tuple[int, float]:
        """Return the default number of sampling steps and guidance scale of a loaded model."""
        if self.is_distilled(pipeline):
            return self.few_steps, 0.0
        return STEPS, self.default_guidance

    def precision(self, device: torch.device) -> torch.dtype:
        """Return the default dtype for sampling on a device: 16 bits on a GPU, fp32 on a CPU.

        Flow models need bf16, since fp16's range is too small; on a GPU without bf16 they get fp32.
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
        """Return whether a pipeline makes an unconditional prediction at this guidance scale.

        Args:
            index: the pipeline's configuration, as in ``model_index.json``.
        """
        return self.unconditional is not Unconditional.NONE and guidance > self.unguided_scale

    def embeds_guidance(self, configs: Configs) -> bool:
        """Return whether a model has a guidance embedding, which needs a scale in training."""
        return False

    def remark(self, name: str, pipeline: Any) -> str | None:
        """Return a warning to print before a model is trained, as one sentence, or None.

        Args:
            name: name of the model, as the user gave it.
        """
        if not self.is_distilled(pipeline):
            return None
        return (
            f'"{name}" is distilled to a few steps without guidance, and training undoes that:'
            f" train on {self.undistilled_model} and sample with this model, or give"
            " --assistant_lora a training adapter for this model."
        )

    def require_resolution(self, resolution: int, configs: Configs) -> None:
        """Raise UserError if the model does not support a resolution in pixels."""
        if resolution % self.patch:
            nearest = max(self.patch, resolution // self.patch * self.patch)
            raise UserError(
                f"a side of {resolution} pixels is not a multiple of {self.title}'s patch size of"
                f" {self.patch} pixels: give {nearest}."
            )
