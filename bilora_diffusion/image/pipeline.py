"""Load a pipeline of a supported family, select the layers to adapt, and estimate the memory.

A pipeline with missing weights is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from ..adapters import adaptable
from ..adapters.access import is_within
from ..adapters.quantize import held_bytes
from ..core.errors import UserError, did_you_mean, read_or_refuse
from ..core.values import (
    ALL_LAYERS,
    ALL_LINEAR,
    ATTENTION,
    CONVOLUTIONS,
    FEED_FORWARD,
    LAYER_GROUPS,
)
from ..mini import PIPELINES
from ..train.dry_run import BEFORE, NUMBER_BYTES, STEP, PhaseMemory, empty
from ..train.soundness import require_safetensors, require_whole, require_words
from .base_model import ANOTHER, folder_of, from_hub, read_base_model
from .config import DreamBoothConfig
from .crops import bucket_sizes
from .families.base import Family, autoencoder_width
from .latents import AT_ONCE
from .likeness import image_model_bytes

WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations and tokenizers
# One dtype for all parts, or dtypes by the part's name, with "default" for the other parts.
Dtypes = torch.dtype | dict[str, torch.dtype]
FLAG = "--lora_layers"
# Memory that an fp32 autoencoder takes for encoding and for decoding, in bytes per pixel and per
# channel of its outermost layer.
ENCODED_BYTES, DECODED_BYTES = 20, 24


@dataclass(frozen=True)
class Origin:
    """The files that a pipeline comes from."""

    folder: Path
    # Functions that load the weights of deferred parts, by the part's name.
    loaders: dict[str, Callable[[], Any]] = field(default_factory=dict)


def resolve(name: str) -> str:
    """Return the folder or hub id of a model, which may be an embedded one (`mini.PIPELINES`)."""
    if name in PIPELINES:
        return str(PIPELINES[name]())
    return name


def load_pipeline(
    name: str,
    *,
    dtype: Dtypes,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    vae: str | None = None,
    weights: bool = True,
    deferred_parts: Collection[str] = (),
) -> Any:
    """Load a pipeline with its autoencoder in float32 and everything else in ``dtype``.

    Args:
        name: folder, hub id, or one of `mini.PIPELINES`.
        vae: another autoencoder (``--pretrained_vae_model_name_or_path``).
        weights: False to build the models without weights (`dry_run.empty`), for which only
            configurations and tokenizers are downloaded.
        deferred_parts: parts to load without weights. The functions in `Origin.loaders` load the
            weights when they are needed.

    Returns:
        The pipeline. Its attribute ``origin`` is its `Origin`.

    Raises:
        UserError: there is no such model, a file can't be read, weights are pickles, incomplete or
            not of the variant, or a tokenizer has no words.
    """
    model = read_base_model(name, revision, cache_dir)
    family = model.family
    folder = folder_of(name)
    if folder is None:
        unused_parts = {"vae"} if vae else set[str]()
        folder = download(
            name, revision, variant, cache_dir, unused_parts=unused_parts, weights=weights
        )
    if weights and name not in PIPELINES and variant and not any(folder.glob(f"*/*.{variant}.*")):
        raise UserError(
            f'--variant "{variant}" is not among the files of "{name}": {ANOTHER}, or drop it.'
        )

    # Optional parts that the pipeline lacks, such as SD3's T5, are null or [null, null].
    absent = [part for part in family.optional if (model.index.get(part) or [None])[0] is None]
    load = partial(load_part, weights=weights)
    origin = Origin(folder)
    parts: dict[str, Any] = {}
    for part, kind in family.parts.items():
        if part in absent:
            continue
        options: dict[str, Any] = {"dtype": _dtype_of(part, dtype)}
        if part == "vae" and vae:
            label = f'the autoencoder "{vae}"'
            place = vae
            fix = f"give the folder or hub id of a {kind}"
            options["cache_dir"] = cache_dir
        else:
            label = part_label(part, name)
            place = folder
            fix = f"download it again, or {ANOTHER}"
            options["subfolder"] = part
            # A part without files of the variant is loaded from its default files.
            if variant and any((folder / part).glob(f"*.{variant}.*")):
                options["variant"] = variant
        loader = getattr(diffusers, kind, None) or getattr(transformers, kind)
        read = partial(load, label, loader, place, fix, **options)
        if part in deferred_parts:
            origin.loaders[part] = read
            parts[part] = read(weights=False)
        else:
            parts[part] = read()

    pipeline_class: Any = getattr(diffusers, family.pipeline)
    pipeline = read_or_refuse(
        f'the base model "{name}"',
        f"correct its files, or {ANOTHER}",
        lambda: pipeline_class.from_pretrained(
            folder, **parts, **dict.fromkeys(absent), use_safetensors=True
        ),
    )
    for part in family.encoders:
        if part not in absent:
            tokenizer = part.replace("text_encoder", "tokenizer")
            fix = f"put its files into the folder {tokenizer}, or {ANOTHER}"
            require_words(f'the {tokenizer} of "{name}"', getattr(pipeline, tokenizer), None, fix)
    pipeline.register_to_config(_name_or_path=name)  # instead of a folder in the hub's cache
    pipeline.set_progress_bar_config(disable=True)
    pipeline.origin = origin
    return pipeline


def _dtype_of(part: str, dtype: Dtypes) -> torch.dtype:
    if part == "vae":
        # Autoencoders overflow in half precision, so they encode and decode in float32.
        return torch.float32
    if isinstance(dtype, dict):
        return dtype.get(part, dtype["default"])
    return dtype


def part_label(part: str, name: str) -> str:
    """Return the name of a pipeline's part for messages."""
    return f'the {part} of "{name}"'


