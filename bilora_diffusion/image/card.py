"""The model card of a DreamBooth run, with sample images and a code example."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData

from .. import methods
from ..config.lora_sources import LoraSource
from ..core.lora_names import (
    FILE_NAME,
    base_workflow_file_name,
    kohya_file_name,
    workflow_file_name,
)
from ..core.values import (
    HELDOUT_LOSS,
    MEASURE_TITLES,
    TRAINING_GRID_LOSS,
    unconditional_strength,
)
from ..mini import FLOW, MINI, PIPELINES
from ..run.hub import is_hub_id, loaded_from, public_name, write_card
from ..run.record import BY_CONCEPT, validation_folder
from . import comfy
from .captions import concept_words
from .config import DreamBoothConfig
from .families.base import Family, Unconditional
from .schedulers import read_scheduler
from .validation import INDEX, read_index

# Title of a row of the card's table -> key in a run's results.
MEASURED = {
    **{title: name for name, title in MEASURE_TITLES.items()},
    "loss on the training images": TRAINING_GRID_LOSS,
}
EMBEDDED_TITLES = {MINI: "bilora_diffusion's miniature", FLOW: "bilora_diffusion's mini-flow"}


def _gallery(folder: Path, step: int, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the prompt and the relative, quoted URL of each validation image of a step."""
    images_folder = validation_folder(folder, step)
    gallery = []
    for image in read_index(images_folder / INDEX, config):
        file = images_folder / image.file
        if file.is_file():
            gallery.append((image.prompt, quote(file.relative_to(folder).as_posix())))
    return gallery


def _tags(cfg: DreamBoothConfig, base: str) -> list[str]:
    """Return the tags for the hub's search."""
    tags = ["text-to-image", "diffusers"]
    if methods.get(cfg.method).exports_weights:
        tags.append("full-fine-tuning")
    else:
        tags += ["lora", "template:sd-lora"]
    # The miniature has SDXL's architecture, but its LoRA fits no other model.
    if base not in PIPELINES and not cfg.family.flow:
        tags += ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]
    tags.append(cfg.method)
    return list(dict.fromkeys(tags))


def write_dreambooth_card(
    cfg: DreamBoothConfig, folder: Path, results: dict[str, Any], repo_id: str | None
) -> None:
    """Write ``folder/README.md`` with the validation images of the exported step.

    Args:
        results: the run's results: steps, held-out losses and the export's report.
        repo_id: hub repository that the run is pushed to, if any.
    """
    base = public_name(cfg.pretrained_model_name_or_path)
    concepts = cfg.concept_configs
    sources = [public_name(concept.source) for concept in concepts]

    # Validation images of the exported weights, which with --keep_best can be an earlier step's.
    step = results.get("best_step", results["steps"])
    prompts = cfg.sampled_prompts
    gallery = _gallery(folder, step, vars(cfg))
    # Images are missing, or a resumed run has other prompts.
    if [prompt for prompt, _ in gallery] != prompts:
        gallery, prompts = [], []
    words = [concept_words(concept.trigger_word, concept.instance_prompt) for concept in concepts]
    triggers = list(dict.fromkeys(filter(None, words)))

    instance_prompts = [concept.instance_prompt for concept in concepts]
    front_matter = ModelCardData(
        library_name="diffusers",
        base_model=base if is_hub_id(base) else None,
        datasets=list(filter(is_hub_id, sources)) or None,
        tags=_tags(cfg, base),
        instance_prompt=next(filter(None, instance_prompts), None),
        widget=[{"text": text, "output": {"url": url}} for text, url in gallery] or None,
    )
    write_card(
        vars(cfg),
        folder,
        results,
        meta=front_matter,
        # The table of results.
        heading="Results",
        measured=_result_rows(cfg, results),
        loss_ranks_no_images=HELDOUT_LOSS in results,
        # What was trained.
        title=EMBEDDED_TITLES.get(base, base),
        data=", ".join(EMBEDDED_TITLES.get(name, name) for name in sources),
        triggers=triggers,
        prompt=(prompts or triggers or ["a photo"])[0],
        gallery=gallery,
        **_loading(cfg, base, results),
        **_files(cfg, folder, repo_id),
    )


