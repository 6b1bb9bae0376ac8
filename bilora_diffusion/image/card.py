"""The model card of a DreamBooth run: its images, and the weights' use in Python and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from huggingface_hub import ModelCardData
from safetensors import safe_open

from .. import methods
from ..lora_names import FILE_NAME, kohya_file_name
from ..mini import FLOW, MINI, PIPELINES
from ..run.card import (
    code,
    escaped,
    is_hub_id,
    loaded_from,
    python_block,
    source,
    table,
    when_it_stopped,
    write_card,
)
from ..run.folder import FOLDS_FIGURE

MEASURED = {"held-out loss": "heldout_loss", "loss on the training images": "train_grid_loss"}
# Read in the sources: ComfyUI's weight_decompose (comfy/weight_adapter/base.py; the axis since its
# pull request 7727 of April 2025, the norm still so when pull request 15458 of August 2026 proposed
# to change it), Forge's copy of both (pull request 2856) and, beside it, A1111's
# apply_weight_decompose.
DORA = """\
These weights are DoRA's, whose scales programs read differently:

- diffusers reads {diffusers} as it was trained; of {kohya} it leaves out the scales.
- ComfyUI from 0.3.30 (April 2025) and Forge from May 2025 come close: they divide by the norms of
  the base weights instead of the changed ones.
