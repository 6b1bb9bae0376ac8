"""The workflow for ComfyUI: it hangs together, and its noise levels are those of diffusers.

ComfyUI's formulas are those of its comfy/samplers.py, comfy/model_sampling.py and nodes of 2026.
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

STEPS, SIDE = 5, 64
KINDS = {kind: family_class(kind, kind) for kind in FAMILIES}
READ = [kind for kind, family in KINDS.items() if family.comfyui is not None]


def pipeline_of(kind):
    return load_pipeline("mini", dtype=torch.float32) if kind == SDXL else make_pipeline(kind)


def graph_of(pipeline, guidance_from="adapter"):
    sample = ValidationSample("a fox", "", 3, 1.0, SIDE, SIDE, 2.5, STEPS, guidance_from)
    return comfy.workflow(pipeline, "model", "dog.safetensors", sample)


def nodes(graph, *kinds):
    return [node["inputs"] for node in graph.values() if node["class_type"] in kinds]


def time_shift(alpha, times):
    return alpha * times / (1 + (alpha - 1) * times)


def comfy_levels(graph):
    """Noise levels of a workflow from the first to the last before 0."""
    if nodes(graph, "Flux2Scheduler"):
        (flux_scheduler,) = nodes(graph, "Flux2Scheduler")
        mu = compute_empirical_mu(
            flux_scheduler["width"] * flux_scheduler["height"] // 256, flux_scheduler["steps"]
        )
        return time_shift(math.exp(mu), torch.linspace(1, 0, flux_scheduler["steps"] + 1)[:-1])
    (sampler,) = nodes(graph, "KSampler")
    steps, scheduler = sampler["steps"], sampler["scheduler"]
    if scheduler == "ddim_uniform":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        levels = ((1 - alphas) / alphas).sqrt()
        return levels[1 :: 1000 // steps].flip(0).float()
    if flux := nodes(graph, "ModelSamplingFlux"):
        assert flux[0]["max_shift"] == flux[0]["base_shift"]
        alpha = math.exp(flux[0]["max_shift"])
    else:
        alpha = nodes(graph, "ModelSamplingSD3", "ModelSamplingAuraFlow")[0]["shift"]
    if scheduler == "normal":
        last_level = time_shift(alpha, torch.tensor(0.001)).item()
        return time_shift(alpha, torch.linspace(1, last_level, steps))
    assert scheduler == "simple"
    return time_shift(alpha, 1 - torch.arange(steps) / steps)


@pytest.mark.parametrize("kind", READ)
def test_the_noise_levels_are_those_of_diffusers(kind, monkeypatch):
    pipeline, levels = pipeline_of(kind), []
    scheduler: Any = EulerDiscreteScheduler if kind == SDXL else FlowMatchEulerDiscreteScheduler
    original = scheduler.set_timesteps

    @functools.wraps(original)
    def recording(self, *args, **values):
        original(self, *args, **values)
        levels.append(self.sigmas[:-1].float().clone())

    monkeypatch.setattr(scheduler, "set_timesteps", recording)
    generate(pipeline, ["a fox"], [3], size=SIDE, steps=STEPS, guidance_scale=2.5)
    torch.testing.assert_close(comfy_levels(graph_of(pipeline)), levels[0], rtol=1e-4, atol=1e-5)


def ends(graph):
    """Classes of the nodes that serve no other; each is served by those before it."""
    serving = set()
    for number, node in graph.items():
        links = [value[0] for value in node["inputs"].values() if isinstance(value, list)]
        assert all(int(link) < int(number) for link in links)  # what comes before, so no circle
        serving.update(links)
    return [node["class_type"] for number, node in graph.items() if number not in serving]


@pytest.mark.parametrize("kind", READ)
def test_a_workflow_hangs_together(kind):
    graph = graph_of(pipeline_of(kind))
    assert ends(graph) == ["SaveImage"]  # all serve it
    (lora,) = nodes(graph, "LoraLoader", "LoraLoaderModelOnly")
    assert (lora["lora_name"], lora["strength_model"]) == ("dog.safetensors", 1)
    assert nodes(graph, "CLIPTextEncode")[0]["text"] == "a fox"
    (guided,) = nodes(graph, "KSampler", "CFGGuider")
    scales = {"FluxPipeline": 1.0, "ZImagePipeline": 3.5, "Krea2Pipeline": 3.5}
    assert guided["cfg"] == scales.get(kind, 2.5)


@pytest.mark.parametrize("kind", [kind for kind in READ if kind != "FluxPipeline"])
def test_with_guidance_from_the_base_model_the_adapter_acts_on_the_prompt_alone(kind):
    graph = graph_of(pipeline_of(kind), "base")
    assert ends(graph) == ["SaveImage"]

    def kinds_before(link):
        """Classes of all nodes that an input depends on."""
        node = graph[link[0]]
        kinds = {node["class_type"]}
        for value in node["inputs"].values():
            if isinstance(value, list):
                kinds |= kinds_before(value)
        return kinds

    (guided,) = nodes(graph, "KSampler", "CFGGuider")
    loras = {"LoraLoader", "LoraLoaderModelOnly", "CreateHookLoraModelOnly"}
    assert "CreateHookLoraModelOnly" in kinds_before(guided["positive"])
    assert not loras & kinds_before(guided["model"])
    if "ConditioningZeroOut" not in kinds_before(guided["negative"]):
        assert not loras & kinds_before(guided["negative"])
    assert "CreateHookLoraModelOnly" not in kinds_before(guided["negative"])
    for lora in nodes(graph, *loras):
        assert (lora["lora_name"], lora["strength_model"]) == ("dog.safetensors", 1)


def test_every_model_that_comfyui_reads_has_a_workflow_and_no_other():
    readable = {kind for kind in FILES if type(make_pipeline(kind).transformer).__name__ in NAMES}
    assert readable | {SDXL} == set(READ)
    cases = {"plain": ([], False), "all": (["to_q", "all"], False), "dora": ([], True)}
    misread = {(c, kind) for c in cases for kind in FILES if c == "dora" or kind not in readable}
    for case, (layers, dora) in cases.items():
        for kind in (*FILES, SDXL):
            facts = {"pipeline": kind, "family": KINDS[kind]()}
            cfg: Any = SimpleNamespace(**facts, lora_layers=layers, use_dora=dora)
            reads = (case, kind) not in misread | {("all", "Flux2KleinPipeline")}
            assert (comfy.remark(cfg) is None) == reads, (case, kind)
