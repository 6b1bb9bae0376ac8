"""``--folds``: short runs, each of which holds out another part, choose the number of steps.

It is cross-validation of the number of steps: for those who have too few images to spare some of
them for good. In the run folder,

    folds/1, folds/2, ...   the run folders of the folds
    folds.json              their held-out losses by step, the mean, and what was chosen
    folds.png               the same as a picture

The run on everything keeps the schedules of ``--max_train_steps`` and ends at the chosen step, so
that up to there it is what the folds have measured, whatever the course of the learning rate.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config.run import RunConfig
from ..durable import dump_json, replacing, strict_json, write_text
from ..errors import TrainingError, UserError
from ..run import checkpoint, runlog
from ..run.checkpoint import require_same_settings
from ..run.folder import FOLDS, FOLDS_CURVES, FOLDS_FIGURE, clear
from ..run.interruption import Stop
from ..run.record import read_folds
from ..run.runlog import RunLog
from ..seeds import parts

Curve = dict[int, float]
"""Held-out loss by step; not finite where it was not."""
Attempt = Callable[[Any, Path, Path | None], Stop | None]
logger = logging.getLogger(__name__)


def choose(cfg: RunConfig, accelerator: Accelerator, run: Attempt) -> int | Stop:
    """The number of steps that the folds choose; those that are finished are not made again.

    Args:
        cfg: of the run on everything, with ``folds`` and ``resume_from_checkpoint``.
        accelerator: brings the processes together.
        run: trains by a configuration in a folder, from a checkpoint or from the start.

    Returns:
        The step, at least 1; or what stopped a fold.

    Raises:
        UserError: the folds that are there were made with other settings.
        TrainingError: no step has a finite loss.
    """
    folder, count = Path(cfg.output_dir), cfg.folds or 0
    earlier = _earlier(cfg, folder, accelerator)
    accelerator.wait_for_everyone()  # before the main process writes what all have read
    if earlier is not None and earlier["chosen_steps"] is not None:
        return earlier["chosen_steps"]
    log = _begin(cfg, folder, accelerator, bool(earlier)) if accelerator.is_main_process else None
    curves: list[Curve] = []
    try:
        for number in range(1, count + 1):
            place = folder / FOLDS / str(number)
            if not _is_finished(place):
                if log is not None:
                    log.doing(f"fold {number} of {count}")
                stop = run(cfg.of_fold(number, str(place)), place, checkpoint.latest(place))
                if stop is not None:
                    _close(log, "interrupted")
                    return stop._replace(fold=number)
            accelerator.wait_for_everyone()
            curves.append(_curve(place))
            if log is not None:
                _write(folder, cfg, accelerator, curves)
        chosen = lowest(curves)
        if log is not None:
            _write(folder, cfg, accelerator, curves, chosen)
            draw(folder / FOLDS_FIGURE, curves, chosen)
            _tell(curves, chosen)
    except BaseException as error:
        kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        _close(log, kind, str(error) or None)
        raise
    _close(log, "running")
    return chosen


def dealt(cfg: RunConfig, names: Sequence[str], what: str) -> tuple[list[int], list[int]]:
    """The positions that ``--fold`` learns from, and those that it holds out; both in order.

    Args:
        cfg: with ``folds`` and ``fold``.
        names: of the samples, by which they are dealt; not by their order or the run's seed.
        what: they are called, such as "images".

    Raises:
        UserError: there are fewer of them than folds, or one stands twice.
    """
    folds, fold = cfg.folds or 0, cfg.fold or 0
    if len(names) < folds:
        raise UserError(
            f"--folds {folds} is more than the {len(names)} {what}: give at most {len(names)}."
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(
            f'"{twice[0]}" stands twice among the {what}, so a fold would learn what it holds out:'
            " drop one, or --folds."
        )
    held = parts(names, folds)[fold - 1]
    return sorted(set(range(len(names))) - set(held)), held


def lowest(curves: Sequence[Curve]) -> int:
    """The step, not the first, at which the mean of the curves is lowest; of equal ones the first.

    Raises:
        TrainingError: the mean is finite nowhere.
    """
    steps, means, _ = averaged(curves)
    found = [(mean, step) for step, mean in zip(steps, means, strict=True) if step > 0]
    mean, step = min(found)
    if not math.isfinite(mean):
        raise TrainingError(
            "no step of the folds has a finite held-out loss: lower --learning_rate."
        )
    return step


def averaged(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Steps, and at each the mean over the folds and its standard error."""
    steps = sorted(curves[0])
    values = [[curve[step] for curve in curves] for step in steps]
    means = [statistics.fmean(row) for row in values]
    root = math.sqrt(len(curves))
    errors = [
        statistics.stdev(row) / root if len(row) > 1 and math.isfinite(sum(row)) else 0.0
        for row in values
    ]
    return steps, means, errors


