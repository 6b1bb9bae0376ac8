"""ComfyUI workflows that sample a run's first validation image as diffusers does.

A workflow is in ComfyUI's API format, which maps numbers to nodes. ComfyUI's editor can open it. If
an input is another node's output, its value is a pair: that node's number and the output's number.
Nodes and files are named as in Comfy-Org's templates and model repositories in 2026. If a copy of
ComfyUI is available, the tests check nodes, inputs and noise levels with its code; no image has
been sampled with it. `Family.comfyui` holds the differences between model families.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.lora_sources import LoraSource
from ..core.durable import write_text
from ..core.lora_names import base_workflow_file_name, kohya_file_name, workflow_file_name
from ..core.values import BASE_GUIDANCE, unconditional_strength
from ..methods import get
from ..mini import find_embedded
from .captions import concept_words
from .config import DreamBoothConfig
from .families import family_of
from .families.base import ComfyUI, Family
from .schedulers import build_scheduler
from .validation import ValidationSample, usual_sample

# Node that loads the text encoders, by the number of their files.
TEXT_ENCODER_LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader"}
TRAINING_STEPS = 1000  # noise levels of Stable Diffusion XL; a sampler uses a subset
# ComfyUI's samplers, by the class of diffusers' scheduler.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchLCMScheduler": "lcm",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "KDPM2DiscreteScheduler": "dpm_2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "UniPCMultistepScheduler": "uni_pc",
}
Output = list[Any]  # a node's output: [number of the node, number of the output]


class Graph(dict[str, Any]):
    """The nodes of a workflow, by number."""

    def add(self, kind: str, **inputs: Any) -> Output:
        """Add a node and return its first output."""
        number = str(len(self) + 1)
        self[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]


def remark(cfg: DreamBoothConfig) -> str | None:
    """Return a warning if ComfyUI misreads a flow-matching model's LoRA file, otherwise None."""
    family: Family = cfg.family
    if not family.flow:
        return None  # ComfyUI reads SDXL's kohya file
    comfyui = family.comfyui
    if comfyui is None:
        return (
            f"ComfyUI does not know the layer names of {family.title}, so it would apply nothing of"
            " the LoRA file: sample with diffusers, which reads the whole file."
        )
    if cfg.use_dora:
        flag, unread = "use_dora", "DoRA's magnitudes"
    elif comfyui.unread_groups.intersection(cfg.lora_layers):
        flag, unread = "lora_layers", comfyui.unread_layers
    else:
        return None
    return (
        f"--{flag}: ComfyUI leaves out {unread} in the LoRA file, so its images differ from those"
        " of the trained model; diffusers reads the whole file."
    )


def write(cfg: DreamBoothConfig, folder: Path, pipeline: Any) -> None:
    """Write the workflow next to the LoRA file, and a second one with guidance from the base model.

    There is no workflow if ComfyUI does not read the weights as trained, if it lacks the base model
    or the scheduler, or if an SDXL run writes no kohya file. There is no second workflow if the
    model makes no unconditional prediction at the image's guidance scale, or if the first workflow
    already lowers the adapter's strength in this prediction. Earlier workflows are removed.

    Args:
        pipeline: the pipeline that samples the validation images.
    """
    path = folder / workflow_file_name(folder)
    base_path = folder / base_workflow_file_name(folder)
    path.unlink(missing_ok=True)
    base_path.unlink(missing_ok=True)
    base = cfg.validation_model or cfg.pretrained_model_name_or_path
    family = family_of(pipeline)
    is_unread = remark(cfg) is not None or get(cfg.method).exports_weights
    has_no_file = not (family.flow or cfg.output_kohya_format)
    if is_unread or has_no_file or find_embedded(base):
        return
    scheduler = build_scheduler(pipeline.scheduler, cfg.sampling_scheduler)
    if cfg.sampling_scheduler is not None:
        # FLUX.2's node computes the noise levels itself, so it takes no scheduler settings.
        has_levels = not family.comfyui.scheduler_node or ":" not in cfg.sampling_scheduler
        if type(scheduler).__name__ not in SAMPLERS or not has_levels:
            return
    sampler = Sampler(scheduler, cfg.lora_sources.get("sampling_lora"))
    samples = cfg.samples
    if not samples:
        concept = cfg.concept_configs[0]
        words = concept_words(concept.trigger_word, concept.instance_prompt)
        prompt = words or "a photo"
        samples = [usual_sample(cfg, prompt)]
    checkpoint = family.comfyui.checkpoints.get(base, Path(base).name.lower())
    sample = samples[0]
    lora = kohya_file_name(folder)
    graph = workflow(pipeline, checkpoint, lora, sample, sampler)
    write_text(path, json.dumps(graph, indent=1) + "\n")
    guidance = sample.guidance
    if guidance is None:
        _, guidance = family.usual_sampling(pipeline)
    is_guided = family.is_guided(guidance, pipeline.config, family.configs(pipeline))
    if is_guided and unconditional_strength(sample.guidance_from) == 1:
        by_base = replace(sample, guidance_from=BASE_GUIDANCE)
        graph = workflow(pipeline, checkpoint, lora, by_base, sampler)
        write_text(base_path, json.dumps(graph, indent=1) + "\n")


