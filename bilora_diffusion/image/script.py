"""DreamBooth from a command line: parse, build, fit, export.

accelerate launch train_dreambooth_bilora.py --dataset linoyts/3d_icon
python train_dreambooth_bilora.py --dataset mini --max_train_steps 20 --output_dir out
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..adapters.quantize import quantize
from ..core.errors import placed
from ..core.lora_names import FILE_NAME, kohya_file_name, workflow_file_name
from ..export.readback import verify
from ..export.writer import save_diffusers, save_models, training_facts
from ..methods import get
from ..run.heldout_part import chosen, copies
from ..train import running
from ..train.running import DTYPES, Script
from ..train.trainer import Trainer
from . import comfy
from .captions import Captions
from .card import write_dreambooth_card
from .concept_list import require_disjoint
from .config import DreamBoothConfig, resolve
from .dry_run import moments
from .listing import list_folder
from .opening import open_images
from .pipeline import load_base
from .sampling import generate
from .sets import ImageSet
from .stream import TrainingStream
from .task import DreamBooth

PRECISIONS = DTYPES | {"fp32": torch.float32}
logger = logging.getLogger(__name__)


def build_task(cfg: DreamBoothConfig, accelerator: Accelerator) -> DreamBooth:
    """Data first, since it is quick to refuse; then the models; then both on the device, where
    prompts are embedded. In a dry run models have no weights, and stay where they are.
    """
    instance = training_images(cfg)
    validation = heldout_images(cfg)
    held = None if validation is None else validation.pictures()
    if (held is not None or cfg.fit) and (line := copies("images", instance.pictures(), held)):
        logger.warning("%s", line)
    family = cfg.family
    # Frozen weights need no more than the arithmetic has; bf16 would lose small updates of others.
    dtypes = {"default": DTYPES[accelerator.mixed_precision]}
    if get(cfg.method).exports_weights:
        trained = [family.denoiser, *(family.encoders if cfg.train_text_encoder else ())]
        dtypes |= dict.fromkeys(trained, torch.float32)
    later = family.encoders if cfg.cache and not cfg.train_text_encoder else ()
    pipeline = load_base(cfg, dtypes, weights=not cfg.dry_run, later=later)
    of_model = family.remark(cfg.pretrained_model_name_or_path, pipeline)
    unguided = family.usual_sampling(pipeline)[1] == 0
    if unguided and any(sample.negative_prompt and not sample.guidance for sample in cfg.samples):
        logger.warning("%s draws without guidance, so negative prompts do nothing.", family.title)
    for remark in (of_model, comfy.remark(cfg)):
        if remark is not None:
            logger.warning("%s", remark)
    classes = None
    if cfg.with_prior_preservation:
        made = partial(class_images, accelerator=accelerator)
        classes = instance if cfg.dry_run else joined(cfg, made)
    task = DreamBooth(cfg, pipeline, TrainingStream(cfg, instance, classes), validation)
    if not cfg.dry_run:
        if cfg.quantize != "none":
            quantize_models(task, dtypes["default"], accelerator.device)
        task.to_device(accelerator.device)
    return task


def class_images(cfg: DreamBoothConfig, accelerator: Accelerator) -> ImageSet:
    """Class images of prior preservation, sampled from the base model until there are enough.

    The work is shared among processes; each image has a seed of its own, so that an interrupted
    run goes on where it stopped.
    """
    folder = Path(str(cfg.class_data_dir))
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(len(list_folder(folder).images), cfg.num_class_images)
    # Nobody may count after another process has begun to write.
    accelerator.wait_for_everyone()
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    if mine:
        precision = cfg.prior_generation_precision
        device = accelerator.device
        dtype = PRECISIONS[precision] if precision else cfg.family.precision(device)
        pipeline = load_base(cfg, dtype).to(device)
        batches = range(0, len(mine), cfg.sample_batch_size)
        for start in tqdm(batches, "class images", disable=not accelerator.is_main_process):
            part = mine[start : start + cfg.sample_batch_size]
            made = generate(
                pipeline,
                [str(cfg.class_prompt)] * len(part),
                [cfg.seed + number for number in part],
                size=cfg.resolution,
            )
            for number, image in zip(part, made, strict=True):
                mark = hashlib.sha256(image.tobytes()).hexdigest()[:12]
                image.save(folder / f"{number}-{mark}.png")
    accelerator.wait_for_everyone()
    plain = {"image_column": "image", "caption_column": "none", "mask_column": None}
    made = images(cfg, str(cfg.class_data_dir), **plain, alpha_mask=False)
    return made.only(range(min(len(made), cfg.num_class_images)))


def quantize_models(task: DreamBooth, dtype: torch.dtype, device: torch.device) -> None:
    """Hold the denoiser's weights in 4 bits; of a flow model, whose encoders are as large, theirs
    too, and these are let go of before the denoiser comes to the device.
    """
    if task.family.flow:
        later = task.pipeline.origin.later
        for name in task.family.encoders:
            model = getattr(task.pipeline, name)
            if name in later:
                later[name] = partial(_quantized, later[name], dtype, device)
            elif model is not None:
                quantize(model, dtype, device=device)
        task.embed(device)
    for name, model in task.models.items():
        count = quantize(model, dtype, device=device)
        logger.info("%s: the weights of %d layers are held in NF4", name, count)


def _quantized(read: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
    model = read()
    quantize(model, dtype, device=device)
    return model


def images(
    cfg: DreamBoothConfig, dataset: str, config_name: str | None = None, **changed: Any
) -> ImageSet:
    """An image set with its captions, opened as the configuration says but for what is changed."""
    options = ("image_column", "caption_column", "mask_column", "alpha_mask", "cache_dir")
    options = {name: getattr(cfg, name) for name in (*options, "skip_bad_images")}
    opened = open_images(dataset, config_name=config_name, **options | changed)
    for line in opened.remarks():
        logger.warning("%s", line)
    return opened


def joined(
    cfg: DreamBoothConfig, opened: Callable[[DreamBoothConfig], ImageSet | None]
) -> ImageSet | None:
    """One set of what is opened for each concept, named where it is refused; else the run's own."""
    if not cfg.concepts:
        return opened(cfg)
    sets = {}
    for number, own in enumerate(cfg.concept_configs, start=1):
        with placed(f"{cfg.source}, concept {number}: "):
            sets[own.concept] = opened(own)
    return ImageSet.joined(cfg.source, sets)


