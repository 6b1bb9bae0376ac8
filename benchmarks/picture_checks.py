"""What `pictures.py` refuses before it trains, since it would fail after the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import checkpoint
from eval.clip_scores import ClipScores, load_image_model, load_models, settings


def require_checkpoints(folder: Path, steps: Sequence[int]) -> None:
    """Refuse a run that is beyond a step whose checkpoint it lacks."""
    saved = checkpoint.steps(folder)
    for step in steps:
        if saved and step < saved[-1] and step not in saved:
            raise UserError(
                f"{folder} was trained with other --steps and has no checkpoint of step {step}:"
                " remove that folder, or give another --runs_dir."
            )


def require_memory(preset: str, gigabytes: float) -> None:
    """Refuse a GPU that is smaller than the weights of the models that sample and score.

    Args:
        gigabytes: size of these weights, without quantization.
    """
    if not torch.cuda.is_available():
        return
    _, total_bytes = torch.cuda.mem_get_info()
    if total_bytes < gigabytes * 1e9:
        raise UserError(
            f"--preset {preset} samples with {gigabytes:g} GB of weights, without quantization, and"
            f" this GPU has {total_bytes / 1e9:.0f} GB: choose another --preset."
        )


def require_scoring(command_lines: Sequence[Sequence[str]], base: str) -> None:
    """Refuse flags of eval.clip_scores that a model does not take, and scorers that can't be read.

    Args:
        command_lines: the flags for each kind of guidance, with the same scorers.
        base: base model of the runs.
    """
    parser = ClipScores.parser()
    parsed = [parser.read(words) for words in command_lines]
    for args in parsed:
        settings.sampling(args, base)
    load_models(*settings.models(parsed[0], base))
    if parsed[0].image_model is not None:
        load_image_model(parsed[0].image_model)