def _result_rows(cfg: DreamBoothConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the run measured, by their titles in the table of results."""
    metrics = dict(MEASURED)
    for options in cfg.concepts:
        name = options["concept"]
        metrics[f"held-out loss of {name}"] = f"{BY_CONCEPT}{name}"
    return {title: results[key] for title, key in metrics.items() if key in results}


def _loading(cfg: DreamBoothConfig, base: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for the card's code example, which loads the pipeline and the weights.

    Args:
        base: the base model's name in the card.
        results: the run's results, with the export's report.
    """
    family = cfg.family
    exports_models = methods.get(cfg.method).exports_weights
    # The code shows guidance from the base model (or at the validation images' strength) if a few
    # lines are enough, that is, if the unconditional rows are the first rows of a batch. They are
    # not enough for DoRA, which also scales the base model's output, or for text encoders with
    # adapters, which would embed the negative prompt.
    denoiser_by_rows = None
    is_plain = not (exports_models or cfg.use_dora or cfg.train_text_encoder)
    if family.unconditional is Unconditional.FIRST_ROWS and is_plain:
        denoiser_by_rows = family.denoiser
    # A guided target trains guidance into the weights.
    is_guided_target = cfg.guided_target > 1
    sampling_lora = cfg.lora_sources.get("sampling_lora")
    # With a sampling LoRA, the code would scale both LoRAs.
    if is_guided_target or sampling_lora is not None:
        denoiser_by_rows = None
    strength = unconditional_strength(cfg.validation_guidance_from)
    vae = cfg.pretrained_vae_model_name_or_path
    return {
        "miniature": PIPELINES[base].__name__ if base in PIPELINES else None,
        "base": loaded_from(base),
        "vae": loaded_from(public_name(vae)) if vae else None,
        "dtype": "torch.bfloat16" if family.flow else "torch.float16",  # see `Family.precision`
        "flow": family.flow,
        "dora": cfg.use_dora,
        "misread": comfy.remark(cfg),
        "denoiser_by_rows": denoiser_by_rows,
        "unconditional_strength": strength if strength < 1 else 0.0,
        "guidance": family.default_guidance,
        "guided_target": cfg.guided_target if is_guided_target else None,
        **_sampler(cfg, sampling_lora),
        "models": list(results["export"]) if exports_models else [],
        "warns_of_encoders": _warns_of_encoders(family) and not cfg.train_text_encoder,
    }


def _warns_of_encoders(family: Family) -> bool:
    """Return whether diffusers' loader warns about text encoders without keys in a LoRA file."""
    import diffusers

    return hasattr(getattr(diffusers, family.pipeline), "load_lora_into_text_encoder")


def _sampler(cfg: DreamBoothConfig, sampling_lora: LoraSource | None) -> dict[str, Any]:
    """Return the values for the code that samples with the settings of the validation images."""
    scheduler = None
    if cfg.sampling_scheduler is not None:
        kind, settings = read_scheduler(cfg.sampling_scheduler)
        scheduler = {"name": kind.__name__, "settings": settings}
    arguments: dict[str, Any] = {}
    if cfg.guided_target > 1:
        arguments["guidance_scale"] = cfg.family.unguided_scale
    if cfg.sampler_settings:
        arguments |= {
            "num_inference_steps": cfg.validation_num_inference_steps,
            "guidance_scale": cfg.validation_guidance_scale,
        }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    return {
        "sampling_lora": sampling_lora,
        "validation_model": public_name(cfg.validation_model) if cfg.validation_model else None,
        "scheduler": scheduler,
        "arguments": "".join(f", {name}={value:g}" for name, value in arguments.items()),
    }


def _files(cfg: DreamBoothConfig, folder: Path, repo_id: str | None) -> dict[str, Any]:
    """Return the names of the files in the run folder or on the hub, for the card."""
    workflow = workflow_file_name(folder)
    base_workflow = base_workflow_file_name(folder)
    return {
        "repo": repo_id,
        "here": repo_id or ".",
        "note": "" if repo_id else "  # this folder",
        "file": FILE_NAME,
        "kohya": kohya_file_name(folder) if cfg.output_kohya_format else None,
        "lora": kohya_file_name(folder),
        "base_workflow": base_workflow if (folder / base_workflow).is_file() else None,
        "workflow": workflow if (folder / workflow).is_file() else None,
    }
