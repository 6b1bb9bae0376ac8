"""Tiny pipelines of the flow-matching models: real classes, small sizes, random weights."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml

from bilora_diffusion.image.families import family_class
from tests.scripts.runs import make_once

from .words import TOKENIZERS

FILES: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("models.yaml").read_text(encoding="utf-8")
)
"""Class of a pipeline -> the configurations of its parts."""


def make_pipeline(kind: str, **options: Any) -> Any:
    """Build a pipeline with fixed random weights; the options are passed to its transformer."""
    sizes, family = FILES[kind], family_class(kind, kind)
    torch.manual_seed(0)
    parts: dict[str, Any] = dict(sizes.get("pipeline", {}))
    for part in family.parts:
        part_options = options if part == "transformer" else {}
        parts[part] = made_part(kind, part, **part_options)
        if part.startswith("text_encoder"):
            tokenizer = part.replace("text_encoder", "tokenizer")
            parts[tokenizer] = None
            if part in sizes:
                parts[tokenizer] = TOKENIZERS[sizes[tokenizer]]()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**sizes["scheduler"])
    return getattr(diffusers, kind)(scheduler=scheduler, **parts)


def made_part(kind: str, part: str, **options: Any) -> Any:
    """Build one model of a pipeline; return None if the pipeline does without it."""
    if (config := FILES[kind].get(part)) is None:
        return None
    name = family_class(kind, kind).parts[part]
    make: Any = getattr(diffusers, name, None) or getattr(transformers, name)
    config = {**config, **options}
    if part == "vae":
        torch.manual_seed(1)
    if part.startswith("text_encoder"):
        words = TOKENIZERS[FILES[kind][part.replace("text_encoder", "tokenizer")]]()
        facts = {"vocab_size": len(words.get_vocab())}
        if name.startswith(("CLIP", "Gemma")):
            for mark in ("pad_token_id", "bos_token_id", "eos_token_id"):
                facts[mark] = getattr(words, mark)
        if "text_config" in config:  # a model that reads images too
            config["text_config"] = config["text_config"] | facts
        else:
            config |= facts
        return make(make.config_class(**config)).eval()
    model = make(**config).eval()
    # These tensors start at 0 or 1, where an error in their use would not show.
    if name == "ZImageTransformer2DModel":
        torch.nn.init.normal_(model.x_pad_token)
        torch.nn.init.normal_(model.cap_pad_token)
    if name == "AutoencoderKLFlux2":
        model.bn.running_mean.normal_(std=0.3)
        model.bn.running_var.uniform_(0.5, 2.0)
    return model


def saved(kind: str, folder: Path) -> Path:
    """Save a pipeline in diffusers' format in a new folder and return the folder."""
    make_pipeline(kind).save_pretrained(folder)
    return folder


def shared(kind: str) -> Path:
    """Return the folder of a saved pipeline, which the first call creates; do not write to it."""
    return make_once("base", lambda folder: saved(kind, folder), kind)
