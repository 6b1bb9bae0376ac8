"""SDXL DreamBooth from a command line: parse, build, fit, export.

accelerate launch train_dreambooth_bilora.py --dataset linoyts/3d_icon
python train_dreambooth_bilora.py --dataset mini --max_train_steps 20 --output_dir out
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from . import checkpoint, publish, runlog
from .config import DreamBoothConfig, parse
from .data.sources import ImageSet, open_images
from .errors import TrainingError, UserError
from .export import save_diffusers, save_models, training_facts, verify
from .loop import Trainer, fit
from .methods import MethodOptions, create, get
from .quantize import quantize_nf4
from .stepping import Schedule, total_steps
from .tasks.class_images import ensure_class_images
from .tasks.dreambooth import DreamBooth
from .tasks.pipeline import load_pipeline, quiet
from .tasks.visits import VisitStream

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says and leave a run folder.

    Raises:
        UserError: bad input; nothing was written.
        TrainingError: training could not go on; checkpoints and metrics are kept.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    quiet()
    cfg = parse(argv)
    folder = Path(cfg.output_dir)
    runlog.guard(folder, cfg.resume_from_checkpoint, cfg.overwrite_output_dir)
    if get(cfg.method).exports_weights:
        runlog.refuse_foreign_models(folder)
    resume = checkpoint.resolve(folder, cfg.resume_from_checkpoint)
    accelerator = build_accelerator(cfg)
    run(cfg.for_processes(accelerator.num_processes), accelerator, folder, resume)
    # DDP's reducer must be gone before the process group is taken down: the other way round, its
    # end waits for the group's thread while that thread waits for the interpreter.
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def run(cfg: DreamBoothConfig, accelerator: Accelerator, folder: Path, resume: Path | None) -> None:
    """Build, train and finish; nothing of it is alive when this returns.

    Raises:
        TrainingError: training could not go on; ``run.json`` says why.
    """
    repo_id = publish.repository(cfg) if cfg.push_to_hub else None
    task = build_task(cfg, accelerator)
    cfg = task.cfg
    steps = total_steps(cfg, task.num_samples, Schedule.of(cfg, accelerator).step_size)
    method = create(cfg.method, method_options(cfg, steps))
    trainer = Trainer(task, method, cfg, accelerator)
    if resume is not None:
        trainer.load(resume)
        logger.info("resuming from %s", resume)
    log = None
    if accelerator.is_main_process:
        log = runlog.RunLog(folder, accelerator.device)
        log.start(cfg.to_dict(), cfg.method, cfg.seed, trainer.step if resume else None)
    accelerator.init_trackers("dreambooth-bilora", config=flat(cfg.to_dict()))
    try:
        fit(trainer, folder, log)
        results = finish(cfg, trainer, folder, repo_id)
    except TrainingError as error:
        if log is not None:
            log.fail(str(error))
        raise
    if log is not None:
        log.finish(**results)


def build_accelerator(cfg: DreamBoothConfig) -> Accelerator:
    """accelerate's engine in the wanted precision.

    Raises:
        UserError: the device can't compute in it.
    """
    unused = DistributedDataParallelKwargs(find_unused_parameters=cfg.train_text_encoder)
    project = ProjectConfiguration(
        project_dir=cfg.output_dir, logging_dir=str(Path(cfg.output_dir, cfg.logging_dir))
    )
    try:
        accelerator = Accelerator(
            mixed_precision=cfg.mixed_precision,
            log_with=cfg.log_with,
            project_config=project,
            kwargs_handlers=[unused],
        )
    except ValueError as error:
        raise UserError(
            f"--mixed_precision {cfg.mixed_precision} does not work here ({error}): use bf16 or no."
        ) from error
    if cfg.allow_tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def build_task(cfg: DreamBoothConfig, accelerator: Accelerator) -> DreamBooth:
    """Data first, since it is quick to refuse; then the models; then both on the device."""
    source = str(cfg.dataset_name or cfg.instance_data_dir)
    instance = images(cfg, source, cfg.dataset_config_name)
    validation = None
    if cfg.validation_dataset:
        validation = images(cfg, cfg.validation_dataset)
    pipeline = load_pipeline(
        cfg.pretrained_model_name_or_path,
        dtype=weights_dtypes(cfg, accelerator.mixed_precision),
        revision=cfg.revision,
        variant=cfg.variant,
        cache_dir=cfg.cache_dir,
        vae=cfg.pretrained_vae_model_name_or_path,
    )
    cfg = cfg.for_pipeline(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    classes = None
    if cfg.with_prior_preservation:
        ensure_class_images(cfg, accelerator)
        classes = open_images(str(cfg.class_data_dir), skip_bad_images=cfg.skip_bad_images)
    task = DreamBooth(cfg, pipeline, VisitStream(cfg, instance, classes), validation)
    if cfg.quantize == "nf4":
        dtype = DTYPES[accelerator.mixed_precision]
        for name, model in task.models.items():
            count = quantize_nf4(model, dtype, device=accelerator.device)
            logger.info("%s: the weights of %d layers are held in 4 bits", name, count)
    task.to_device(accelerator.device)
    return task


def weights_dtypes(cfg: DreamBoothConfig, precision: str) -> dict[str, torch.dtype]:
    """The dtype of each part of the pipeline, "default" for the rest.

    Frozen weights need no more than the arithmetic has; trained ones are kept in fp32, since bf16
    would lose small updates.
    """
    dtypes = {"default": DTYPES[precision]}
    if get(cfg.method).exports_weights:
        dtypes["unet"] = torch.float32
        if cfg.train_text_encoder:
            dtypes |= dict.fromkeys(("text_encoder", "text_encoder_2"), torch.float32)
    return dtypes


def images(cfg: DreamBoothConfig, dataset: str, config_name: str | None = None) -> ImageSet:
    """An image set with its captions, opened as the configuration says."""
    opened = open_images(
        dataset,
        image_column=cfg.image_column,
        caption_column=cfg.caption_column,
        config_name=config_name,
        cache_dir=cfg.cache_dir,
        skip_bad_images=cfg.skip_bad_images,
    )
    for reason in opened.skipped:
        logger.warning("left out: %s", reason)
    return opened


def method_options(cfg: DreamBoothConfig, num_steps: int) -> MethodOptions:
    """The method's share of the configuration."""
    names = {field.name for field in fields(MethodOptions)} - {"num_steps"}
    return MethodOptions(num_steps=num_steps, **{name: getattr(cfg, name) for name in names})


