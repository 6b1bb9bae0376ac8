"""The training script for image models: configuration, task and exported files.

accelerate launch train_dreambooth_bilora.py --dataset linoyts/3d_icon
python train_dreambooth_bilora.py --dataset mini --max_train_steps 20 --output_dir out
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..adapters.quantize import quantize
from ..core.errors import add_source
from ..core.files import counted
from ..core.lora_names import (
    FILE_NAME,
    base_workflow_file_name,
    kohya_file_name,
    workflow_file_name,
)
from ..export.writer import save_diffusers, save_models, training_facts
from ..methods import get
from ..run.data import choose_samples, describe_copies
from ..run.record import CONTACT_SHEET, VALIDATION
from ..train import command
from ..train.engine import DTYPES, PRECISIONS
from ..train.setup import Script
from ..train.trainer import Trainer
from . import comfy
from .captions import Captions, fixed_texts
from .card import write_dreambooth_card
from .concept_list import require_disjoint
from .config import DreamBoothConfig
from .contact_sheet import write_contact_sheet
from .image_files import list_folder
from .look_alikes import describe_pairs, find_look_alikes
from .opening import open_images
from .pipeline import load_base, memory_by_phase
from .prompt_length import PromptLength
from .sampling import generate
from .sets import ImageSet
from .stream import TrainingStream
from .task import DreamBooth
from .validation_model import load_validation_model

# Matches the file name of a generated class image: its number and a hash of its pixels.
CLASS_IMAGE = re.compile(r"(\d+)-[0-9a-f]{12}\.png")
# Fewer training images than this cause a warning.
FEW_IMAGES = 5
logger = logging.getLogger(__name__)


class DreamBoothScript(Script[DreamBoothConfig]):
    """The training script for image models."""

    config_class = DreamBoothConfig
    project = "dreambooth-bilora"
    scorer = "eval.clip_scores"

    def build_task(self, cfg: DreamBoothConfig, accelerator: Accelerator) -> DreamBooth:
        """Load the images and the models, and move the models to the device.

        In a dry run the models have no weights and are not moved.
        """
        # Images come first, since errors in them are found faster.
        training = training_images(cfg)
        heldout = heldout_images(cfg)
        warn_of_copies(training, heldout)

        family = cfg.family
        # Frozen weights have the precision of the computation. Trained weights are in fp32, since
        # small updates would be lost in bf16.
        dtypes = {"default": DTYPES[accelerator.mixed_precision]}
        if get(cfg.method).exports_weights:
            dtypes[family.denoiser] = torch.float32
            if cfg.train_text_encoder:
                dtypes |= dict.fromkeys(family.encoders, torch.float32)
        # With a cache on disk, text encoders are loaded only if a prompt is missing in it.
        deferred_parts = ()
        if cfg.cache and not cfg.train_text_encoder:
            deferred_parts = family.encoders
        pipeline = load_base(cfg, dtypes, weights=not cfg.dry_run, deferred_parts=deferred_parts)
        warn_of_model(cfg, pipeline)
        warn_of_long_captions(cfg, pipeline, training)
        denoiser_dtype = dtypes.get(family.denoiser, dtypes["default"])
        validation_model = load_validation_model(
            cfg, pipeline, denoiser_dtype, weights=not cfg.dry_run
        )

        class_set = None
        if cfg.with_prior_preservation:
            if cfg.dry_run:
                class_set = training  # a stand-in, since no images are generated
            else:
                class_set = join_sets(cfg, partial(class_images, accelerator=accelerator))
        stream = TrainingStream(cfg, training, class_set)
        task = DreamBooth(cfg, pipeline, stream, heldout, validation_model)
        if not cfg.dry_run:
            if cfg.quantize != "none":
                quantize_models(task, dtypes["default"], accelerator.device)
            task.to_device(accelerator.device)
        return task

    def memory_by_phase(self, task: Any, device: torch.device) -> dict[str, dict[str, int]]:
        return memory_by_phase(task, device)

    def write_contact_sheet(self, trainer: Trainer, folder: Path) -> None:
        task: Any = trainer.task
        path = folder / CONTACT_SHEET
        write_contact_sheet(task.stream, path, trainer.layout.step_size)

    def cpu_bytes(self, task: Any, device: torch.device) -> dict[str, int]:
        if device.type == "cpu" or task.validation_model is None:
            return {}
        return {"the weights of --validation_model": task.validation_model.bytes_}

    def export(self, cfg: DreamBoothConfig, trainer: Trainer, folder: Path) -> dict[str, Any]:
        task: Any = trainer.task
        if trainer.method.exports_weights:
            return save_models(folder, task.models)
        report = save_diffusers(
            folder,
            task.models,
            base_model=cfg.pretrained_model_name_or_path,
            kohya=cfg.output_kohya_format,
            extra_metadata=training_facts(cfg.to_dict(), trainer.outcome.step(trainer.step)),
        )
        comfy.write(cfg, folder, task.sampled_pipeline)
        return report

    def write_card(
        self, cfg: DreamBoothConfig, folder: Path, results: dict[str, Any], repo_id: str | None
    ) -> None:
        write_dreambooth_card(cfg, folder, results, repo_id)

    def file_names(self, folder: Path) -> dict[str, str]:
        return {
            "for diffusers": FILE_NAME,
            "for ComfyUI, A1111": kohya_file_name(folder),
            "UNet": "unet",
            "transformer": "transformer",
            "workflow for ComfyUI": workflow_file_name(folder),
            "workflow with guidance from the base model": base_workflow_file_name(folder),
            "model card": "README.md",
            "training images": CONTACT_SHEET,
            "images": VALIDATION,
        }


DREAMBOOTH = DreamBoothScript()
# Trains a model from a command line; see `command.train`.
train = partial(command.train, DREAMBOOTH)


def warn_of_copies(training: ImageSet, heldout: ImageSet | None) -> None:
    """Warn about training images that look alike, and about held-out images that resemble them."""
    for phrase in describe_pairs(find_look_alikes(training.looks()), training.names()):
        logger.warning("%s: leave one out, or the run learns it twice as much.", phrase)
    if heldout is None:
        return
    if line := describe_copies("images", training.pictures(), heldout.pictures()):
        logger.warning("%s", line)
    # The warning above already names copies of a file.
    file_hashes = {file_hash for _, file_hash in training.pictures()}
    indices = []
    for index, (_, file_hash) in enumerate(heldout.pictures()):
        if file_hash not in file_hashes:
            indices.append(index)
    other_images = heldout.only(indices)
    pairs = find_look_alikes(training.looks(), other_images.looks())
    for phrase in describe_pairs(pairs, training.names(), other_images.names()):
        logger.warning(
            "%s, and the second is held out: leave one out, or the held-out loss is too low.",
            phrase,
        )


def warn_of_model(cfg: DreamBoothConfig, pipeline: Any) -> None:
    """Warn if the base model or ComfyUI behaves differently from what the options suggest."""
    model_remark = None
    # An assistant keeps training from undoing a distillation.
    if cfg.assistant_lora is None:
        model_remark = cfg.family.remark(cfg.pretrained_model_name_or_path, pipeline)
    for remark in (model_remark, comfy.remark(cfg)):
        if remark is not None:
            logger.warning("%s", remark)


def warn_of_long_captions(cfg: DreamBoothConfig, pipeline: Any, training: ImageSet) -> None:
    """Warn about captions that are longer than the text encoders can read."""
    captions = dict(zip(training.names(), fixed_texts(cfg, training), strict=True))
    if line := PromptLength.of_pipeline(pipeline, cfg.family).warning(captions):
        logger.warning("%s", line)


def missing_class_images(images: Sequence[Path], count: int) -> list[int]:
    """Return the numbers of the class images to generate until a folder holds ``count`` images.

    The numbers of existing files are not used again, even if an interrupted run of several
    processes left gaps between them. Images with other names, such as the user's, count too.
    """
    used_numbers = set()
    for image in images:
        if match := CLASS_IMAGE.fullmatch(image.name):
            used_numbers.add(int(match[1]))
    free_numbers = [number for number in range(count) if number not in used_numbers]
    missing_count = max(0, count - len(images))
    return free_numbers[len(free_numbers) - missing_count :]


def class_images(cfg: DreamBoothConfig, accelerator: Accelerator) -> ImageSet:
    """Open the class images of prior preservation. The base model generates missing ones.

    The processes share the work. Each image has its own seed, so an interrupted run can continue
    where it stopped.
    """
    folder = Path(str(cfg.class_data_dir))
    folder.mkdir(parents=True, exist_ok=True)
    missing = missing_class_images(list_folder(folder).images, cfg.num_class_images)
    # All processes must count the images before one of them writes.
    accelerator.wait_for_everyone()
    indices = missing[accelerator.process_index :: accelerator.num_processes]
    if indices:
        device = accelerator.device
        dtype = cfg.family.precision(device)
        if cfg.prior_generation_precision is not None:
            dtype = PRECISIONS[cfg.prior_generation_precision]
        pipeline = load_base(cfg, dtype).to(device)
        memory_fix = "put your own images into --class_data_dir"
        if cfg.sample_batch_size > 1:
            memory_fix = f"lower --sample_batch_size (now {cfg.sample_batch_size}), or {memory_fix}"
        starts = range(0, len(indices), cfg.sample_batch_size)
        for start in tqdm(starts, "class images", disable=not accelerator.is_main_process):
            batch = indices[start : start + cfg.sample_batch_size]
            sampled_images = generate(
                pipeline,
                [str(cfg.class_prompt)] * len(batch),
                [cfg.seed + number for number in batch],
                size=cfg.resolution,
                batch=cfg.sample_batch_size,
                memory_fix=memory_fix,
            )
            for number, image in zip(batch, sampled_images, strict=True):
                image_hash = hashlib.sha256(image.tobytes()).hexdigest()[:12]
                image.save(folder / f"{number}-{image_hash}.png")
    accelerator.wait_for_everyone()
    class_set = open_set(
        cfg,
        str(cfg.class_data_dir),
        image_column="image",
        caption_column="none",
        mask_column=None,
        alpha_mask=False,
    )
    return class_set.only(range(min(len(class_set), cfg.num_class_images)))


def quantize_models(task: DreamBooth, dtype: torch.dtype, device: torch.device) -> None:
    """Quantize the trained models to 4 bits, and a flow model's text encoders, which are as large.

    A flow model's text encoders embed all prompts first, so that they can be deleted before the
    denoiser is moved to the device.
    """
    if task.family.flow:
        loaders = task.pipeline.origin.loaders  # of encoders that are loaded only if needed
        for name in task.family.encoders:
            model = getattr(task.pipeline, name)
            if name in loaders:
                loaders[name] = partial(load_quantized, loaders[name], dtype, device)
            elif model is not None:
                quantize(model, dtype, device=device)
        task.embed(device)
    for name, model in task.models.items():
        count = quantize(model, dtype, device=device)
        logger.info("%s: the weights of %d layers are stored in NF4", name, count)


def load_quantized(load: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Load a model and quantize it."""
    model = load()
    quantize(model, dtype, device=device)
    return model


