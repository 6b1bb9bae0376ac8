"""Workflows for ComfyUI: the graph is connected, and the noise levels equal those of diffusers.

The formulas for ComfyUI's levels are from its comfy/samplers.py, comfy/model_sampling.py and nodes
of 2026.
"""

import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from bilora_diffusion.image import comfy
from bilora_diffusion.image.families import FAMILIES, SDXL, family_class
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.image.validation import ValidationSample
from tests.export.comfy_names import NAMES
from tests.image.tiny import FILES, make_pipeline

STEPS = 5
SIDE = 64
# Pipelines whose LoRA files ComfyUI reads.
READABLE = [kind for kind in FAMILIES if family_class(kind, kind).comfyui is not None]


def pipeline_of(kind):
    return load_pipeline("mini", dtype=torch.float32) if kind == SDXL else make_pipeline(kind)


def graph_of(pipeline, guidance_from="adapter", negative_prompt=""):
    size = (SIDE, SIDE)
    sample = ValidationSample("a fox", negative_prompt, 3, 1.0, *size, 2.5, STEPS, guidance_from)
    return comfy.workflow(pipeline, "model", "dog.safetensors", sample)


def nodes(graph, *kinds):
    return [node["inputs"] for node in graph.values() if node["class_type"] in kinds]


def shift_times(shift, times):
    return shift * times / (1 + (shift - 1) * times)


def sdxl_levels(steps):
    """Return every n-th level of a scaled linear schedule, as ComfyUI's "ddim_uniform"."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    levels = ((1 - alphas) / alphas).sqrt()
    return levels[1 :: 1000 // steps].flip(0).float()


def comfy_levels(graph):
    """Return a workflow's noise levels in order, without the final 0."""
    # FLUX.2 has a node for its levels instead of a KSampler.
    for scheduler in nodes(graph, "Flux2Scheduler"):
        tokens = scheduler["width"] * scheduler["height"] // 16**2
        mu = compute_empirical_mu(tokens, scheduler["steps"])
        return shift_times(math.exp(mu), torch.linspace(1, 0, scheduler["steps"] + 1)[:-1])
    (sampler,) = nodes(graph, "KSampler")
    steps = sampler["steps"]
    if sampler["scheduler"] == "ddim_uniform":
        return sdxl_levels(steps)
    (model,) = nodes(graph, "ModelSamplingFlux", "ModelSamplingSD3", "ModelSamplingAuraFlow")
    if "shift" in model:
        shift = model["shift"]
    else:  # FLUX interpolates between two shifts by image size; here they are equal
        assert model["max_shift"] == model["base_shift"]
        shift = math.exp(model["max_shift"])
    if sampler["scheduler"] == "normal":
        # ComfyUI's lowest time is 1 / 1000, not 0.
        last_level = shift_times(shift, 0.001)
        return shift_times(shift, torch.linspace(1, last_level, steps))
    assert sampler["scheduler"] == "simple"
    return shift_times(shift, 1 - torch.arange(steps) / steps)


@pytest.mark.parametrize("kind", READABLE)
def test_a_workflows_noise_levels_equal_those_of_diffusers(kind, monkeypatch):
    pipeline = pipeline_of(kind)
    levels = []
    scheduler: Any = EulerDiscreteScheduler if kind == SDXL else FlowMatchEulerDiscreteScheduler
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # pipelines read its signature
    def record(self, *args, **values):
        set_timesteps(self, *args, **values)
        levels.append(self.sigmas[:-1].float().clone())

    monkeypatch.setattr(scheduler, "set_timesteps", record)
    generate(pipeline, ["a fox"], [3], size=SIDE, steps=STEPS, guidance_scale=2.5)
    torch.testing.assert_close(comfy_levels(graph_of(pipeline)), levels[0], rtol=1e-4, atol=1e-5)


def links_of(node):
    """Return the numbers of the nodes whose outputs are inputs of this node."""
    return [value[0] for value in node["inputs"].values() if isinstance(value, list)]


