"""What a run shows outside of its folder, and what its record says when it fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..core.durable import disk_is_full
from ..core.errors import (
    Diverged,
    TrainingError,
    UserError,
    keep_trace,
    unexpected,
)
from ..run.record import read_metrics
from ..run.runlog import RunLog

logger = logging.getLogger(__name__)


def show_images(
    trackers: Sequence[Any], files: Sequence[Path], prompts: Sequence[str], step: int
) -> None:
    """Show validation images in TensorBoard and in Weights & Biases, as diffusers' scripts do.

    Args:
        trackers: Those of accelerate.
        files: Images; may be none.
        prompts: The prompt of each.
        step: The step that the trackers are at.
    """
    if not files:
        return
    # Trackers take RGB; a sampled image with transparency would have four channels.
    images = [Image.open(file).convert("RGB") for file in files]
    for tracker in trackers:
        if tracker.name == "tensorboard":
            arrays = [np.asarray(image)[None] for image in images]  # (1, height, width, 3)
            sizes = {image.size for image in images}
            batches = {}
            if len(sizes) == 1:
                batches["validation"] = np.concatenate(arrays)
            else:  # one batch has one size
                for number, array in enumerate(arrays):
                    batches[f"validation {number:03d}"] = array
            tracker.log_images(batches, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            captioned = []
            for image, prompt in zip(images, prompts, strict=True):
                captioned.append(wandb.Image(image, caption=prompt))
            tracker.log({"validation": captioned}, step=step)


def warn_of_zero_auxiliary(folder: Path) -> None:
    """Warn that a run was plain LoRA, where the norm of its auxiliary was 0 in every step."""
    norms = [row["auxiliary_norm"] for row in read_metrics(folder) if "auxiliary_norm" in row]
    if norms and all(norm == 0 for norm in norms):
        logger.warning(
            "the auxiliary was 0 in every step of %s, so this run is plain LoRA: look at --rho,"
            " --auxiliary_learning_rate and the schedule of the learning rate",
            folder,
        )


@contextlib.contextmanager
def recorded(log: RunLog | None, folder: Path) -> Iterator[None]:
    """Within the context, whatever ends the run is written into its record and raised again.

    The trace of an unexpected error is kept in the run folder.

    Args:
        log: Record of the main process; None in the others.
        folder: Run folder.

    Raises:
        TrainingError: The disk is full.
    """
    try:
        yield
    except KeyboardInterrupt:
        _close(log, "interrupted")
        raise
    except Exception as error:
        if disk_is_full(error):
            sentence = (
                f"the disk that holds {folder} is full: make room and go on with"
                " --resume_from_checkpoint auto"
            )
            _close(log, "failed", sentence)
            raise TrainingError(sentence) from error
        sentence = str(error)
        # Errors of our own say all that there is to say in their sentence.
        if not isinstance(error, UserError | TrainingError):
            keep_trace(error, folder)
            sentence = unexpected(error)
        # A search goes on without a run that diverged, but not after another error.
        results = {"diverged": True} if isinstance(error, Diverged) else {}
        _close(log, "failed", sentence, **results)
        raise


def _close(log: RunLog | None, status: str, reason: str | None = None, **results: Any) -> None:
    # On a full disk the record stays as it was.
    with contextlib.suppress(OSError):
        if log is not None:
            log.close(status, reason, **results)