def finish(
    cfg: DreamBoothConfig, trainer: Trainer, folder: Path, repo_id: str | None
) -> dict[str, Any]:
    """Export the primary, prove it from the file, write the model card; returns the results."""
    results: dict[str, Any] = {"steps": trainer.step}
    if trainer.accelerator.is_main_process:
        with trainer.averaged():
            results["export"] = export(cfg, trainer, folder)
        results |= last_heldout(folder)
        final = folder / "validation" / f"step-{trainer.step}"
        publish.card(cfg, folder, sorted(final.glob("*.png")), repo_id, results)
        if repo_id is not None:
            publish.push(folder, repo_id, cfg.hub_token)
    trainer.accelerator.wait_for_everyone()
    return results


def export(cfg: DreamBoothConfig, trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Write what was trained, as it is now, and read it back; returns what that showed."""
    task: Any = trainer.task
    if trainer.method.exports_weights:
        return save_models(folder, task.models)
    save_diffusers(
        folder,
        task.models,
        base_model=cfg.pretrained_model_name_or_path,
        kohya=cfg.output_kohya_format,
        extra_metadata=facts(cfg, task, trainer.step),
    )
    return verify(folder, task.models)


def facts(cfg: DreamBoothConfig, task: DreamBooth, steps: int) -> dict[str, str]:
    """What the exported file says about its training."""
    return training_facts(
        method=cfg.method,
        rho=cfg.rho,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        title=Path(cfg.output_dir).resolve().name,
        resolution=cfg.resolution,
        prediction_type=task.pipeline.scheduler.config["prediction_type"],
        steps=steps,
        seed=cfg.seed,
        init=None if cfg.init_lora_weights == "default" else cfg.init_lora_weights,
    )


def last_heldout(folder: Path) -> dict[str, float]:
    """The newest held-out losses in the folder's metrics, {} if none were measured."""
    rows = [row for row in runlog.read_metrics(folder) if "heldout_loss" in row]
    return {k: rows[-1][k] for k in ("heldout_loss", "train_grid_loss")} if rows else {}


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Configuration values that every tracker can show."""
    return {
        key: value if isinstance(value, int | float | str | bool) else repr(value)
        for key, value in values.items()
    }
