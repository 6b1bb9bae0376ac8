"""Text fine-tuning from a command line: parse, build, fit, export.

accelerate launch train_text_bilora.py --config recipes/t5_base/mrpc.yaml
python train_text_bilora.py --model_name_or_path smollm2 --train_file answers.jsonl
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCardData

from ..adapters.quantize import quantize
from ..export import writer
from ..methods import get
from ..run.card import is_hub_id, loaded_from, source, write_card
from ..run.heldout_part import copies
from ..train import running
from ..train.running import DTYPES, Script
from ..train.trainer import Trainer
from .config import TextConfig, resolve
from .dry_run import moments
from .models import AUTO_CLASSES, TextSource
from .places import PACKAGED
from .rows import encode_rows, open_rows
from .task import NAME, TextTask

PIPELINE_TAGS = {
    "seq2seq": "text2text-generation",
    "causal": "text-generation",
    "classification": "text-classification",
}
logger = logging.getLogger(__name__)


def build_task(cfg: TextConfig, accelerator: Accelerator) -> TextTask:
    """Data first, since it is quick to refuse; then the model, on the device, or empty."""
    datasets.disable_progress_bars()
    source = TextSource(cfg)
    rows = open_rows(cfg)
    given = None if cfg.task else rows.validation
    held = None if given is None else [(row.where, row) for row in given]
    if (held is not None or (cfg.fit and rows.validation is None)) and (
        line := copies("rows", [(row.where, row) for row in rows.train], held)
    ):
        logger.warning("%s", line)
    dtype = DTYPES[accelerator.mixed_precision]
    loaded = source.load(
        # Weights that are trained are kept in fp32, since bf16 would lose small updates.
        dtype=torch.float32 if get(cfg.method).exports_weights else dtype,
        labels=rows.label_words if cfg.task_type == "classification" else None,
        seed=cfg.seed,
        weights=not cfg.dry_run,
    )
    task = TextTask(cfg, loaded, encode_rows(cfg, rows, loaded))
    if cfg.dry_run:
        return task
    if cfg.quantize != "none":
        skipped, device = loaded.whole_modules, accelerator.device
        count = quantize(loaded.model, dtype, skip=skipped, device=device)
        logger.info("the weights of %d layers are held in NF4", count)
    task.module.to(accelerator.device)
    return task


def export(cfg: TextConfig, trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Write what was trained, as it is now, and read it back; returns what that showed."""
    task: Any = trainer.task
    model, tokenizer = task.loaded.model, task.loaded.tokenizer
    if trainer.method.exports_weights:
        report = writer.save_models(folder, task.models)
        tokenizer.save_pretrained(folder / NAME)
        return report
    base, kind = cfg.model_name_or_path, task.loaded.kind
    report = writer.save_adapter(folder, model, base_model=base, kind=kind)
    return {"labels": list(task.data.rows.label_words), **report}


def write_text_card(
    cfg: TextConfig, folder: Path, results: dict[str, Any], repo_id: str | None
) -> None:
    """Write ``README.md`` of a run folder, which may go to a hub repository."""
    trained = get(cfg.method)
    base, kind = source(cfg.model_name_or_path), cfg.task_type
    write_card(
        vars(cfg),
        folder,
        results,
        meta=ModelCardData(
            library_name="transformers" if trained.exports_weights else "peft",
            base_model=base if is_hub_id(base) else None,
            pipeline_tag=PIPELINE_TAGS[kind],
            tags=list(dict.fromkeys(["bilora-diffusion", trained.name])),
        ),
        heading="Results on held-out rows",
        measured={
            key.removeprefix("heldout_").replace("_", " "): value
            for key, value in results.items()
            if key.startswith("heldout_")
        },
        title=base,
        data=cfg.task or Path(str(cfg.train_file)).name,
        auto=f"Auto{AUTO_CLASSES[kind]}",
        kind=kind,
        whole=trained.exports_weights,
        base=loaded_from(base),
        packaged=base if cfg.model_name_or_path in PACKAGED else None,
        labels=results["export"].get("labels"),
        here=repo_id or "path/to/this/folder",
    )


def files(folder: Path) -> dict[str, str]:
    """Files that a run leaves, by their purpose."""
    return {
        "adapter": "adapter_model.safetensors",
        "model": NAME,
        "model card": "README.md",
        "answers": "validation",
    }


TEXT = Script(
    "text-bilora", resolve, build_task, export, write_text_card, "eval.text_scores", files, moments
)
main = functools.partial(running.main, TEXT)
