"""A workflow for ComfyUI that samples a run's first validation image as diffusers does.

It is in ComfyUI's API format, which its window takes like any other: nodes by their numbers, and
where an input is another node's output, that node's number and the output's. The names of nodes and
files are those of Comfy-Org's templates and model repositories in 2026; nodes, inputs and noise
levels are tested in ComfyUI's code, where a copy is at hand, and no image was sampled in it. What
differs between kinds of models is in `Family.comfyui`.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.durable import write_text
from ..core.lora_names import base_workflow_file_name, kohya_file_name, workflow_file_name
from ..core.values import BASE_GUIDANCE
from ..methods import get
from ..mini import embedded
from .config import DreamBoothConfig
from .families import family_of
from .families.base import ComfyUI, Family
from .validation import ValidationSample, usual_sample

TEXT_ENCODER_LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader"}
"""Node by the number of the encoders' files."""
TRAINING_STEPS = 1000
"""Noise levels of Stable Diffusion XL, from which samplers take some."""
Output = list[Any]
"""An output of a node: its number and the output's."""


class Graph(dict[str, Any]):
    """The nodes of a workflow by their numbers."""

    def add(self, kind: str, **inputs: Any) -> Output:
        """One more node; returns the first of its outputs."""
        number = str(len(self) + 1)
        self[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]


def remark(cfg: DreamBoothConfig) -> str | None:
    """The sentence on a model of flow matching whose file ComfyUI misreads; None for others."""
    family: Family = cfg.family
    if not family.flow:
        return None  # the kohya file is for it
    comfyui = family.comfyui
    if comfyui is None:
        return (
            f"ComfyUI has no names for the layers of {family.title} and finds nothing in the"
            " file: draw with diffusers, which reads it as trained."
        )
    if cfg.use_dora:
        flag, loss = "use_dora", "its magnitudes"
    elif comfyui.unread_groups.intersection(cfg.lora_layers):
        flag, loss = "lora_layers", comfyui.unread_layers
    else:
        return None
    return (
        f"--{flag}: diffusers reads the file as trained; ComfyUI leaves out {loss}, so what that"
        " draws is not what was trained."
    )


def write(cfg: DreamBoothConfig, folder: Path, pipeline: Any) -> None:
    """Write the workflow beside the LoRA file, and the same with guidance from the base model where
    the model has an unconditional prediction; none where ComfyUI does not read the file as trained.
    """
    path, base_path = folder / workflow_file_name(folder), folder / base_workflow_file_name(folder)
    path.unlink(missing_ok=True)
    base_path.unlink(missing_ok=True)
    base, family = cfg.pretrained_model_name_or_path, family_of(pipeline)
    is_unread = remark(cfg) is not None or get(cfg.method).exports_weights
    if is_unread or embedded(base) or not (family.flow or cfg.output_kohya_format):
        return
    samples = cfg.samples
    if not samples:
        concept = cfg.concept_configs[0]
        prompt = concept.trigger_word or concept.instance_prompt or "a photo"
        samples = [usual_sample(cfg, prompt)]
    checkpoint = family.comfyui.checkpoints.get(base, Path(base).name.lower())
    sample, lora = samples[0], kohya_file_name(folder)
    graph = workflow(pipeline, checkpoint, lora, sample)
    write_text(path, json.dumps(graph, indent=1) + "\n")
    guidance = sample.guidance
    if guidance is None:
        _, guidance = family.usual_sampling(pipeline)
    is_guided = family.is_guided(guidance, pipeline.config, family.configs(pipeline))
    if is_guided and sample.guidance_from != BASE_GUIDANCE:
        by_base = replace(sample, guidance_from=BASE_GUIDANCE)
        graph = workflow(pipeline, checkpoint, lora, by_base)
        write_text(base_path, json.dumps(graph, indent=1) + "\n")


