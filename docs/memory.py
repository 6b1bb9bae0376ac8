"""Memory of the image models, as ``--dry_run`` computes it from their published configurations.

The pages show it in tables, the recipes in their head comments.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers

from bilora_diffusion.adapters import AdapterSpec, target_layers
from bilora_diffusion.config.command_line import RECIPES, read_options
from bilora_diffusion.image.config import resolve
from bilora_diffusion.image.families import family_class
from bilora_diffusion.image.pipeline import memory_by_phase
from bilora_diffusion.methods import Target
from bilora_diffusion.train.dry_run import (
    BEFORE,
    CUDA_CONTEXT_BYTES,
    STEP,
    attach_copy,
    complete,
    empty,
)

FOLDER = Path(__file__).resolve().parents[1] / "results" / "dry_run_memory"
# Model -> configurations of its denoiser and text encoders at full size
MODELS = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
# Rank of the adapter in the table of image models
RANK = 4
# Class of an autoencoder -> configuration at full size, where the class's default is smaller
VAE = {
    "AutoencoderKL": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": 4 * ("DownEncoderBlock2D",),
        "up_block_types": 4 * ("UpDecoderBlock2D",),
    }
}
# Line in a recipe's head comment: a GPU's memory, and options to add to the recipe for that GPU
LINE = re.compile(r"^# (\d+) GB (?:as it stands|with `(.+)`): .*$", re.MULTILINE)


def step_memory(name: str, weights: str, *words: str) -> dict[str, int]:
    """Compute the memory of a step on one image of 1024 pixels, without CUDA's own memory.

    Args:
        name: Name of the model.
        weights: "bf16", or a value of ``--quantize``.
        words: Further words of the command line.

    Returns:
        Bytes: "lora" and "bilora" are the whole step of each method, "activations" the step's
        activations, and "encoders" the text encoders, which are on the GPU before the first step.
    """
    quantize = "none" if weights == "bf16" else weights
    task = _task_without_images(name, "--quantize", quantize, *words)
    phases = memory_by_phase(task, torch.device("cuda"))
    step_bytes = sum(phases[STEP].values())
    trained = _trained_bytes(name)
    return {
        "activations": phases[STEP]["activations"],
        "encoders": sum(phases[BEFORE].values()),
        "lora": step_bytes + trained,
        # The auxiliary takes as much memory as the primary, gradients and moments included.
        "bilora": step_bytes + 2 * trained,
    }


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts of a model with LoRA on its default layers.

    Attributes:
        denoiser: Parameters of the denoiser, without adapters.
        layers: Number of adapted layers.
        trained: Parameters of the adapter at rank `RANK`.
    """

    denoiser: int
    layers: int
    trained: int


def parameter_counts(name: str) -> ParameterCounts:
    """Count the parameters of a model's denoiser and of its adapter."""
    (target,) = _task_without_images(name).targets()
    layers = target_layers(target.model, target.spec)
    trained = 0
    for layer in layers:
        module: Any = target.model.get_submodule(layer)
        trained += RANK * (module.in_features + module.out_features)
    denoiser = sum(parameter.numel() for parameter in target.model.parameters())
    return ParameterCounts(denoiser, len(layers), trained)


@functools.cache
def _trained_bytes(name: str) -> int:
    """Compute the bytes of LoRA's adapter with its gradients and moments."""
    _, trained = attach_copy(_task_without_images(name), 1)
    return sum(trained.values())


def _task_without_images(name: str, *words: str) -> Any:
    """Return a task without validation images and without the autoencoder's weights."""
    argv = ["--resolution", "1024", "--mixed_precision", "bf16", "--train_batch_size", "1"]
    argv += ["--num_validation_images", "0", "--method", "lora", *words]
    task = empty_task(name, *argv)
    task.pipeline.vae = SimpleNamespace(config=task.pipeline.vae.config)
    return task


def empty_task(name: str, *words: str) -> Any:
    """Return the parts of a task that a dry run reads, with empty models of full size."""
    with TemporaryDirectory() as folder:
        argv = ["--dataset", "mini", "--validation_dataset", "none", "--dry_run"]
        argv += ["--output_dir", folder, *words]
        # Options are resolved for the miniature: the model's own files would need the hub.
        cfg = resolve([*argv, "--pretrained_model_name_or_path", "mini"])
    model = MODELS[name]
    family: Any = family_class(model["pipeline"], name)()
    class_name, config = model["denoiser"]
    denoiser = _empty_model(diffusers, class_name, **config)
    spec = AdapterSpec(cfg.rank, cfg.lora_alpha or cfg.rank, target_modules=family.targets)
    vae_class = family.parts["vae"]
    vae = _empty_model(diffusers, vae_class, **VAE.get(vae_class, {}))
    pipeline = SimpleNamespace(vae=vae)
    setattr(pipeline, family.denoiser, denoiser)
    for part, encoder in zip(family.encoders, _empty_encoders(name), strict=True):
        setattr(pipeline, part, encoder)
    return SimpleNamespace(
        cfg=cfg,
        family=family,
        pipeline=pipeline,
        models={family.denoiser: denoiser},
        validation_model=None,
        targets=lambda: [Target(family.denoiser, denoiser, spec, cfg.learning_rate)],
    )


@functools.cache
def _empty_encoders(name: str) -> list[Any]:
    """Build the text encoders of a model without weights, in its family's order."""
    encoders = []
    for class_name, config_class, values in MODELS[name]["encoders"]:
        config = getattr(transformers, config_class)(**values)
        encoders.append(_empty_model(transformers, class_name, config))
    return encoders


def _empty_model(library: Any, class_name: str, *args: Any, **config: Any) -> Any:
    return empty(lambda: getattr(library, class_name)(*args, **config), torch.bfloat16)


def recipe_models(examples: Mapping[str, str]) -> dict[Path, str]:
    """Return the recipes that have memory lines, each with the name of its model.

    Args:
        examples: Model -> its id on the Hugging Face Hub.
    """
    names = {hub_id: name for name, hub_id in examples.items()}
    models = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        if LINE.search(path.read_text(encoding="utf-8")):
            options = read_options(path, path.name, "--config")
            models[path] = names[options["pretrained_model_name_or_path"]]
    return models


def updated_recipe(path: Path, model: str) -> str:
    """Return the text of a recipe with newly computed memory figures."""

    def update(match: re.Match[str]) -> str:
        further_options = (match[2] or "").split()
        peak = peak_memory(model, "--config", str(path), *further_options)
        beginning, _, _ = match[0].rpartition(":")
        return f"{beginning}: {peak / 1e9:.1f} GB"

    return LINE.sub(update, path.read_text(encoding="utf-8"))


def peak_memory(model: str, *words: str) -> int:
    """Compute the peak memory of a run on a GPU with validation images, in bytes."""
    task = empty_task(model, "--validation_prompt", "a photo of TOK", *words)
    _, trained = attach_copy(task, 1)
    phases = memory_by_phase(task, torch.device("cuda"))
    phases = complete(phases, trained, CUDA_CONTEXT_BYTES)
    return max(sum(parts.values()) for parts in phases.values())
