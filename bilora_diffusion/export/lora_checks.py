"""Checks of LoRA files that options name: base model, layers, rank, alpha and kind of adapter."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from ..adapters import AdapterSpec
from ..config.lora_sources import LoraSource
from ..core.errors import UserError

logger = logging.getLogger(__name__)


def warn_of_other_base(source: LoraSource, file_base: str | None, base_model: str) -> None:
    """Warn if a file names another base model than the run's; compare the last parts of the names.

    Such a file is not refused, since the same model can have different names on the hub and in a
    folder.

    Args:
        source: the option and its file.
        file_base: base model in the file's metadata; None or "" if the metadata names none.
        base_model: base model of the run.
    """
    if file_base and Path(file_base).name != Path(base_model).name:
        logger.warning(
            '--%s %s was trained for "%s" according to its metadata, but the run trains "%s": use'
            " the file only if these are the same model, or if one was derived from the other.",
            source.option,
            source.path,
            file_base,
            base_model,
        )


def require_same_form(
    source: LoraSource,
    spec: AdapterSpec,
    *,
    ranks: Collection[int],
    alphas: Collection[float],
    use_dora: bool,
) -> None:
    """Check that a file has the run's rank, alpha and kind of adapter.

    Args:
        source: the option and its file.
        spec: specification of the primary.
        ranks, alphas: values of the file's layers.
        use_dora: whether the file has DoRA's magnitudes.

    Raises:
        UserError: a value differs, and the message names the options to give; or the file's layers
            have different ranks or alphas.
    """
    label = f"--{source.option} {source.path}"
    for name, values in (("ranks", ranks), ("alphas", alphas)):
        if len(set(values)) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(set(values)))
            raise UserError(
                f"{label} has layers with different {name} ({listed}), but a run has one value for"
                " all layers: give a file with one value."
            )
    (rank,) = set(ranks)
    (alpha,) = set(alphas)
    if (rank, alpha) != (spec.rank, spec.alpha):
        raise UserError(
            f"{label} has rank {rank} and alpha {alpha:g}, but the run has rank {spec.rank} and"
            f" alpha {spec.alpha:g}: give --rank {rank} --lora_alpha {alpha:.17g}."
        )
    if use_dora and not spec.use_dora:
        raise UserError(f"{label} is a DoRA, but the run does not train a DoRA: add --use_dora.")
    if spec.use_dora and not use_dora:
        raise UserError(f"{label} is not a DoRA, but the run trains a DoRA: drop --use_dora.")


def require_same_layers(
    source: LoraSource, stored: Collection[str], trained: Collection[str], option: str
) -> None:
    """Check that a file has exactly the layers that the run trains.

    Args:
        source: the option and its file.
        stored: names of the file's layers.
        trained: names of the layers that the run trains.
        option: the option that selects the layers.

    Raises:
        UserError: the layers differ; the message names one of them.
    """
    label = f"--{source.option} {source.path}"
    missing = sorted(set(trained) - set(stored))
    further = sorted(set(stored) - set(trained))
    if missing:
        raise UserError(
            f"{label} has no values for {len(missing)} of the {len(trained)} trained layers, such"
            f" as {missing[0]}: give a file with these layers, or select the file's layers with"
            f" --{option}."
        )
    if further:
        raise UserError(
            f"{label} has {len(further)} layers that are not trained, such as {further[0]}; their"
            f" values would be lost: give a file without them, or select the file's layers with"
            f" --{option}."
        )
