"""Checks of LoRA files that options name: their base model, and of a first value their form."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from ..adapters import AdapterSpec
from ..config.lora_sources import LoraSource
from ..core.errors import UserError

logger = logging.getLogger(__name__)


def warn_of_other_base(source: LoraSource, file_base: str | None, base_model: str) -> None:
    """Warn of a file that names another base model than the run's, on which its layers fit.

    It is not refused, since the same model has another name on the hub than in a folder.

    Args:
        source: the file, as the option names it.
        file_base: base model by the file's metadata; None or "" if it has none.
        base_model: base model of the run.
    """
    if file_base and Path(file_base).name != Path(base_model).name:
        logger.warning(
            '--%s %s is for "%s" by its own words, and its layers fit "%s" too: use it only if one'
            " of the two was made from the other.",
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
    """Refuse a file whose rank, alpha or kind of adapter are not those of the run.

    Args:
        source: the file, as the option names it.
        spec: the primary's shape.
        ranks, alphas: distinct values of the file's layers.
        use_dora: whether the file has magnitudes of DoRA.

    Raises:
        UserError: the sentence has the values to give.
    """
    label = f"--{source.option} {source.path}"
    for name, values in (("ranks", ranks), ("alphas", alphas)):
        if len(set(values)) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(set(values)))
            raise UserError(
                f"{label} has layers of several {name} ({listed}), and a run has one for all"
                " layers: give a file with one."
            )
    (rank,) = set(ranks)
    (alpha,) = set(alphas)
    if (rank, alpha) != (spec.rank, spec.alpha):
        raise UserError(
            f"{label} has rank {rank} and alpha {alpha:g}, and the run has {spec.rank} and"
            f" {spec.alpha:g}: give --rank {rank} --lora_alpha {alpha:g}."
        )
    if use_dora and not spec.use_dora:
        raise UserError(f"{label} is a DoRA, and the run trains none: add --use_dora.")
    if spec.use_dora and not use_dora:
        raise UserError(f"{label} is no DoRA, and the run trains one: drop --use_dora.")


def require_same_layers(
    source: LoraSource, stored: Collection[str], trained: Collection[str], option: str
) -> None:
    """Refuse a file that lacks a trained layer, or has a layer that is not trained.

    Args:
        source: the file, as the option names it.
        stored: names of the file's layers.
        trained: names of the run's layers.
        option: the option that chooses the layers.

    Raises:
        UserError: the sentence names a layer.
    """
    label = f"--{source.option} {source.path}"
    missing = sorted(set(trained) - set(stored))
    further = sorted(set(stored) - set(trained))
    if missing:
        raise UserError(
            f"{label} has no values for {len(missing)} of the {len(trained)} layers that are"
            f" trained, such as {missing[0]}: choose the file's layers by --{option}."
        )
    if further:
        raise UserError(
            f"{label} has {len(further)} layers that are not trained, such as {further[0]}, and"
            f" would be lost: choose the file's layers by --{option}."
        )