def final_classes(graph):
    """Return the classes of the nodes whose output no other node uses."""
    read_numbers = set()
    for number, node in graph.items():
        for link in links_of(node):
            assert int(link) < int(number)  # so there is no cycle
            read_numbers.add(link)
    return [node["class_type"] for number, node in graph.items() if number not in read_numbers]


@pytest.mark.parametrize("kind", READABLE)
def test_a_workflow_is_connected_and_has_the_samples_settings(kind):
    graph = graph_of(pipeline_of(kind))
    assert final_classes(graph) == ["SaveImage"]
    (lora,) = nodes(graph, "LoraLoader", "LoraLoaderModelOnly")
    assert (lora["lora_name"], lora["strength_model"]) == ("dog.safetensors", 1)
    assert nodes(graph, "CLIPTextEncode")[0]["text"] == "a fox"
    (guided,) = nodes(graph, "KSampler", "CFGGuider")
    scales = {"FluxPipeline": 1.0, "ZImagePipeline": 3.5, "Krea2Pipeline": 3.5}
    assert guided["cfg"] == scales.get(kind, 2.5)


@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind != "FluxPipeline"])
@pytest.mark.parametrize("negative_prompt", ["", "blurry"])
@pytest.mark.parametrize("guidance_from", ["base", 0.25])
def test_guidance_from_another_model_applies_the_adapter_through_hooks(
    kind, guidance_from, negative_prompt
):
    """The adapter acts on the prompt, and at strength `guidance_from` on the negative prompt."""
    pipeline = pipeline_of(kind)
    if kind == SDXL:  # as in SDXL base, but not in the miniature
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    graph = graph_of(pipeline, guidance_from, negative_prompt)
    assert final_classes(graph) == ["SaveImage"]

    def strengths(number):
        """Return class and strength of each adapter node that this node depends on."""
        node = graph[number]
        pairs = set()
        if "lora_name" in node["inputs"]:
            assert node["inputs"]["lora_name"] == "dog.safetensors"
            assert node["inputs"].get("strength_clip") in (None, node["inputs"]["strength_model"])
            pairs.add((node["class_type"], node["inputs"]["strength_model"]))
        for link in links_of(node):
            pairs |= strengths(link)
        return pairs

    (guided,) = nodes(graph, "KSampler", "CFGGuider")
    assert strengths(guided["model"][0]) == set()
    positive = {("CreateHookLoraModelOnly", 1.0)}
    negative = set()
    if guidance_from != "base":
        negative.add(("CreateHookLoraModelOnly", guidance_from))
    if kind == SDXL:  # its file may contain adapters of the text encoders
        positive.add(("LoraLoader", 1.0))
        if negative_prompt and negative:
            negative.add(("LoraLoader", guidance_from))
    if nodes(graph, "ConditioningZeroOut"):  # it sets the prompt's embedding to zero
        negative |= positive - {("CreateHookLoraModelOnly", 1.0)}
    assert strengths(guided["positive"][0]) == positive
    assert strengths(guided["negative"][0]) == negative


def test_exactly_the_models_that_comfyui_reads_have_a_workflow():
    readable = {kind for kind in FILES if type(make_pipeline(kind).transformer).__name__ in NAMES}
    assert readable | {SDXL} == set(READABLE)


@pytest.mark.parametrize("kind", [SDXL, *FILES])
def test_a_run_gets_a_remark_if_comfyui_misreads_its_adapter(kind):
    def has_remark(lora_layers=(), use_dora=False):
        family = family_class(kind, kind)()
        cfg: Any = SimpleNamespace(
            pipeline=kind, family=family, lora_layers=lora_layers, use_dora=use_dora
        )
        return comfy.remark(cfg) is not None

    assert has_remark() == (kind not in READABLE)
    assert has_remark(["to_q", "all"]) == (kind not in READABLE or kind == "Flux2KleinPipeline")
    assert has_remark(use_dora=True) == (kind != SDXL)
