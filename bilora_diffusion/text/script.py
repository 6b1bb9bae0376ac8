"""Training script for text models: configuration, task and exported files.

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
from ..core.values import HELDOUT_PREFIX
from ..export import writer
from ..methods import get
from ..run.data import describe_copies
from ..run.hub import is_hub_id, loaded_from, public_name, write_card
from ..run.record import VALIDATION
from ..train import command
from ..train.engine import DTYPES
from ..train.setup import Script
from ..train.trainer import Trainer
from .config import TextConfig
from .metrics import require_packages, require_references
from .models import AUTO_CLASSES, TextSource
from .places import PACKAGED
from .rows import Rows, encode_rows, open_rows
from .task import NAME, TextTask, memory_by_phase

PIPELINE_TAGS = {
    "seq2seq": "text2text-generation",
    "causal": "text-generation",
    "classification": "text-classification",
}
logger = logging.getLogger(__name__)


class TextScript(Script[TextConfig]):
    """The script that trains language models and text classifiers."""

    config_class = TextConfig
    project = "text-bilora"
    scorer = "eval.text_scores"

    def build_task(self, cfg: TextConfig, accelerator: Accelerator) -> TextTask:
        """Read the data, then load the model, so that errors in the data show up early."""
        datasets.disable_progress_bars()
        source = TextSource(cfg)
        rows = open_rows(cfg)
        if rows.validation:
            require_packages(rows.metrics)
            require_scorable(cfg, rows)
        warn_of_copies(cfg, rows)
        compute_dtype = DTYPES[accelerator.mixed_precision]
        dtype = compute_dtype
        if get(cfg.method).exports_weights:
            # Trained weights are stored in fp32, since bf16 would lose small updates.
            dtype = torch.float32
        labels = rows.label_words if cfg.task_type == "classification" else None
        text_model = source.load(dtype, labels, seed=cfg.seed, weights=not cfg.dry_run)
        # Rows are tokenized in a dry run too, since their lengths determine the memory.
        task = TextTask(cfg, text_model, encode_rows(cfg, rows, text_model))
        if cfg.dry_run:
            return task
        if cfg.quantize != "none":
            count = quantize(
                text_model.model,
                compute_dtype,
                skip=text_model.whole_modules,
                device=accelerator.device,
            )
            logger.info("the weights of %d layers are stored in NF4", count)
        task.module.to(accelerator.device)
        return task

    def memory_by_phase(self, task: Any, device: torch.device) -> dict[str, dict[str, int]]:
        return memory_by_phase(task, device)

    def export(self, cfg: TextConfig, trainer: Trainer, folder: Path) -> dict[str, Any]:
        task: Any = trainer.task
        model, tokenizer = task.text_model.model, task.text_model.tokenizer
        if trainer.method.exports_weights:
            report = writer.save_models(folder, task.models)
            tokenizer.save_pretrained(folder / NAME)
            return report
        base, kind = cfg.model_name_or_path, task.text_model.kind
        metadata = writer.lora_metadata(cfg.to_dict())
        report = writer.save_adapter(folder, model, base_model=base, kind=kind, metadata=metadata)
        return {"labels": list(task.data.rows.label_words), **report}

    def write_card(
        self, cfg: TextConfig, folder: Path, results: dict[str, Any], repo_id: str | None
    ) -> None:
        write_text_card(cfg, folder, results, repo_id)

    def file_names(self, folder: Path) -> dict[str, str]:
        return {
            "adapter": "adapter_model.safetensors",
            "model": NAME,
            "model card": "README.md",
            "answers": VALIDATION,
        }


TEXT = TextScript()
# Function that trains from a command line; see `command.train`.
train = functools.partial(command.train, TEXT)


def require_scorable(cfg: TextConfig, rows: Rows) -> None:
    """Check that the run's metrics can score the correct answers of the held-out rows."""
    references = []
    for example in rows.validation or []:
        if example.answer.strip():  # rows with a blank answer are skipped
            references.append((example.where, example.answer))
    # Answers are generated only for the first `max_predictions` rows.
    references = references[: cfg.max_predictions]
    require_references(rows.metrics, references, rows.answer_marker)


def warn_of_copies(cfg: TextConfig, rows: Any) -> None:
    """Warn if training rows are also held out.

    The rows of a task are not compared, since the user can't change them.
    """
    if rows.validation is None or cfg.task:
        return
    heldout = [(example.where, example) for example in rows.validation]
    training = [(example.where, example) for example in rows.train]
    sentence = describe_copies("rows", training, heldout)
    if sentence:
        logger.warning("%s", sentence)


def write_text_card(
    cfg: TextConfig, folder: Path, results: dict[str, Any], repo_id: str | None
) -> None:
    """Write a run folder's ``README.md``, which is also the model card on the hub."""
    method = get(cfg.method)
    base, kind = public_name(cfg.model_name_or_path), cfg.task_type
    meta = ModelCardData(
        library_name="transformers" if method.exports_weights else "peft",
        base_model=base if is_hub_id(base) else None,
        pipeline_tag=PIPELINE_TAGS[kind],
        tags=["bilora-diffusion", method.name],
    )
    measured = {}
    for name, value in results.items():
        if name.startswith(HELDOUT_PREFIX):
            measured[name.removeprefix(HELDOUT_PREFIX).replace("_", " ")] = value
    write_card(
        vars(cfg),
        folder,
        results,
        meta=meta,
        heading="Results on held-out rows",
        measured=measured,
        title=base,
        data=cfg.task or Path(str(cfg.train_file)).name,
        auto=f"Auto{AUTO_CLASSES[kind]}",
        kind=kind,
        whole=method.exports_weights,
        base=loaded_from(base),
        packaged=base if cfg.model_name_or_path in PACKAGED else None,
        labels=results["export"].get("labels"),
        repo=repo_id,
        here=repo_id or "path/to/this/folder",
    )