def workflow(pipeline: Any, checkpoint: str, lora: str, sample: ValidationSample) -> Graph:
    """The nodes that sample one validation image as the pipeline does.

    Args:
        checkpoint: the model's file, without its ending.
        lora: the adapter's file.
        sample: its steps and guidance are those of the pipeline where they are None.
    """
    family: Family = family_of(pipeline)
    comfyui = family.comfyui
    assert comfyui is not None
    usual_steps, usual_guidance = family.usual_sampling(pipeline)
    steps = usual_steps if sample.steps is None else sample.steps
    guidance = usual_guidance if sample.guidance is None else sample.guidance
    size = {"width": sample.width, "height": sample.height}
    graph = Graph()

    # The model with the adapter, which with guidance from the base model acts on one prompt alone.
    model, text_encoders, autoencoder = _load_checkpoint(graph, comfyui, checkpoint)
    base_model, negative_encoders = model, text_encoders
    is_by_base = sample.guidance_from == BASE_GUIDANCE
    adapter: dict[str, Any] = {"lora_name": lora, "strength_model": sample.strength}
    if not comfyui.text_encoders:
        # Text encoders of the checkpoint may be trained, so the file may have adapters of them.
        both = {"clip": text_encoders, "strength_clip": sample.strength}
        model = graph.add("LoraLoader", model=model, **adapter, **both)
        text_encoders = [model[0], 1]
    elif not is_by_base:
        model = graph.add("LoraLoaderModelOnly", model=model, **adapter)
    if is_by_base:
        model = base_model
    else:
        negative_encoders = text_encoders
    if comfyui.shift_node:
        model = _shift_noise_levels(graph, pipeline, model, size)

    # The prompt and the negative prompt.
    positive = graph.add("CLIPTextEncode", clip=text_encoders, text=sample.prompt)
    zeros_for_empty = pipeline.config.get("force_zeros_for_empty_prompt")
    if comfyui.embeds_guidance or (zeros_for_empty and not sample.negative_prompt):
        negative = graph.add("ConditioningZeroOut", conditioning=positive)
    else:
        negative = graph.add("CLIPTextEncode", clip=negative_encoders, text=sample.negative_prompt)
    if comfyui.embeds_guidance:
        positive = graph.add("FluxGuidance", conditioning=positive, guidance=guidance)
    if is_by_base:
        # Not the node DualModelGuider: two models of one file share their weights in ComfyUI, so
        # that the adapter would act in both.
        hooks = graph.add("CreateHookLoraModelOnly", **adapter)
        properties: dict[str, Any] = {"strength": 1.0, "set_cond_area": "default"}
        positive = graph.add(
            "ConditioningSetProperties", cond_NEW=positive, hooks=hooks, **properties
        )
    # Some pipelines add guidance times the difference to the prediction, which is one more here;
    # a model that embeds its guidance is sampled without: `unguided` tells them apart.
    scale = max(1.0, guidance + 1.0 - family.unguided)
    guided = {"model": model, "positive": positive, "negative": negative, "cfg": scale}

    # The sampler.
    if comfyui.scheduler_node:
        latent = graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=sample.seed),
            guider=graph.add("CFGGuider", **guided),
            sampler=graph.add("KSamplerSelect", sampler_name="euler"),
            sigmas=graph.add(comfyui.scheduler_node, steps=steps, **size),
            latent_image=graph.add(comfyui.latent_node, **size, batch_size=1),
        )
    else:
        latent = graph.add(
            "KSampler",
            **guided,
            latent_image=graph.add(comfyui.latent_node, **size, batch_size=1),
            seed=sample.seed,
            steps=steps,
            sampler_name="euler",
            scheduler=_scheduler(family, steps),
            denoise=1,
        )
    image = graph.add("VAEDecode", samples=latent, vae=autoencoder)
    graph.add("SaveImage", images=image, filename_prefix=Path(lora).stem)
    return graph


def _scheduler(family: Family, steps: int) -> str:
    """ComfyUI's scheduler with the levels of diffusers', or the nearest."""
    assert family.comfyui is not None
    if not family.flow and TRAINING_STEPS % steps == 0:
        return "ddim_uniform"
    return family.comfyui.scheduler


def _load_checkpoint(
    graph: Graph, comfyui: ComfyUI, checkpoint: str
) -> tuple[Output, Output, Output]:
    """Model, text encoders and autoencoder."""
    file = f"{checkpoint}.safetensors"
    if comfyui.autoencoder is None:
        model = graph.add("CheckpointLoaderSimple", ckpt_name=file)
        autoencoder = [model[0], 2]
    else:
        model = graph.add("UNETLoader", unet_name=file, weight_dtype="default")
        autoencoder = graph.add("VAELoader", vae_name=f"{comfyui.autoencoder}.safetensors")
    if not comfyui.text_encoders:
        return model, [model[0], 1], autoencoder
    names = comfyui.text_encoders
    for word, names_of_size in comfyui.text_encoders_by_size.items():
        if word in checkpoint:
            names = names_of_size
    inputs = {}
    for number, name in enumerate(names, start=1):
        place = "clip_name" if len(names) == 1 else f"clip_name{number}"
        inputs[place] = f"{name}.safetensors"
    if comfyui.text_encoder_type:
        inputs["type"] = comfyui.text_encoder_type
    return model, graph.add(TEXT_ENCODER_LOADERS[len(names)], **inputs), autoencoder


def _shift_noise_levels(graph: Graph, pipeline: Any, model: Output, size: dict[str, int]) -> Output:
    """The model with the shift of noise levels that the pipeline has at this size."""
    family: Family = family_of(pipeline)
    assert family.comfyui is not None
    config = pipeline.scheduler.config
    if config.get("use_dynamic_shifting"):
        mu = family.mu(pipeline, family.tokens(**size))
    else:
        mu = math.log(config.shift)
    node = family.comfyui.shift_node
    if node == "ModelSamplingFlux":
        # It interpolates between two shifts by the size of the image; here both are the same.
        return graph.add(node, model=model, max_shift=mu, base_shift=mu, **size)
    return graph.add(node, model=model, shift=math.exp(mu))
