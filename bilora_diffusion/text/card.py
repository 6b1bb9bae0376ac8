"""``README.md`` of a text run: a model card with the front matter of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .. import methods
from ..run.card import (
    is_hub_id,
    loaded_from,
    python_block,
    source,
    table,
    when_it_stopped,
    write_card,
)
from ..run.folder import FOLDS_FIGURE
from .models import AUTO_CLASSES
from .places import PACKAGED

PIPELINE_TAGS = {
    "seq2seq": "text2text-generation",
    "causal": "text-generation",
    "classification": "text-classification",
}


def write_text_card(cfg: Any, folder: Path, results: dict[str, Any], repo_id: str | None) -> None:
    """Write ``README.md`` of a run folder.

    Args:
        results: steps, and the held-out figures to show.
        repo_id: hub repository the folder goes to.
    """
    trained = methods.get(cfg.method)
    base, data = source(cfg.model_name_or_path), cfg.task or Path(cfg.train_file).name
    meta = ModelCardData(
        library_name="transformers" if trained.exports_weights else "peft",
        base_model=base if is_hub_id(base) else None,
        pipeline_tag=PIPELINE_TAGS[cfg.task_type],
        tags=list(dict.fromkeys(["bilora-diffusion", trained.name])),
    )
    measured = {
        key.removeprefix("heldout_").replace("_", " "): value
        for key, value in results.items()
        if key.startswith("heldout_")
    }
    here = repo_id or "path/to/this/folder"
    write_card(
        cfg,
        folder,
        results["steps"],
        meta=meta,
        base=base,
        data=data,
        use=["## Use", python_block(_snippet(cfg, base, here, results["export"]))],
        results=[
            *table("## Results on held-out rows", measured | when_it_stopped(cfg, results)),
            *([f"![Held-out loss of the folds]({FOLDS_FIGURE})"] if cfg.folds else []),
        ],
    )


def _snippet(cfg: Any, base: str, here: str, export: dict[str, Any]) -> list[str]:
    """Python that loads the result."""
    kind, name = cfg.task_type, loaded_from(base)
    auto = f"Auto{AUTO_CLASSES[kind]}"
    imports = f"from transformers import {auto}, AutoTokenizer"
    if methods.get(cfg.method).exports_weights:
        return [
            imports,
            "",
            f'model = {auto}.from_pretrained({here!r}, subfolder="model")',
            f'tokenizer = AutoTokenizer.from_pretrained({here!r}, subfolder="model")',
        ]
    if cfg.model_name_or_path in PACKAGED:
        labels = f", labels={export['labels']!r}" if kind == "classification" else ""
        return [
            "from bilora_diffusion.text.models import load_text_model",
            "from peft import PeftModel",
            "",
            f"base = load_text_model({base!r}, {kind!r}{labels})",
            f"model = PeftModel.from_pretrained(base.model, {here!r})",
        ]
    labels = f", num_labels={len(export['labels'])}" if kind == "classification" else ""
    return [
        "from peft import PeftModel",
        imports,
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        f"base = {auto}.from_pretrained({name!r}{labels})",
        f"model = PeftModel.from_pretrained(base, {here!r})",
    ]
