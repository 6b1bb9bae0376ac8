"""``README.md`` of a text run: a model card with the front matter of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .. import methods
from ..train.card import is_hub_id, loaded_from, source, write_card
from .config import TextConfig
from .models import AUTO_CLASSES
from .places import PACKAGED

PIPELINE_TAGS = {
    "seq2seq": "text2text-generation",
    "causal": "text-generation",
    "classification": "text-classification",
}


def write_text_card(
    cfg: TextConfig, folder: Path, results: dict[str, Any], repo_id: str | None
) -> None:
    """Write ``README.md`` of a run folder.

    Args:
        results: steps, and the held-out figures to show.
        repo_id: hub repository the folder goes to.
    """
    trained = methods.get(cfg.method)
    base, kind = source(cfg.model_name_or_path), cfg.task_type
    write_card(
        cfg,
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
