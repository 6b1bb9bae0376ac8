"""What a run says at the terminal: one line before it, a bar during it, a block after it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from . import checkpoint, provenance
from .durations import duration

SMOOTHING = 0.95  # of the loss that the bar shows: a mean over about 20 steps
ARITHMETIC = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}


class Bar:
    """The progress bar, with a smoothed loss and a word on what the run is waiting for.

    Args:
        total, initial: optimizer steps in all, and those already taken.
        name: what stands in front while it trains.
        record: is told what the run does, so that others can see it (`RunLog.doing`); None in
            processes other than the main one, which show nothing.
    """

    def __init__(
        self, total: int, initial: int, name: str, record: Callable[[str], None] | None
    ) -> None:
        self._bar = tqdm(total=total, initial=initial, desc=name, disable=record is None)
        self._name, self._record = name, record
        self._mean, self._weight = 0.0, 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, values: Mapping[str, Any]) -> None:
        """One more step, with what was logged about it."""
        if math.isfinite(values["loss"]):  # in fp16 a step without one is left out
            self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * values["loss"]
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        shown = {"loss": f"{self._mean / self._weight:.4f}"} if self._weight else {}
        shown["lr"] = f"{values['lr']:.1e}"
        if "auxiliary_norm" in values:
            shown["aux"] = f"{values['auxiliary_norm']:.4f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Within the context the bar says that it waits for ``what``."""
        if self._record is None:
            yield
            return
        self._record(what)
        self._bar.set_description_str(f"{self._name}: {what}")
        try:
            yield
        finally:
            self._record("training")
            self._bar.set_description_str(self._name)


def opening(trainer: Any, folder: Path) -> str:
    """What is about to be trained on what, for how long, where, and where to."""
    cfg, schedule = trainer.cfg, trainer.schedule
    epochs = trainer.num_steps * schedule.step_size / trainer.task.num_samples
    return "; ".join(
        [
            trainer.task.data_summary(),
            f"{_count(trainer.num_steps, 'step')} of {schedule.step_size} ({epochs:.3g} epochs)",
            _trained(trainer.method, cfg),
            f"{_device(trainer.accelerator)}, {ARITHMETIC[cfg.mixed_precision]}",
            *([f"from step {trainer.step}"] if trainer.step else []),
            f"into {folder}",
        ]
    )


def _trained(method: Any, cfg: Any) -> str:
    count = sum(p.numel() for p in method.clip_parameters())
    weights = f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
    if method.exports_weights:
        return f"{method.title} of {weights} weights"
    layers = _count(len(method.layers()), "layer")
    return f"{method.title} of rank {cfg.rank} on {layers} ({weights} parameters)"


def _device(accelerator: Any) -> str:
    name = provenance.device(accelerator.device)["name"]
    many = accelerator.num_processes
    return f"{many} processes on {name}" if many > 1 else str(name)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def closing(
    folder: Path,
    files: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    seconds: float,
    scores: str,
) -> str:
    """What was saved where, how the held-out loss went, and what to do next.

    Args:
        folder: the run folder.
        files: what a file or folder in it is for -> its name; those that are not there are left
            out.
        rows: the run's metrics.
        seconds: how long it took in all.
        scores: the module that scores such runs, such as "eval.clip_scores".
    """
    present = {what: folder / name for what, name in files.items() if (folder / name).exists()}
    lines = {what: str(path) for what, path in present.items()}
    kept = checkpoint.steps(folder)
    if kept:
        where = folder / checkpoint.CHECKPOINTS
        lines["checkpoints"] = f"{where} (steps {', '.join(map(str, kept))})"
    losses = {
        row["step"]: row["heldout_loss"] for row in rows if row.get("heldout_loss") is not None
    }
    if losses:
        lines["held-out loss"], best = _course(losses)
        if best in kept and best != max(losses):
            command = f"python -m bilora_diffusion.export {_quoted(folder)} --step {best}"
            lines[f"step {best}'s adapter"] = command
    lines["look at it"] = f"python -m app.viewer {_quoted(folder.parent)}"
    lines["score it"] = f"python -m {scores} {_quoted(folder)} base"
    width = max(map(len, lines))
    return "\n".join(
        [f"done in {duration(seconds)}", *(f"  {k:<{width}}  {v}" for k, v in lines.items())]
    )


def _course(losses: Mapping[int, float]) -> tuple[str, int]:
    """How the held-out loss went, and the measured step at which it was lowest."""
    first, last = min(losses), max(losses)
    best = min(losses, key=lambda step: losses[step])
    course = f"{losses[first]:.4f} at step {first}, {losses[last]:.4f} at step {last}"
    if best == last:
        return f"{course}, the lowest measured", best
    return f"{course}, lowest {losses[best]:.4f} at step {best}", best


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def quiet() -> None:
    """Keep the libraries' loading bars and notices out of the training output."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
