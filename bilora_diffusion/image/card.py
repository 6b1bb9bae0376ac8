"""The model card of a DreamBooth run: its images, and the weights' use in Python and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData

from .. import methods
from ..core.lora_names import (
    FILE_NAME,
    base_workflow_file_name,
    kohya_file_name,
    workflow_file_name,
)
from ..mini import FLOW, MINI, PIPELINES
from ..run.hub import is_hub_id, loaded_from, source, write_card
from ..run.record import BY_CONCEPT, validation_folder
from . import comfy
from .config import DreamBoothConfig
from .families.base import Unconditional
from .validation import INDEX, read_index

MEASURED = {"held-out loss": "heldout_loss", "loss on the training images": "train_grid_loss"}
OURS = {MINI: "bilora_diffusion's miniature", FLOW: "bilora_diffusion's mini-flow"}


def _gallery(folder: Path, step: int, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Prompt and address of each validation image of a step."""
    images_folder = validation_folder(folder, step)
    gallery = []
    for image in read_index(images_folder / INDEX, config):
        file = images_folder / image.file
        if file.is_file():
            gallery.append((image.prompt, quote(file.relative_to(folder).as_posix())))
    return gallery


def write_dreambooth_card(
    cfg: DreamBoothConfig, folder: Path, results: dict[str, Any], repo_id: str | None
) -> None:
    """Write ``folder/README.md`` with the last validation images; ``results`` has steps, held-out
    figures and, under "export", what was found of each model.
    """
    base = source(cfg.pretrained_model_name_or_path)
    sources = [source(concept.source) for concept in cfg.concept_configs]
    exports_models, is_flow = methods.get(cfg.method).exports_weights, cfg.family.flow
    # With --keep_best the weights, and so the images, are those of an earlier step.
    step = results.get("best_step", results["steps"])
    prompts = cfg.sampled_prompts
    gallery = _gallery(folder, step, vars(cfg))
    if [prompt for prompt, _ in gallery] != prompts:  # of an earlier setting of a resumed run
        gallery, prompts = [], []
    words = [concept.trigger_word or concept.instance_prompt for concept in cfg.concept_configs]
    triggers = list(dict.fromkeys(filter(None, words)))
    instance_prompts = [concept.instance_prompt for concept in cfg.concept_configs]
    workflow, base_workflow = workflow_file_name(folder), base_workflow_file_name(folder)
    vae = cfg.pretrained_vae_model_name_or_path
    metrics = dict(MEASURED)
    for concept in cfg.concepts:
        name = concept["concept"]
        metrics[f"held-out loss of {name}"] = f"{BY_CONCEPT}{name}"
    tags = ["text-to-image", "diffusers"]
    tags += ["full-fine-tuning"] if exports_models else ["lora", "template:sd-lora"]
    # The miniature has SDXL's architecture, but its weights fit nothing else.
    if base not in PIPELINES and not is_flow:
        tags += ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]
    # The rows of one batch are told apart by their place. DoRA scales the base's output too, and
    # text encoders with adapters would embed the negative prompt.
    is_by_rows = cfg.family.unconditional is Unconditional.FIRST_ROWS
    is_plain = not (exports_models or cfg.use_dora or cfg.train_text_encoder)
    write_card(
        vars(cfg),
        folder,
        results,
        meta=ModelCardData(
            library_name="diffusers",
            base_model=base if is_hub_id(base) else None,
            datasets=list(filter(is_hub_id, sources)) or None,
            tags=list(dict.fromkeys([*tags, cfg.method])),
            instance_prompt=next(filter(None, instance_prompts), None),
            widget=[{"text": text, "output": {"url": url}} for text, url in gallery] or None,
        ),
        heading="Results",
        measured={title: results[key] for title, key in metrics.items() if key in results},
        loss_ranks_no_images="heldout_loss" in results,
        title=OURS.get(base, base),
        data=", ".join(OURS.get(data, data) for data in sources),
        triggers=triggers,
        prompt=(prompts or triggers or ["a photo"])[0],
        gallery=gallery,
        miniature=PIPELINES[base].__name__ if base in PIPELINES else None,
        base=loaded_from(base),
        vae=loaded_from(source(vae)) if vae else None,
        dtype="torch.bfloat16" if is_flow else "torch.float16",  # see `Family.precision`
        flow=is_flow,
        dora=cfg.use_dora,
        misread=comfy.remark(cfg),
        denoiser_by_rows=cfg.family.denoiser if is_by_rows and is_plain else None,
        guidance=cfg.family.guidance,
        models=list(results["export"]) if exports_models else [],
        # SDXL's loader asks for each encoder's keys, loaders of transformers only where there are.
        warns_of_encoders=not is_flow and not cfg.train_text_encoder,
        repo=repo_id,
        here=repo_id or ".",
        note="" if repo_id else "  # this folder",
        file=FILE_NAME,
        kohya=kohya_file_name(folder) if cfg.output_kohya_format else None,
        lora=kohya_file_name(folder),
        base_workflow=base_workflow if (folder / base_workflow).is_file() else None,
        workflow=workflow if (folder / workflow).is_file() else None,
    )
