"""An image pipeline of a known kind: loading it, the layers that get adapters, and its memory.

It is loaded whole, or refused where it can't be trained.
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
from ..core.errors import UserError, did_you_mean, reading
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
from .base_model import ANOTHER, describe, folder_of, from_hub
from .config import DreamBoothConfig
from .crops import sizes as bucket_sizes
from .families.base import Family
from .latents import AT_ONCE

WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of configurations and tokenizers."""
Dtypes = torch.dtype | dict[str, torch.dtype]
FLAG = "--lora_layers"
ENCODED_BYTES, DECODED_BYTES = 20, 24
"""Bytes of an autoencoder in fp32 for each pixel and channel of its outermost layer."""


@dataclass(frozen=True)
class Origin:
    """The folder of a pipeline, and functions that read the parts which were left without weights
    (`train.dry_run`).
    """

    folder: Path
    later: dict[str, Callable[[], Any]] = field(default_factory=dict)


def resolve(name: str) -> str:
    """The folder or hub id that a model name stands for; some are embedded (`mini.PIPELINES`)."""
    return str(PIPELINES[name]()) if name in PIPELINES else name


def load_pipeline(
    name: str,
    *,
    dtype: Dtypes,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    vae: str | None = None,
    weights: bool = True,
    later: Collection[str] = (),
) -> Any:
    """Load a genuine pipeline with its VAE in float32 and everything else in ``dtype``.

    Args:
        name: folder, hub id, or one of `mini.PIPELINES`.
        dtype: of all parts, or of each by name with "default" for the rest.
        vae: another autoencoder (``--pretrained_vae_model_name_or_path``).
        weights: whether to load any; the models are empty (`dry_run.empty`) without, and no more
            than configurations and tokenizers is downloaded.
        later: parts that are left without weights until somebody reads them (`Origin`).

    Returns:
        The pipeline, with its `Origin` as ``origin``.

    Raises:
        UserError: nothing that can be loaded is there, only pickles are, weights are missing, or
            a tokenizer knows no words.
    """
    model = describe(name, revision, cache_dir)
    folder = folder_of(name)
    if folder is None:
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        if weights:
            options |= {"variant": variant, **({"vae": None} if vae else {})}
            get = partial(DiffusionPipeline.download, name, use_safetensors=True, **options)
        else:
            get = partial(snapshot_download, name, allow_patterns=list(WITHOUT_WEIGHTS), **options)
        folder = Path(from_hub(name, get))
    if weights and name not in PIPELINES and variant and not any(folder.glob(f"*/*.{variant}.*")):
        raise UserError(f'--variant "{variant}" is of no file of "{name}": {ANOTHER}, or drop it.')
    family, index, load = model.family, model.index, _load if weights else _empty
    # Optional parts that the pipeline goes without, such as SD3's T5.
    absent = [part for part in family.optional if (index.get(part) or [None])[0] is None]
    origin, parts = Origin(folder), dict[str, Any]()
    for part, kind in family.parts.items():
        if part in absent:
            continue
        part_dtype = dtype.get(part, dtype["default"]) if isinstance(dtype, dict) else dtype
        if part == "vae":
            # Autoencoders overflow in half precision: latents are made and decoded in float32.
            part_dtype = torch.float32
        options = {"dtype": part_dtype}
        label, place, fix = f'the {part} of "{name}"', folder, f"download it again, or {ANOTHER}"
        if part == "vae" and vae:
            label, place = f'the autoencoder "{vae}"', vae
            fix = f"give a folder or a hub id of a {kind}"
            options["cache_dir"] = cache_dir
        else:
            options["subfolder"] = part
            # A part without files of the variant is read as it is.
            if variant and any((folder / part).glob(f"*.{variant}.*")):
                options["variant"] = variant
        loader = getattr(diffusers, kind, None) or getattr(transformers, kind)
        read = partial(load, label, loader, place, fix, **options)
        if part in later:  # its embeddings may all be cached
            origin.later[part] = read
            parts[part] = _empty(*read.args, **read.keywords)
        else:
            parts[part] = read()
    pipeline_class: Any = getattr(diffusers, family.pipeline)
    pipeline = reading(
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
    pipeline.register_to_config(_name_or_path=name)  # and not a folder of the hub's cache
    pipeline.set_progress_bar_config(disable=True)
    pipeline.origin = origin
    return pipeline


def load_base(cfg: DreamBoothConfig, dtype: Dtypes, **options: Any) -> Any:
    """Load the pipeline that a configuration names; see `load_pipeline`."""
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
    """One model without its weights."""
    options.pop("variant", None)  # of weights

    def build() -> Any:
        if hasattr(kind, "load_config"):  # a model of diffusers
            return kind.from_config(kind.load_config(place, **options))
        return kind(kind.config_class.from_pretrained(place, **options))

    return reading(label, fix, lambda: empty(build, dtype))


def _load(label: str, kind: Any, place: str | Path, fix: str, **options: Any) -> Any:
    """One model with all of its weights, from safetensors."""
    require_safetensors(label, Path(place).expanduser() / options.get("subfolder", ""))
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, loaded = reading(label, fix, lambda: kind.from_pretrained(place, **options))
    require_whole(label, loaded["missing_keys"])
    return model.requires_grad_(False).eval()


def select_layers(words: Sequence[str], family: Family, model: nn.Module) -> tuple[str, ...]:
    """Names or ends of names, as an `AdapterSpec` takes them, of what the words stand for.

    - attention: the family's ``targets``.
    - feed-forward: the linear layers of the family's ``feed_forward`` modules.
    - convolutions: those in blocks, as in kohya's scripts; not the first and last of a UNet, which
      hold 4 channels, nor the patches of a transformer.
    - all-linear: every linear layer, as in PEFT; all: these and the convolutions.

    Raises:
        UserError: a word is neither a group nor the end of a layer's name, or a group is empty.
    """
    linear = adaptable(model)
    # Layers in blocks have a number in their names.
    convolutions = []
    for name in adaptable(model, convolutions=True):
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
    layers: dict[str, None] = {}  # in order, without repetition
    for word in words:
        # A word is a group, or the end of a layer's name such as to_q.
        if word not in groups and not any(name.endswith(f".{word}") for name in module_names):
            raise UserError(
                f'{FLAG} "{word}" is not a layer of the {kind}{_hint(word, groups[ALL_LAYERS])}:'
                f" give {', '.join(LAYER_GROUPS)}, or the ends of layers' names such as"
                f" {family.targets[0]}."
            )
        if not groups.get(word, word):
            raise UserError(f"{FLAG} {word}: the {kind} has no such layer; give {ALL_LINEAR}.")
        layers |= dict.fromkeys(groups.get(word, [word]))
    return tuple(layers)


def _hint(word: str, names: Sequence[str]) -> str:
    """The end of a layer's name that a wrong word is most like."""
    ends: set[str] = set()
    for name in names:
        parts = name.split(".")
        ends |= {".".join(parts[start:]) for start in range(len(parts))}
    # The shortest first: "to_q" before "attn1.to_q".
    return did_you_mean(word, list(LAYER_GROUPS) + sorted(ends, key=len))


def memory_by_phase(task: Any, device: torch.device) -> PhaseMemory:
    """Memory of a task whose models are empty, in each phase of a run.

    On a CPU all models are in memory from the start. On a GPU text encoders that are not trained
    leave before the first step, and with ``--offload`` the autoencoder rests meanwhile.
    """
    cfg, family, pipeline = task.cfg, task.family, task.pipeline
    quantized = set(task.models)
    if family.flow:
        quantized |= set(family.encoders)
    sizes: dict[str, int] = {}
    for name in family.parts:
        model = getattr(pipeline, name, None)
        if isinstance(model, nn.Module):
            sizes[name] = held_bytes(model, cfg.quantize if name in quantized else "none")

    on_cpu = device.type == "cpu"
    frozen_encoders = set(family.encoders) - set(task.models)
    staying = set(sizes)
    if family.flow or not on_cpu:
        staying -= frozen_encoders
    resting = {"vae"} if cfg.offload and not on_cpu else set()
    before = set(sizes) if on_cpu else (frozen_encoders | {"vae"}) - resting

    def weights(names: set[str]) -> dict[str, int]:
        return {f"weights: {name}": size for name, size in sizes.items() if name in names}

    crops = bucket_sizes(cfg.resolution, cfg.aspect_ratio_buckets)
    pixels = max(height * width for height, width in crops)
    vae_config = pipeline.vae.config
    channels = vae_config.get("base_dim") or vae_config["block_out_channels"][0]
    encoded = ENCODED_BYTES * max(pixels, min(AT_ONCE, cfg.train_batch_size * pixels))
    sampled_pixels = [sample.width * sample.height for sample in cfg.samples]
    decoded = DECODED_BYTES * max(sampled_pixels, default=0)
    pictures = channels * max(encoded, decoded)

    places = pixels // family.patch**2
    activations = activation_bytes(family, task.models[family.denoiser], places, cfg)
    return {
        BEFORE: weights(before),
        "encoding or drawing": {**weights(staying), "pictures": pictures},
        STEP: {**weights(staying - resting), "activations": activations},
    }


def activation_bytes(family: Any, denoiser: Any, places: int, cfg: DreamBoothConfig) -> int:
    """Bytes that the denoiser's activations take in a step.

    Args:
        family: Kind of the base model.
        denoiser: Denoiser whose weights are empty.
        places: Places of the latents, or tokens of the image.
        cfg: Configuration of the run.
    """
    config, counts = denoiser.config, family.activations
    if family.flow:
        lists = [module for module in denoiser.children() if isinstance(module, nn.ModuleList)]
        blocks = sum(map(len, lists))
        heads, head_width = config.get("num_attention_heads"), config.get("attention_head_dim")
        width = config.get("dim") or config.get("hidden_size") or heads * head_width
    else:  # a UNet, whose coefficients are of the whole
        blocks, width = 1, config["block_out_channels"][0]
    if cfg.gradient_checkpointing:
        numbers = blocks * counts.checkpointed + counts.recomputed
    else:
        numbers = blocks * counts.block
    tokens = cfg.train_batch_size * (places + counts.prompt_tokens)
    return int(tokens * width * NUMBER_BYTES[cfg.mixed_precision] * numbers)