- A1111, and ComfyUI and Forge before, take the scales along the wrong axis, which spoils the
  images: use another program, or train without `--use_dora`."""

IN_COMFYUI = f"""\
- **ComfyUI** reads {code(FILE_NAME)} itself for SD3, FLUX, Z-Image, Qwen-Image and Krea 2: put it,
  under a name of your own, into `models/loras`, and choose it in a *Load LoRA* node with a strength
  of 1.0, which is what was trained."""
DORA_IN_COMFYUI = f"""\
- These weights are DoRA's: diffusers reads {code(FILE_NAME)} as it was trained. **ComfyUI** leaves
  out the magnitudes in a file of this format, so what it draws is not what was trained: use
  diffusers, or train without `--use_dora`."""


def write_dreambooth_card(
    cfg: Any, folder: Path, results: dict[str, Any], repo_id: str | None
) -> None:
    """Write ``folder/README.md`` with the last validation images.

    Args:
        cfg: the run's configuration.
        folder: the run folder.
        results: steps, the held-out figures, and under "export" what was found of each model.
        repo_id: hub repository the folder goes to.
    """
    base, dataset = source(cfg.pretrained_model_name_or_path), cfg.dataset_name
    data = source(dataset or cfg.instance_data_dir)
    whole = methods.get(cfg.method).exports_weights
    step = results.get("best_step", results["steps"])
    files = sorted((folder / "validation" / f"step-{step}").glob("*.png"))
    prompts = cfg.sampled_prompts
    if len(files) != len(prompts):  # they are of an earlier setting of a resumed run
        files = prompts = []
    urls = [quote(file.relative_to(folder).as_posix()) for file in files]
    gallery = list(zip(prompts, urls, strict=True))
    measured = {title: results[key] for title, key in MEASURED.items() if key in results}
    trigger = cfg.trigger_word or cfg.instance_prompt
    flow = _of_transformer(folder)
    elsewhere = _other_programs(cfg, base, folder)
    if flow:
        elsewhere = [DORA_IN_COMFYUI if cfg.use_dora else IN_COMFYUI]
    use = [
        *_pipeline(base, cfg.pretrained_vae_model_name_or_path, flow),
        *(_whole_models(repo_id, results["export"]) if whole else _adapter(repo_id)),
        f"image = pipeline({(prompts or [trigger or 'a photo'])[0]!r}).images[0]",
        'image.save("image.png")',
    ]
    write_card(
        cfg,
        folder,
        results["steps"],
        meta=_front_matter(cfg, base, data, gallery, flow),
        base=_name(base),
        data=_name(data),
        use=[
            *(["## Trigger words", f"Use {code(trigger)} in the prompt."] if trigger else []),
            *("## Use", python_block(use)),
            *([] if whole else elsewhere),
        ],
        results=[
            *table("## Results", measured | when_it_stopped(cfg, results)),
            *([f"![Held-out loss of the folds]({FOLDS_FIGURE})"] if cfg.folds else []),
            *(["## Images"] if gallery else []),
            *(f"![{escaped(prompt)}]({url})\n\n{code(prompt)}" for prompt, url in gallery),
        ],
    )


def _of_transformer(folder: Path) -> bool:
    """Whether a run trained a flow-matching transformer, by the weights that it left."""
    file = folder / FILE_NAME
    if not file.is_file():
        return (folder / "transformer").is_dir()
    with safe_open(file, framework="pt") as weights:
        return any(key.startswith("transformer.") for key in weights.keys())  # noqa: SIM118


def _name(name: str) -> str:
    ours = {MINI: "bilora_diffusion's miniature", FLOW: "bilora_diffusion's mini-flow"}
    return ours.get(name, name)


def _front_matter(
    cfg: Any, base: str, data: str, gallery: Sequence[tuple[str, str]], flow: bool
) -> ModelCardData:
    whole = methods.get(cfg.method).exports_weights
    kinds = ["full-fine-tuning"] if whole else ["lora", "template:sd-lora"]
    tags = ["text-to-image", "diffusers", *kinds]
    if (
        base not in PIPELINES and not flow
    ):  # the miniature has SDXL's architecture, but its weights fit nothing else
        tags += ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"]
    return ModelCardData(
        library_name="diffusers",
        base_model=base if is_hub_id(base) else None,
        datasets=[data] if is_hub_id(data) else None,
        tags=list(dict.fromkeys([*tags, cfg.method])),
        instance_prompt=cfg.instance_prompt,
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in gallery] or None,
    )


def _pipeline(base: str, vae: str | None, flow: bool) -> list[str]:
    """Python that loads the base model, a flow model in bf16 (`Family.precision`)."""
    if base in PIPELINES:
        folder = PIPELINES[base].__name__
        return [
            "import torch",
            f"from bilora_diffusion.mini import {folder}",
            "from diffusers import DiffusionPipeline",
            "",
            # Its files are in half precision, in which Transformers would load the text encoders
            # and diffusers not the UNet.
            f"pipeline = DiffusionPipeline.from_pretrained({folder}(), dtype=torch.float32)",
        ]
    kinds, load, extra = "DiffusionPipeline", [], ""
    dtype = torch.bfloat16 if flow else torch.float16
    if vae:
        kinds, extra = f"AutoencoderKL, {kinds}", ", vae=vae"
        place = loaded_from(source(vae))
        load = [f"vae = AutoencoderKL.from_pretrained({place!r}, dtype={dtype})"]
    return [
        *("import torch", f"from diffusers import {kinds}", "", *load),
        "pipeline = DiffusionPipeline.from_pretrained(",
        f"    {loaded_from(base)!r}, dtype={dtype}{extra}",
        ').to("cuda")',
    ]


def _adapter(repo_id: str | None) -> list[str]:
    """Python that puts the adapter into the pipeline."""
    here, note = repo_id or ".", "" if repo_id else "  # this folder"
    return [f"pipeline.load_lora_weights({here!r}, weight_name={FILE_NAME!r}){note}"]


def _whole_models(repo_id: str | None, names: Sequence[str]) -> list[str]:
    """Python that puts whole models into the pipeline."""
    here, note = repo_id or ".", "" if repo_id else "  # this folder"
    return [
        f"pipeline.{name} = type(pipeline.{name}).from_pretrained({here!r}, subfolder={name!r})"
        f".to(pipeline.device, pipeline.dtype){note}"
        for name in names
    ]


def _other_programs(cfg: Any, base: str, folder: Path) -> list[str]:
    """Where to put which file in ComfyUI and web UIs, and how strong it acts."""
    diffusers = code(FILE_NAME)
    file = kohya_file_name(folder) if cfg.output_kohya_format else None
    kohya, name = code(file or ""), Path(file or "").stem
    if base in PIPELINES:
        shown = f"; {kohya} shows what a file for them looks like" if file else ""
        return [f"ComfyUI and A1111 don't know the miniature{shown}."]
    if file is None:
        return [
            f"ComfyUI and A1111 find nothing in {diffusers}; `python -m bilora_diffusion.export ."
            " --to kohya`, in this folder, writes the file for them."
        ]
    return [
        f"- In **ComfyUI**, put {kohya} into `models/loras`, and choose it in a *Load LoRA* node,"
        " with a strength of 1.0 for model and clip.\n"
        f"- In **A1111** or **Forge**, put {kohya} into `models/Lora`, and write"
        f" {code(f'<lora:{name}:1>')} into the prompt.\n"
        "- A strength of 1 is what was trained; less, such as 0.7, leaves more of the base model."
        f" {diffusers} is for diffusers: the other programs find nothing in it.",
        *([DORA.format(diffusers=diffusers, kohya=kohya)] if cfg.use_dora else []),
    ]