def open_set(
    cfg: DreamBoothConfig, dataset: str, config_name: str | None = None, **changes: Any
) -> ImageSet:
    """Open an image set with the options of a configuration; ``changes`` override some of them."""
    options = {
        "image_column": cfg.image_column,
        "caption_column": cfg.caption_column,
        "mask_column": cfg.mask_column,
        "alpha_mask": cfg.alpha_mask,
        "cache_dir": cfg.cache_dir,
        "skip_bad_images": cfg.skip_bad_images,
    }
    image_set = open_images(dataset, config_name=config_name, **options | changes)
    for line in image_set.remarks():
        logger.warning("%s", line)
    return image_set


def join_sets(
    cfg: DreamBoothConfig, open_part: Callable[[DreamBoothConfig], ImageSet | None]
) -> ImageSet | None:
    """Open the image sets of all concepts as one set, or without concepts the run's image set.

    Args:
        open_part: opens the set of a concept, or of the run, from its configuration.
    """
    if not cfg.concepts:
        return open_part(cfg)
    sets = {}
    for number, concept_cfg in enumerate(cfg.concept_configs, start=1):
        with add_source(f"{cfg.source}, concept {number}: "):
            sets[concept_cfg.concept] = open_part(concept_cfg)
    return ImageSet.join(cfg.source, sets)


