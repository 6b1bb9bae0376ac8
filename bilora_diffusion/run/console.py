"""A run at the terminal: a bar during it, a block after it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from . import checkpoint, runlog
from .durations import duration
from .record import BY_CONCEPT

SMOOTHING = 0.95  # of the loss that the bar shows: a mean over about 20 steps


class Bar:
    """The progress bar, with a smoothed loss and a word on what the run is waiting for.

    Args:
        total, initial: optimizer steps in all, and those already taken.
        name: what stands in front while it trains.
        record: `RunLog.doing`; None in processes other than the main one, which show nothing.
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


def closing(folder: Path, files: Mapping[str, str], scores: str) -> str:
    """Files of a run by their uses, and what to do next; last the held-out loss that the last step
    gave away, or how to get one.

    Args:
        files: what a file or folder in the run folder is for -> its name, if it is there.
        scores: the module that scores such runs, such as "eval.clip_scores".
    """
    quoted = shlex.quote(str(folder))
    lines = {use: str(folder / name) for use, name in files.items() if (folder / name).exists()}
    if kept := checkpoint.steps(folder):
        where = folder / checkpoint.CHECKPOINTS
        lines["checkpoints"] = f"{where} (steps {', '.join(map(str, kept))})"
    rows = runlog.read_metrics(folder)
    losses = {r["step"]: r["heldout_loss"] for r in rows if r.get("heldout_loss") is not None}
    record = runlog.read_run(folder)
    config, last = record["config"], []
    if losses:
        final, best = max(losses), min(losses, key=lambda step: losses[step])
        lines["held-out loss"] = _curve(losses)
        for key in dict.fromkeys(key for row in rows for key in row if key.startswith(BY_CONCEPT)):
            own = {row["step"]: row[key] for row in rows if row.get(key) is not None}
            lines[f"  {key.removeprefix(BY_CONCEPT)}"] = _curve(own) if own else "not finite"
        gain = 100 * (1 - losses[best] / losses[final])
        saved, images = "best_step" in record["results"], "validation_dataset" in config
        last = [_advice(quoted, best, final, gain, kept, saved, images)]
    elif not config.get("fit"):
        flag = "--validation_file" if "validation_file" in config else "--validation_dataset"
        last = [
            "nothing was held out, and the training loss can't say when the model overfits:"
            f" --fit chooses the steps by folds of the same data, {flag} measures on other data"
        ]
    if in_repository():
        lines["look at it"] = f"python -m app.viewer {shlex.quote(str(folder.parent))}"
        lines["score it"] = f"python -m {scores} {quoted} base"
    width = max(map(len, lines))
    took = duration(record["wall_seconds"])
    block = [f"done in {took}", *(f"  {k:<{width}}  {v}" for k, v in lines.items())]
    return "\n".join([*block, *last])


def _curve(losses: Mapping[int, float]) -> str:
    """First, last and lowest of losses by their steps."""
    first, final, best = min(losses), max(losses), min(losses, key=lambda step: losses[step])
    low = f"lowest {losses[best]:.4f} at step {best}" if best != final else "the lowest measured"
    return f"{losses[first]:.4f} at step {first}, {losses[final]:.4f} at step {final}, {low}"


def in_repository() -> bool:
    """Test that the package is that of the repository, which alone has viewer and evaluation."""
    return (Path(__file__).resolve().parents[2] / "app" / "viewer.py").is_file()


def _advice(
    folder: str, best: int, last: int, gain: float, kept: Collection[int], saved: bool, images: bool
) -> str:
    """The step with the lowest held-out loss, and how to have its weights.

    Args:
        gain: of the best step over the last, in percent.
        kept: steps of which there are checkpoints.
        saved: whether what the run leaves is of the lowest.
        images: whether the run makes images, which the loss does not rank.
    """
    if best == last:
        return (
            f"by the held-out loss step {last}, the last, was the best measured: more steps may be"
            " better still"
        )
    comparison = f"by the held-out loss step {best} was {gain:.1f} % better than step {last}"
    if best == 0:
        return f"{comparison}, so nothing was gained: lower --learning_rate"
    if images:
        comparison += "; the images of later steps can be better, so compare them"
    if saved:
        return f"{comparison}. What is saved is of step {best}"
    if best in kept:
        export = f"python -m bilora_diffusion.export {folder} --step {best}"
        return f"{comparison}. Export it with {export}"
    return f"{comparison}. To have it, train again with --keep_best, or with --fit"


def quiet() -> None:
    """Keep the libraries' loading bars and notices out of the training output."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