def download(
    name: str,
    revision: str | None,
    variant: str | None,
    cache_dir: str | None,
    *,
    unused_parts: Collection[str] = (),
    weights: bool,
) -> Path:
    """Download a pipeline from the hub and return its folder in the hub's cache.

    Args:
        unused_parts: parts whose weights are not needed.
        weights: False to download only configurations and tokenizers.
    """
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    if weights:
        options["variant"] = variant
        options |= dict.fromkeys(unused_parts)
        download = partial(DiffusionPipeline.download, name, use_safetensors=True, **options)
    else:
        patterns = list(WITHOUT_WEIGHTS)
        download = partial(snapshot_download, name, allow_patterns=patterns, **options)
    return Path(from_hub(name, download))


def load_base(cfg: DreamBoothConfig, dtype: Dtypes, **options: Any) -> Any:
    """Load the base model of a configuration; see `load_pipeline`."""
    return load_pipeline(
        cfg.pretrained_model_name_or_path,
        dtype=dtype,
        revision=cfg.revision,
        variant=cfg.variant,
        cache_dir=cfg.cache_dir,
        vae=cfg.pretrained_vae_model_name_or_path,
        **options,
    )


def _empty(
    label: str, kind: Any, place: str | Path, fix: str, dtype: torch.dtype, **options: Any
) -> Any:
    """Build one model of a pipeline without weights. The arguments are those of `load_part`."""
    options.pop("variant", None)  # applies only to weights

    def build() -> Any:
        if hasattr(kind, "load_config"):  # a diffusers model
            return kind.from_config(kind.load_config(place, **options))
        return kind(kind.config_class.from_pretrained(place, **options))

    return read_or_refuse(label, fix, lambda: empty(build, dtype))


def load_part(
    label: str, kind: Any, place: str | Path, fix: str, *, weights: bool = True, **options: Any
) -> Any:
    """Load one model of a pipeline with all of its weights, from safetensors.

    Args:
        label: name of the model in messages.
        kind: class of the model.
        place: folder or hub id.
        fix: what the user can do if the model can't be read, for the error message.
        weights: False to build the model without weights.
        options: further arguments of ``from_pretrained``.
    """
    if not weights:
        return _empty(label, kind, place, fix, **options)
    require_safetensors(label, Path(place).expanduser() / options.get("subfolder", ""))
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, loading_info = read_or_refuse(label, fix, lambda: kind.from_pretrained(place, **options))
    require_whole(label, loading_info["missing_keys"])
    return model.requires_grad_(False).eval()


def select_layers(words: Sequence[str], family: Family, model: nn.Module) -> tuple[str, ...]:
    """Return names of a denoiser's layers, or endings of names, for an `AdapterSpec`.

    - attention: the family's ``targets``.
    - feed-forward: the linear layers of the family's ``feed_forward`` modules.
    - convolutions: convolutions in blocks, as in kohya's scripts. A UNet's first and last layers,
      which have 4 channels on one side, and a transformer's patch embedding are left out.
    - all-linear: every linear layer, as in PEFT.
    - all: all linear layers and the convolutions.

    Args:
        words: groups, and endings of layer names such as "to_q" (``--lora_layers``).

    Raises:
        UserError: a word is neither a group nor the ending of a layer name, or a group is empty.
    """
    linear = adaptable(model)
    convolutions = []
    for name in adaptable(model, convolutions=True):
        # Layers in blocks have a number in their names.
        if any(part.isdigit() for part in name.split(".")):
            convolutions.append(name)
    groups = {
        ATTENTION: family.targets,
        FEED_FORWARD: [name for name in linear if is_within(name, family.feed_forward)],
        CONVOLUTIONS: convolutions,
        ALL_LINEAR: linear,
        ALL_LAYERS: linear + convolutions,
    }
    kind = type(model).__name__
    module_names = [f".{name}" for name, _ in model.named_modules()]
    layers: list[str] = []
    for word in words:
        if word in groups:
            if not groups[word]:
                raise UserError(f"{FLAG} {word}: the {kind} has no such layer; give {ALL_LINEAR}.")
            layers += groups[word]
        elif any(name.endswith(f".{word}") for name in module_names):
            layers.append(word)
        else:
            raise UserError(
                f'{FLAG} "{word}" is not a layer of the {kind}{_hint(word, groups[ALL_LAYERS])}:'
                f" give {', '.join(LAYER_GROUPS)}, or endings of layer names such as"
                f" {family.targets[0]}."
            )
    return tuple(dict.fromkeys(layers))  # in order, without repetition


