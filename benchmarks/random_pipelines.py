"""Full-size pipelines with random weights, in memory: denoiser, autoencoder and scheduler.

They need neither the hub nor a disk. They have no text encoders: training embeds each prompt once,
beforehand, and `RandomPrompts` returns random embeddings of the right shape instead. Denoisers have
their published sizes (results/dry_run_memory/models.json).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.random_models import MODELS, TEXT_LENGTH, VAE, materialize, pooled_width
from bilora_diffusion import mini
from bilora_diffusion.core.seeds import generator
from bilora_diffusion.image.captions import PromptCache
from bilora_diffusion.image.families import family_class
from bilora_diffusion.image.families.base import Family
from bilora_diffusion.train.dry_run import empty

# Keys of a denoiser's configuration that hold the width of a prompt's embedding
PROMPT_WIDTHS = ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim")
# Configuration of the autoencoder of FLUX.1 and Z-Image
FLUX_VAE: dict[str, Any] = {
    **VAE,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# (function that builds a model, dtype) -> model, with or without weights
Maker = Callable[[Callable[[], Any], torch.dtype], Any]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that gpu_day.py measures."""

    title: str
    # Name in models.json of the model whose denoiser it has; "" for the miniature
    reference_model: str
    # Changes to that denoiser's configuration
    changes: Mapping[str, Any] = field(default_factory=dict)
    # Configurations of the autoencoder, and of a flow-matching model's scheduler
    vae: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    # Tokens per prompt
    prompt_tokens: int = 512
    # Whether the denoiser takes a list of prompt embeddings, whose lengths may differ
    has_lists: bool = False


SHAPES = {
    "mini": ModelShape("the miniature", "", prompt_tokens=32),
    "sdxl": ModelShape(
        "Stable Diffusion XL", "Stable Diffusion XL", vae=VAE, prompt_tokens=TEXT_LENGTH
    ),
    "flux1": ModelShape(
        "FLUX.1-dev",
        "FLUX.1-dev",
        vae=FLUX_VAE,
        scheduler={"shift": 3.0, "use_dynamic_shifting": True},
    ),
    # FLUX.2-klein-base-4B has 5 double and 20 single blocks of width 3,072. They read three hidden
    # states of Qwen3 4B, each of width 2,560.
    "flux2_klein_4b": ModelShape(
        "FLUX.2 klein 4B",
        "FLUX.2 klein 9B",
        changes={
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
        scheduler={"shift": 3.0, "use_dynamic_shifting": True},
    ),
    "flux2_klein_9b": ModelShape(
        "FLUX.2 klein 9B",
        "FLUX.2 klein 9B",
        scheduler={"shift": 3.0, "use_dynamic_shifting": True},
    ),
    "z_image": ModelShape(
        "Z-Image",
        "Z-Image",
        vae=FLUX_VAE,
        scheduler={"shift": 6.0},
        prompt_tokens=64,
        has_lists=True,
    ),
    "qwen_image": ModelShape(
        "Qwen-Image",
        "Qwen-Image",
        scheduler={"use_dynamic_shifting": True, "max_image_seq_len": 8192, "max_shift": 0.9},
        prompt_tokens=64,
        has_lists=True,
    ),
}


def family_of_shape(name: str) -> Family:
    """Return the family of a model in `SHAPES`."""
    reference_model = SHAPES[name].reference_model
    pipeline = (
        MODELS[reference_model]["pipeline"] if reference_model else "StableDiffusionXLPipeline"
    )
    return family_class(pipeline, name)()


def with_weights(device: torch.device, seed: int = 0) -> Maker:
    """Return a function that creates models with random weights on a device."""

    def make(build: Callable[[], Any], dtype: torch.dtype) -> Any:
        model = materialize(build, dtype=dtype, device=device, seed=seed)
        return model.requires_grad_(False).eval()

    return make


def build_pipeline(name: str, make: Maker = empty, **changes: Any) -> Any:
    """Build a diffusers pipeline without text encoders.

    The denoiser is in bfloat16, the autoencoder in float32.

    Args:
        name: Key of `SHAPES`.
        make: Function that creates denoiser and autoencoder; by default without weights.
        changes: Changes to the denoiser's configuration.
    """
    shape = SHAPES[name]
    family = family_of_shape(name)
    denoiser_class: Any = getattr(diffusers, family.parts[family.denoiser])
    vae_class: Any = getattr(diffusers, family.parts["vae"])
    if shape.reference_model:
        _, reference_config = MODELS[shape.reference_model]["denoiser"]
        denoiser_config = {**reference_config, **shape.changes, **changes}
        vae_config: Mapping[str, Any] = shape.vae
    else:
        denoiser_config = _mini_config(denoiser_class, family.denoiser) | changes
        vae_config = _mini_config(vae_class, "vae")
    if family.flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shape.scheduler)
    else:
        scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(
            mini.pipeline_dir(), subfolder="scheduler"
        )
    parts = {
        family.denoiser: make(partial(denoiser_class, **denoiser_config), torch.bfloat16),
        "vae": make(partial(vae_class, **vae_config), torch.float32),
        "scheduler": scheduler,
    }
    pipeline_class: Any = getattr(diffusers, family.pipeline)
    for part, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if part != "self" and parameter.default is inspect.Parameter.empty:
            parts.setdefault(part, None)  # encoders and tokenizers
    pipeline = pipeline_class(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _mini_config(model_class: Any, part: str) -> dict[str, Any]:
    """Return the configuration of one of the miniature's models, as arguments of its class."""
    config = dict(model_class.load_config(mini.pipeline_dir(), subfolder=part))
    arguments = inspect.signature(model_class.__init__).parameters
    return {key: value for key, value in config.items() if key in arguments}


def write_outline(pipeline: Any, folder: Path) -> None:
    """Write the files of a pipeline that are read to check a run's options, without weights."""
    name = type(pipeline).__name__
    family = family_class(name, name)()
    index: dict[str, Any] = {"_class_name": name}
    for part, kind in family.parts.items():
        (folder / part).mkdir(parents=True)
        index[part] = ["diffusers", kind]
        if part in family.encoders:
            tokenizer = part.replace("text_encoder", "tokenizer")
            (folder / tokenizer).mkdir()
            index[tokenizer] = ["transformers", "PreTrainedTokenizerFast"]
    for part in (family.denoiser, "vae", "scheduler"):
        getattr(pipeline, part).save_config(folder / part)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


class RandomPrompts(PromptCache):
    """Random embeddings of prompts, in the shapes that a denoiser reads.

    Args:
        name: Key of `SHAPES`.
        pipeline: Pipeline of this model.
        device: Device of the run.
    """

    def __init__(self, name: str, pipeline: Any, device: torch.device) -> None:
        super().__init__(pipeline, device)
        self._shape = SHAPES[name]
        config = self.family.model(pipeline).config
        self._width = next(config[key] for key in PROMPT_WIDTHS if config.get(key))
        self._pooled_width = config.get("pooled_projection_dim")
        if not self.family.flow:
            self._pooled_width = pooled_width(config)

    def add(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt in self._embeddings:
                continue
            random = generator(0, "prompt", prompt)

            def normal(*size: int, random: torch.Generator = random) -> Tensor:
                return torch.randn(size, generator=random).bfloat16()

            sequence = normal(self._shape.prompt_tokens, self._width)
            row: dict[str, Any] = {"sequence": sequence[None]}
            if self._shape.has_lists:
                row["sequence"] = [sequence]
            if self._pooled_width:
                row["pooled"] = normal(1, self._pooled_width)
            self._embeddings[prompt] = row
