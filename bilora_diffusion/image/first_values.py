"""Initial values of an image run's primary adapters from a LoRA file (``--init_from``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..adapters import target_layers
from ..config.lora_sources import LoraSource
from ..core.errors import UserError, read_or_refuse
from ..core.lora_names import ENCODERS
from ..export.formats import Part, peft_adapter
from ..export.lora_checks import require_same_form, require_same_layers, warn_of_other_base
from ..export.reader import Contents, read
from ..methods import Target
from .frozen_loras import models_of, require_fit


def read_start(
    source: LoraSource, pipeline: Any, targets: Sequence[Target], base_model: str
) -> dict[str, dict[str, Tensor]]:
    """Read the initial values of each target's primary adapter, by target name and PEFT key.

    Raises:
        UserError: the file can't be read, or its layers, rank, alpha or kind of adapter differ from
            those of the primary adapters.
    """
    contents = read(source.path)
    parts = require_fit(source.path, contents.parts, models_of(pipeline))
    warn_of_other_base(source, contents.base_model, base_model)
    _require_same_models(source, parts, [target.name for target in targets])
    start = {}
    for target in targets:
        part = parts[target.name]
        require_same_layers(
            source,
            [layer.name for layer in part.layers],
            target_layers(target.model, target.spec),
            "lora_layers",
        )
        ranks = {len(layer.A) for layer in part.layers}
        alphas = read_or_refuse(
            f"the alpha in the metadata of {source.path}",
            "write the file again",
            partial(_alphas, contents, target.name, ranks),
        )
        require_same_form(
            source,
            target.spec,
            ranks=ranks,
            alphas=alphas,
            use_dora=part.use_dora,
        )
        # `read` has multiplied B by the scale, and the layer will multiply by it again.
        scale = target.spec.alpha / target.spec.rank
        layers = [layer._replace(B=layer.B.double() / scale) for layer in part.layers]
        start[target.name], _ = peft_adapter(target.name, Part(layers), "")
    return start


def _require_same_models(
    source: LoraSource, parts: Mapping[str, Part], targets: Sequence[str]
) -> None:
    """Check that a file has layers for all trained models, and for no others."""
    further = sorted(parts.keys() - set(targets))
    missing = sorted(set(targets) - parts.keys())
    if not further and not missing:
        return
    if further:
        problem = f"has layers for models that are not trained ({', '.join(further)})"
    else:
        problem = f"lacks layers for models that are trained ({', '.join(missing)})"
    fix = "give a file for the trained models"
    if set(further + missing) <= set(ENCODERS):
        change = "add" if further else "drop"
        fix = f"{change} --train_text_encoder, or {fix}"
    raise UserError(f"--{source.option} {source.path} {problem}: {fix}.")


def _alphas(contents: Contents, component: str, ranks: set[int]) -> set[float]:
    """Return the distinct alphas of a model's layers.

    If the file records the alpha of training, it is adjusted to the file's rank.
    """
    # In this package's files, B includes the scale, and the metadata has the alpha of training.
    original_alphas = json.loads(contents.metadata.get("bilora.original_alpha", "{}"))
    # An init that changed the base weights doubled the rank, but not the scale.
    original_ranks = json.loads(contents.metadata.get("bilora.original_rank", "{}"))
    alphas = set()
    for rank in ranks:
        if component in original_alphas:
            original_rank = original_ranks.get(component, rank)
            alphas.add(float(original_alphas[component] * rank / original_rank))
        else:
            alphas.update(scale * rank for scale in contents.scales[component])
    return alphas