@dataclass(frozen=True)
class Sampler:
    """Settings that are used only while images are generated."""

    scheduler: Any  # one of diffusers' schedulers
    lora: LoraSource | None = None  # an additional LoRA file, such as Lightning's

    @property
    def name(self) -> str:
        """ComfyUI's name for the sampler."""
        return SAMPLERS.get(type(self.scheduler).__name__, "euler")

    def spacing(self, usual: str) -> str:
        """Return ComfyUI's name for the spacing of the noise levels.

        Args:
            usual: the family's spacing, which is used if the scheduler does not set one.
        """
        config = self.scheduler.config
        if config.get("use_karras_sigmas"):
            return "karras"
        # Trailing spacing starts at full noise, and LCM always does.
        if config.get("timestep_spacing") == "trailing" or self.name == "lcm":
            return "sgm_uniform"
        return usual


def workflow(
    pipeline: Any,
    checkpoint: str,
    lora: str,
    sample: ValidationSample,
    sampler: Sampler | None = None,
) -> Graph:
    """Return the nodes that sample one validation image as the pipeline does.

    Args:
        checkpoint: name of the model's file, without its extension.
        lora: name of the adapter's file.
        sampler: scheduler and additional LoRA file; None for the pipeline's own scheduler and no
        file.
    """
    if sampler is None:
        sampler = Sampler(pipeline.scheduler)
    family: Family = family_of(pipeline)
    comfyui = family.comfyui
    assert comfyui is not None
    steps, guidance = family.usual_sampling(pipeline)
    if sample.steps is not None:
        steps = sample.steps
    if sample.guidance is not None:
        guidance = sample.guidance
    size = {"width": sample.width, "height": sample.height}
    graph = Graph()

    # The model with the adapter. With guidance from the base model, a hook applies the adapter
    # only to the positive prompt. At a strength between 0 and 1, a second hook applies the adapter
    # at that strength to the negative prompt.
    base_model, base_encoders, autoencoder = _load_checkpoint(graph, comfyui, checkpoint)
    if sampler.lora is not None:
        # This file acts in both predictions, as if it were part of the base model.
        base_model = graph.add(
            "LoraLoaderModelOnly",
            model=base_model,
            lora_name=sampler.lora.path.name,
            strength_model=sampler.lora.strength,
        )
    has_hooks = unconditional_strength(sample.guidance_from) < 1
    negative_strength = sample.strength * unconditional_strength(sample.guidance_from)
    model = base_model
    text_encoders = negative_encoders = base_encoders
    if not comfyui.text_encoders:
        # If the checkpoint's text encoders are trained too, the file includes their adapters.
        model = _load_adapter(graph, lora, base_model, base_encoders, sample.strength)
        text_encoders = negative_encoders = [model[0], 1]
        if has_hooks:
            negative_encoders = base_encoders
    elif not has_hooks:
        adapter = {"lora_name": lora, "strength_model": sample.strength}
        model = graph.add("LoraLoaderModelOnly", model=base_model, **adapter)
    if has_hooks:
        model = base_model
    if comfyui.shift_node:
        model = _shift_noise_levels(graph, pipeline, sampler, model, size)

    # The prompt and the negative prompt.
    positive = graph.add("CLIPTextEncode", clip=text_encoders, text=sample.prompt)
    zeros_for_empty = pipeline.config.get("force_zeros_for_empty_prompt")
    if comfyui.embeds_guidance or (zeros_for_empty and not sample.negative_prompt):
        negative = graph.add("ConditioningZeroOut", conditioning=positive)
    else:
        if has_hooks and negative_strength != 0 and not comfyui.text_encoders:
            loader = _load_adapter(graph, lora, base_model, base_encoders, negative_strength)
            negative_encoders = [loader[0], 1]
        negative = graph.add("CLIPTextEncode", clip=negative_encoders, text=sample.negative_prompt)
    if comfyui.embeds_guidance:
        positive = graph.add("FluxGuidance", conditioning=positive, guidance=guidance)
    if has_hooks:
        positive = _hook_adapter(graph, lora, positive, sample.strength)
        if negative_strength != 0:
            negative = _hook_adapter(graph, lora, negative, negative_strength)
    # ComfyUI's scale for no guidance is 1, and a pipeline's is `unguided_scale`: 0 for pipelines
    # that compute conditional + scale * (conditional - unconditional), 100 for models with embedded
    # guidance.
    scale = max(1.0, guidance + 1.0 - family.unguided_scale)
    guided = {"model": model, "positive": positive, "negative": negative, "cfg": scale}
    latent = _sample_latent(graph, family, sampler, guided, sample.seed, steps, size)
    image = graph.add("VAEDecode", samples=latent, vae=autoencoder)
    graph.add("SaveImage", images=image, filename_prefix=Path(lora).stem)
    return graph