def training_images(cfg: DreamBoothConfig) -> ImageSet:
    """The images that the run learns from, of all concepts."""

    def opened(own: DreamBoothConfig) -> ImageSet:
        its = images(own, own.source, own.dataset_config_name)
        its.require_masks()
        Captions(own, its)  # refuses what the stream's would, with its place and before loading
        return its

    training = cast(ImageSet, joined(cfg, opened))  # no concept is without images
    if cfg.concepts:
        require_disjoint(cfg.source, training)
    return training


def heldout_images(cfg: DreamBoothConfig) -> ImageSet | None:
    """The images that the run measures its loss on, of all concepts; None where it has none."""

    def opened(own: DreamBoothConfig) -> ImageSet | None:
        if not own.validation_dataset:
            return None
        its = images(own, own.validation_dataset)
        names = [entry.name for entry in its.entries]
        return its.only(chosen(own.validation_part, names, its.label))

    return joined(cfg, opened)


def export(cfg: DreamBoothConfig, trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Write the trained weights as they are now; returns a comparison of them with the files."""
    task: Any = trainer.task
    if trainer.method.exports_weights:
        return save_models(folder, task.models)
    save_diffusers(
        folder,
        task.models,
        base_model=cfg.pretrained_model_name_or_path,
        kohya=cfg.output_kohya_format,
        extra_metadata=training_facts(cfg.to_dict(), trainer.outcome.step(trainer.step)),
    )
    comfy.write(cfg, folder, task.pipeline)
    return verify(folder, task.models)


def files(folder: Path) -> dict[str, str]:
    """Uses of the files that a run leaves, and their names."""
    return {
        "for diffusers": FILE_NAME,
        "for ComfyUI, A1111": kohya_file_name(folder),
        "UNet": "unet",
        "transformer": "transformer",
        "workflow for ComfyUI": workflow_file_name(folder),
        "model card": "README.md",
        "images": "validation",
    }


DREAMBOOTH = Script(
    "dreambooth-bilora",
    resolve,
    build_task,
    export,
    write_dreambooth_card,
    "eval.clip_scores",
    files,
    moments,
)


def main(argv: Sequence[str] | None = None, config: DreamBoothConfig | None = None) -> None:
    """Train as the command line says and leave a run folder; see `running.main`."""
    running.main(DREAMBOOTH, argv, config)