def training_images(cfg: DreamBoothConfig) -> ImageSet:
    """Open the training images of all concepts."""

    def open_part(concept_cfg: DreamBoothConfig) -> ImageSet:
        image_set = open_set(concept_cfg, concept_cfg.source, concept_cfg.dataset_config_name)
        image_set.require_masks()
        if len(image_set) < FEW_IMAGES:
            logger.warning(
                "%s has %s: 10 to 30 are usual, and so few are quickly memorized.",
                image_set.label,
                counted(len(image_set), "image"),
            )
        # Check the captions here, before a model is loaded and where errors name the concept.
        Captions(concept_cfg, image_set)
        return image_set

    training = cast(ImageSet, join_sets(cfg, open_part))  # every concept has images
    if cfg.concepts:
        require_disjoint(cfg.source, training)
    return training


def heldout_images(cfg: DreamBoothConfig) -> ImageSet | None:
    """Open the held-out images of all concepts; None if there are none."""

    def open_part(concept_cfg: DreamBoothConfig) -> ImageSet | None:
        if not concept_cfg.validation_dataset:
            return None
        image_set = open_set(concept_cfg, concept_cfg.validation_dataset)
        indices = choose_samples(image_set.names(), concept_cfg.max_eval_samples)
        return image_set.only(indices)

    return join_sets(cfg, open_part)