def _load_adapter(
    graph: Graph, lora: str, model: Output, encoders: Output, strength: float
) -> Output:
    """Add the node that loads an adapter into a model and its text encoders."""
    strengths = {"strength_model": strength, "strength_clip": strength}
    return graph.add("LoraLoader", model=model, clip=encoders, lora_name=lora, **strengths)


def _hook_adapter(graph: Graph, lora: str, prompt: Output, strength: float) -> Output:
    """Add the nodes that apply an adapter to the predictions of one prompt only.

    The node DualModelGuider does not work here: in ComfyUI, two models from one file share their
    weights, so the adapter would act in both.
    """
    hooks = graph.add("CreateHookLoraModelOnly", lora_name=lora, strength_model=strength)
    properties: dict[str, Any] = {"strength": 1.0, "set_cond_area": "default"}
    return graph.add("ConditioningSetProperties", cond_NEW=prompt, hooks=hooks, **properties)


def _sample_latent(
    graph: Graph,
    family: Family,
    sampler: Sampler,
    guided: dict[str, Any],
    seed: int,
    steps: int,
    size: dict[str, int],
) -> Output:
    """Add the nodes that sample a latent.

    Args:
        guided: inputs for the model, both prompts and the guidance scale.
        size: width and height of the image, by the names of the nodes' inputs.
    """
    comfyui = family.comfyui
    assert comfyui is not None
    if comfyui.scheduler_node:
        return graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=seed),
            guider=graph.add("CFGGuider", **guided),
            sampler=graph.add("KSamplerSelect", sampler_name=sampler.name),
            sigmas=graph.add(comfyui.scheduler_node, steps=steps, **size),
            latent_image=graph.add(comfyui.latent_node, **size, batch_size=1),
        )
    # The scheduler whose noise levels are closest to diffusers' levels.
    scheduler = comfyui.scheduler
    if not family.flow and TRAINING_STEPS % steps == 0:
        scheduler = "ddim_uniform"
    return graph.add(
        "KSampler",
        **guided,
        latent_image=graph.add(comfyui.latent_node, **size, batch_size=1),
        seed=seed,
        steps=steps,
        sampler_name=sampler.name,
        scheduler=sampler.spacing(scheduler),
        denoise=1,
    )


def _load_checkpoint(
    graph: Graph, comfyui: ComfyUI, checkpoint: str
) -> tuple[Output, Output, Output]:
    """Add the nodes that load a checkpoint; return its model, text encoders and autoencoder."""
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
        input_name = "clip_name"
        if len(names) > 1:
            input_name += str(number)
        inputs[input_name] = f"{name}.safetensors"
    if comfyui.text_encoder_type:
        inputs["type"] = comfyui.text_encoder_type
    return model, graph.add(TEXT_ENCODER_LOADERS[len(names)], **inputs), autoencoder


def _shift_noise_levels(
    graph: Graph, pipeline: Any, sampler: Sampler, model: Output, size: dict[str, int]
) -> Output:
    """Add the node that shifts the noise levels as the pipeline does at this image size."""
    family: Family = family_of(pipeline)
    assert family.comfyui is not None
    config = sampler.scheduler.config
    if config.get("use_dynamic_shifting"):
        mu = family.mu(pipeline, family.tokens(**size))
    else:
        mu = math.log(config.shift)
    node = family.comfyui.shift_node
    if node == "ModelSamplingFlux":
        # The node interpolates between two shifts by image size; here both are equal.
        return graph.add(node, model=model, max_shift=mu, base_shift=mu, **size)
    return graph.add(node, model=model, shift=math.exp(mu))