def _hint(word: str, names: Sequence[str]) -> str:
    """Return a hint for a message: the group or name ending that is closest to a wrong word."""
    ends: set[str] = set()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            ends.add(".".join(parts[start:]))
    # Shorter endings come first: "to_q" before "attn1.to_q".
    return did_you_mean(word, list(LAYER_GROUPS) + sorted(ends, key=len))


def memory_by_phase(task: Any, device: torch.device) -> PhaseMemory:
    """Estimate the memory of each phase of a run, without trained weights.

    `dry_run.complete` adds the trained weights. On a CPU all models are in memory from the start.
    On a GPU, frozen text encoders are deleted or moved to the CPU before the first step, and with
    ``--offload`` the autoencoder is on the GPU only while it encodes or decodes.

    Args:
        task: a `DreamBooth` whose models have no weights.
    """
    cfg, family, pipeline = task.cfg, task.family, task.pipeline
    quantized = set(task.models)
    if family.flow:
        quantized |= set(family.encoders)
    model_bytes: dict[str, int] = {}
    for name in family.parts:
        model = getattr(pipeline, name, None)
        if isinstance(model, nn.Module):
            quantization = cfg.quantize if name in quantized else "none"
            model_bytes[name] = held_bytes(model, quantization)
    if task.validation_model is not None and device.type == "cpu":
        model_bytes["validation model"] = task.validation_model.bytes_
    if cfg.chooses_by_samples:
        model_bytes["image model"] = image_model_bytes(cfg.image_model)

    # Models in memory, by phase.
    is_cpu = device.type == "cpu"
    frozen_encoders = set(family.encoders) - set(task.models)
    before = set(model_bytes)
    encoding = set(model_bytes)
    if not is_cpu:
        before = frozen_encoders | {"vae"}
    if family.flow or not is_cpu:
        encoding -= frozen_encoders
    step = encoding
    if cfg.offload and not is_cpu:
        before = before - {"vae"}
        step = step - {"vae"}

    def weights(names: set[str]) -> dict[str, int]:
        return {f"weights: {name}": size for name, size in model_bytes.items() if name in names}

    # Memory of the autoencoder for the most pixels that it encodes or decodes at a time.
    sizes = bucket_sizes(cfg.resolution, cfg.aspect_ratio_buckets)
    pixels = max(height * width for height, width in sizes)
    channels = autoencoder_width(pipeline.vae.config)
    encoded_bytes = ENCODED_BYTES * max(pixels, min(AT_ONCE, cfg.train_batch_size * pixels))
    sampled_pixels = [sample.width * sample.height for sample in cfg.samples]
    decoded_bytes = DECODED_BYTES * max(sampled_pixels, default=0)
    pictures = channels * max(encoded_bytes, decoded_bytes)

    image_tokens = pixels // family.patch**2
    activations = activation_bytes(family, task.models[family.denoiser], image_tokens, cfg)
    return {
        BEFORE: weights(before),
        "encoding or sampling": {**weights(encoding), "pictures": pictures},
        STEP: {**weights(step), "activations": activations},
    }


def activation_bytes(family: Any, denoiser: Any, image_tokens: int, cfg: DreamBoothConfig) -> int:
    """Estimate the bytes of the denoiser's activations in a step (`families.base.Activations`).

    Args:
        denoiser: the denoiser, which need not have weights.
        image_tokens: number of tokens of an image, or of latent pixels for a UNet.
    """
    counts = family.activations
    if family.flow:
        blocks = 0
        for module in denoiser.children():
            if isinstance(module, nn.ModuleList):
                blocks += len(module)
    else:  # a UNet's coefficients cover all of its blocks
        blocks = 1
    width = family.width(denoiser.config)
    # Number of stored values per token and unit of width.
    if cfg.gradient_checkpointing:
        values_per_width = blocks * counts.checkpointed + counts.recomputed
    else:
        values_per_width = blocks * counts.block
    # Each held prediction stores the activations of another forward pass for its gradient.
    passes = 1 + bool(cfg.hold_unconditional) + bool(cfg.prior_prediction_weight)
    tokens = passes * cfg.train_batch_size * (image_tokens + counts.prompt_tokens)
    return int(tokens * width * NUMBER_BYTES[cfg.mixed_precision] * values_per_width)