def draw(path: Path, curves: Sequence[Curve], chosen: int) -> None:
    """The curves and their mean, with a band of one standard error, as PNG."""
    from matplotlib.figure import Figure  # here, as it takes a while and folds are rare

    steps, means, errors = averaged(curves)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.add_subplot()
    for curve in curves:
        axis.plot(steps, [curve[step] for step in steps], color="0.75", lw=0.8)
    low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
    axis.fill_between(steps, low, high, color="tab:blue", alpha=0.2, lw=0)
    axis.plot(steps, means, color="tab:blue", marker=".", label=f"mean of {len(curves)} folds")
    axis.axvline(chosen, color="0.3", ls=":", label=f"chosen: {chosen} steps")
    axis.set(xlabel="optimizer step", ylabel="held-out loss")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    with replacing(path) as aside:
        figure.savefig(aside, dpi=120)


def _earlier(cfg: RunConfig, folder: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """What a resumed run finds of its folds; None for a fresh start."""
    if cfg.resume_from_checkpoint is None:
        return None
    earlier = read_folds(folder / FOLDS_CURVES)
    if earlier is None:
        if checkpoint.latest(folder) is None:
            return None
        raise UserError(
            f"{folder} has checkpoints and no {FOLDS_CURVES}, without which it is not known where"
            " the run is to end: start a new one in another --output_dir."
        )
    require_same_settings(
        earlier["settings"], _settings(cfg, accelerator), cfg.without_influence | {"fold"}
    )
    return earlier


def _settings(cfg: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What the folds' curves depend on."""
    samples = cfg.train_batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
    cut = ("train_batch_size", "gradient_accumulation_steps")
    told = {key: value for key, value in cfg.fingerprint().items() if key not in cut}
    return {**told, "step_size": samples, "measured every": cfg.validation_loss_steps}


def _begin(cfg: RunConfig, folder: Path, accelerator: Accelerator, resumes: bool) -> RunLog:
    clear(folder, keep=(FOLDS, FOLDS_CURVES) if resumes else ())
    log = RunLog(folder, accelerator.device)
    log.start(cfg.to_dict(), cfg.method, cfg.seed, None)
    if not resumes:
        _write(folder, cfg, accelerator, [])
    return log


def _close(log: RunLog | None, status: str, reason: str | None = None) -> None:
    if log is not None:
        log.close(status, reason)


def _is_finished(place: Path) -> bool:
    return (place / runlog.RUN).exists() and runlog.read_run(place)["status"] == "finished"


def _curve(place: Path) -> Curve:
    rows = [row for row in runlog.read_metrics(place) if "heldout_loss" in row]
    losses = {row["step"]: row["heldout_loss"] for row in rows}
    return {step: math.inf if loss is None else loss for step, loss in losses.items()}


def _write(
    folder: Path,
    cfg: RunConfig,
    accelerator: Accelerator,
    curves: Sequence[Curve],
    chosen: int | None = None,
) -> None:
    steps, means, errors = averaged(curves) if curves else ([], [], [])
    content = {
        "settings": _settings(cfg, accelerator),
        "steps": steps,
        "folds": [[curve[step] for step in steps] for curve in curves],
        "mean": means,
        "standard_error": errors,
        "chosen_steps": chosen,
    }
    write_text(folder / FOLDS_CURVES, dump_json(strict_json(content)[0]))


def _tell(curves: Sequence[Curve], chosen: int) -> None:
    steps, means, _ = averaged(curves)
    course = dict(zip(steps, means, strict=True))
    logger.info(
        "%d folds: mean held-out loss %.4f at step %d, lowest %.4f at step %d, %.4f at step %d;"
        " now everything is learned from, for %d steps",
        *(len(curves), means[0], steps[0], course[chosen], chosen, means[-1], steps[-1], chosen),
    )
    if means[0] <= course[chosen]:
        logger.warning("no step is better than the base model: lower --learning_rate.")
    elif chosen == steps[-1]:
        logger.warning("the last step is the best: try a higher --max_train_steps.")
