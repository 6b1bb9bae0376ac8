"""A workflow for ComfyUI that draws a run's first validation image as diffusers does.

It is in ComfyUI's API format, which its window takes like any other: nodes by their numbers, and
where an input is another node's output, that node's number and the output's. The names of nodes and
files are those of Comfy-Org's templates and model repositories in 2026; nodes, inputs and noise
levels are tested in ComfyUI's code, where a copy is at hand, and no image was drawn in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.choices import ALL, ALL_LINEAR
from ..core.durable import write_text
from ..core.lora_names import kohya_file_name, workflow_file_name
from ..methods import get
from ..mini import embedded
from .families import SDXL, of

SD3, FLUX, FLUX2 = "StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline"
Z_IMAGE, QWEN, KREA2 = "ZImagePipeline", "QwenImagePipeline", "Krea2Pipeline"
CHECKPOINTS = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sd_xl_base_1.0",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5_medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5_large",
    "black-forest-labs/FLUX.1-dev": "flux1-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux-2-klein-base-4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux-2-klein-base-9b",
    "Tongyi-MAI/Z-Image": "z_image_bf16",
    "Qwen/Qwen-Image": "qwen_image_bf16",
    "krea/Krea-2-Raw": "krea2_raw_bf16",
}
"""Models on the hub -> their files for ComfyUI, where these have another name."""
ENCODERS = {
    SD3: ("", "clip_l", "clip_g", "t5xxl_fp16"),
    FLUX: ("flux", "clip_l", "t5xxl_fp16"),
    FLUX2: ("flux2", "qwen_3_8b"),
    Z_IMAGE: ("lumina2", "qwen_3_4b"),
    QWEN: ("qwen_image", "qwen_2.5_vl_7b"),
    KREA2: ("krea2", "qwen3vl_4b_bf16"),
}
"""The kind that a loader of text encoders is told, and their files."""
AUTOENCODERS = {FLUX: "ae", FLUX2: "flux2-vae", Z_IMAGE: "ae"}
AUTOENCODERS |= dict.fromkeys((QWEN, KREA2), "qwen_image_vae")
"""Of models that are not one file with it."""
LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader"}
Output = list[Any]


class Graph(dict[str, Any]):
    """The nodes of a workflow by their numbers."""

    def add(self, kind: str, **inputs: Any) -> Output:
        """One more node; returns the first of its outputs."""
        self[number := str(len(self) + 1)] = {"class_type": kind, "inputs": inputs}
        return [number, 0]


def remark(cfg: Any) -> str | None:
    """The sentence on a model of flow matching whose file ComfyUI misreads; None for others."""
    if cfg.pipeline == SDXL:
        return None
    if cfg.pipeline not in ENCODERS:
        return (
            f"ComfyUI has no names for the layers of {cfg.family.title} and finds nothing in the"
            " file: draw with diffusers, which reads it as trained."
        )
    if cfg.use_dora:
        flag, what = "use_dora", "its magnitudes"
    elif cfg.pipeline == FLUX2 and {ALL, ALL_LINEAR}.intersection(cfg.lora_layers):
        flag, what = "lora_layers", "the layers of modulation and time"
    else:
        return None
    return (
        f"--{flag}: diffusers reads the file as trained; ComfyUI leaves out {what}, so what that"
        " draws is not what was trained."
    )


def write(cfg: Any, folder: Path, pipeline: Any) -> None:
    """Write the workflow beside the LoRA file; none where ComfyUI does not read that as trained."""
    path, kind = folder / workflow_file_name(folder), type(pipeline).__name__
    path.unlink(missing_ok=True)
    base = cfg.pretrained_model_name_or_path
    unread = remark(cfg) or get(cfg.method).exports_weights
    if unread or embedded(base) or (kind == SDXL and not cfg.output_kohya_format):
        return
    steps, guidance = of(pipeline).drawing(pipeline)
    own = cfg.each[0]
    prompt = own.trigger_word or own.instance_prompt or "a photo"
    sample = {"prompt": prompt, "steps": steps, "guidance": guidance}
    first = next(iter(cfg.samples), cfg.usual_sample)
    sample |= {name: value for name, value in first.items() if value is not None}
    checkpoint = CHECKPOINTS.get(base, Path(base).name.lower())
    graph = workflow(pipeline, checkpoint, kohya_file_name(folder), sample)
    write_text(path, json.dumps(graph, indent=1) + "\n")


def workflow(pipeline: Any, checkpoint: str, lora: str, sample: Mapping[str, Any]) -> Graph:
    """The nodes that draw one image of `DreamBoothConfig.samples` as the pipeline does, by the file
    of the model, without its ending, and that of the adapter.
    """
    kind, graph = type(pipeline).__name__, Graph()
    size = {side: sample[side] for side in ("width", "height")}
    steps, guidance, strength = (sample[name] for name in ("steps", "guidance", "strength"))
    prompt, against = sample["prompt"], sample["negative_prompt"]
    model, clip, vae = _loaded(graph, kind, checkpoint)
    given = {"model": model, "lora_name": lora, "strength_model": strength}
    if kind == SDXL:  # adapters of the text encoders may be in the file
        model = graph.add("LoraLoader", **given, clip=clip, strength_clip=strength)
        clip = [model[0], 1]
    else:
        model = graph.add("LoraLoaderModelOnly", **given)
        model = _shifted(graph, pipeline, model, size)
    positive = graph.add("CLIPTextEncode", clip=clip, text=prompt)
    zeros = kind == SDXL and pipeline.config.get("force_zeros_for_empty_prompt")
    if kind == FLUX or (zeros and not against):
        negative = graph.add("ConditioningZeroOut", conditioning=positive)
    else:
        negative = graph.add("CLIPTextEncode", clip=clip, text=against)
    if kind == FLUX:
        positive = graph.add("FluxGuidance", conditioning=positive, guidance=guidance)
    cfg = {FLUX: 1.0, Z_IMAGE: 1 + guidance, KREA2: 1 + guidance}.get(kind, max(1.0, guidance))
    told = {"model": model, "positive": positive, "negative": negative, "cfg": cfg}
    if kind == FLUX2:
        latent = graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=sample["seed"]),
            guider=graph.add("CFGGuider", **told),
            sampler=graph.add("KSamplerSelect", sampler_name="euler"),
            sigmas=graph.add("Flux2Scheduler", steps=steps, **size),
            latent_image=graph.add("EmptyFlux2LatentImage", **size, batch_size=1),
        )
    else:
        empty = "EmptyLatentImage" if kind == SDXL else "EmptySD3LatentImage"
        latent = graph.add(
            "KSampler",
            **told,
            latent_image=graph.add(empty, **size, batch_size=1),
            seed=sample["seed"],
            steps=steps,
            sampler_name="euler",
            scheduler=_scheduler(kind, steps),
            denoise=1,
        )
    image = graph.add("VAEDecode", samples=latent, vae=vae)
    graph.add("SaveImage", images=image, filename_prefix=Path(lora).stem)
    return graph


def _scheduler(kind: str, steps: int) -> str:
    """ComfyUI's scheduler with the levels of diffusers', or the nearest."""
    if kind == SDXL and 1000 % steps == 0:
        return "ddim_uniform"
    return "normal" if kind in (SDXL, SD3) else "simple"


def _loaded(graph: Graph, kind: str, checkpoint: str) -> tuple[Output, Output, Output]:
    """Model, text encoders and autoencoder."""
    file = f"{checkpoint}.safetensors"
    if kind in AUTOENCODERS:
        model = graph.add("UNETLoader", unet_name=file, weight_dtype="default")
        vae = graph.add("VAELoader", vae_name=f"{AUTOENCODERS[kind]}.safetensors")
    else:
        model = graph.add("CheckpointLoaderSimple", ckpt_name=file)
        vae = [model[0], 2]
    if kind == SDXL:
        return model, [model[0], 1], vae
    told, *names = ENCODERS[kind]
    if kind == FLUX2 and "4b" in checkpoint:
        names = ["qwen_3_4b"]
    places = ["clip_name"] if len(names) == 1 else [f"clip_name{i + 1}" for i in range(len(names))]
    files = {place: f"{name}.safetensors" for place, name in zip(places, names, strict=True)}
    clip = graph.add(LOADERS[len(names)], **files, **({"type": told} if told else {}))
    return model, clip, vae


def _shifted(graph: Graph, pipeline: Any, model: Output, size: dict[str, int]) -> Output:
    """The model with the shift of noise levels that the pipeline has at this size."""
    kind, family, config = type(pipeline).__name__, of(pipeline), pipeline.scheduler.config
    if kind == FLUX2:  # its scheduler's node has it
        return model
    dynamic = config.get("use_dynamic_shifting")
    mu = family.mu(pipeline, family.tokens(**size)) if dynamic else math.log(config.shift)
    if kind in (FLUX, KREA2):
        return graph.add("ModelSamplingFlux", model=model, max_shift=mu, base_shift=mu, **size)
    node = "ModelSamplingSD3" if kind == SD3 else "ModelSamplingAuraFlow"
    return graph.add(node, model=model, shift=math.exp(mu))
