"""Load transformers models other than the base model (DINOv2, captioners) by hub id or folder.

    model = find_model("facebook/dinov2-base", label='"dinov2:facebook/dinov2-base"')
    network = load_weights(model, AutoModel, torch.float32)
    processor = load_processor(model, AutoImageProcessor)

Weights are read only from safetensors, and no code from a repository is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..train.soundness import require_safetensors, require_whole


@dataclass(frozen=True)
class HubModel:
    """The place and the configuration of a model."""

    label: str  # the model's name in messages
    place: str  # hub id, or path of the folder
    commit: str | None  # commit on the hub; None for a folder
    config: Any  # the model's transformers configuration

    @property
    def source(self) -> str:
        """Hub id, or the folder's name without its path."""
        if self.commit is None:
            return Path(self.place).resolve().name
        return self.place

    @property
    def weight_files(self) -> list[Path]:
        """The weight files of a model in a folder; [] for a model on the hub."""
        return sorted(Path(self.place).glob("*.safetensors"))


def find_model(source: str, label: str) -> HubModel:
    """Find a model and read its configuration.

    Args:
        source: hub id or folder.
        label: the model's name in messages.

    Raises:
        Exception: any error of a library while it reads the configuration.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file, extract_commit_hash

    folder = Path(source).expanduser()
    place = source
    if folder.is_dir():
        place = str(folder)
    commit = extract_commit_hash(str(cached_file(place, "config.json")), None)
    config = AutoConfig.from_pretrained(place, revision=commit, trust_remote_code=False)
    return HubModel(label, place, commit, config)


def load_weights(model: HubModel, kind: Any, dtype: torch.dtype) -> Any:
    """Load a model in evaluation mode, on the CPU, and check that it has all of its weights.

    Args:
        model: the model.
        kind: its transformers class, such as ``AutoModel``.
        dtype: dtype of the weights.

    Raises:
        UserError: the weights are pickles, or some are missing.
        Exception: any error of a library while it loads the model.
    """
    if model.commit is None:
        require_safetensors(model.label, Path(model.place))
    network, report = kind.from_pretrained(
        model.place,
        revision=model.commit,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    require_whole(model.label, report["missing_keys"])
    return network.eval()


def load_processor(model: HubModel, kind: Any) -> Any:
    """Load a model's input processor: one for images, or one for images and text."""
    return kind.from_pretrained(
        model.place, revision=model.commit or "main", trust_remote_code=False
    )
