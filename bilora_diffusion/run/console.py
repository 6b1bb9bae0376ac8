"""Terminal output of a run: the progress bar, and the summary after the run."""

from __future__ import annotations

import itertools
import logging
import math
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..core.files import duration
from ..core.statistics import mean_interval
from ..core.values import (
    DISTANCE_BY_PICTURE,
    HELDOUT_DISTANCE,
    HELDOUT_LOSS,
    is_better,
    measure_title,
)
from . import checkpoint, runlog
from .record import BY_CONCEPT, TRAINING_ACTIVITY

logger = logging.getLogger(__name__)
SMOOTHING = 0.95  # decay of the loss average in the bar, which spans about 20 steps


class Bar:
    """Progress bar with a smoothed loss and the activity that the run is waiting for.

    Args:
        total, initial: total number of optimizer steps, and the number already taken.
        name: text in front of the bar while the run trains.
        record: `RunLog.record_activity`; None in processes other than the main one, which show no
            bar.
    """

    def __init__(
        self, total: int, initial: int, name: str, record: Callable[[str], None] | None
    ) -> None:
        self._bar = tqdm(total=total, initial=initial, desc=name, disable=record is None)
        self._name = name
        self._record = record
        self._mean = 0.0  # running weighted sum of losses
        self._weight = 0.0  # sum of the weights

    def __enter__(self) -> Bar:
        if self._record is not None:
            self._record(TRAINING_ACTIVITY)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, values: Mapping[str, Any]) -> None:
        """Show one more step.

        Args:
            values: the step's values in the log.
        """
        if math.isfinite(values["loss"]):  # fp16's loss scaler skips steps whose loss is not finite
            # Dividing by the sum of the weights, below, removes the bias towards 0 in the first
            # steps.
            self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * values["loss"]
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        postfix: dict[str, str] = {}
        if self._weight:
            postfix["loss"] = f"{self._mean / self._weight:.4f}"
        postfix["lr"] = f"{values['lr']:.1e}"
        if "auxiliary_norm" in values:
            postfix["aux"] = f"{values['auxiliary_norm']:.4f}"
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update()

    def show_error(self, sentence: str) -> None:
        """Log an error that does not end the run, on its own line."""
        self._bar.clear()
        logger.error("%s", sentence)
        self._bar.refresh()

    @contextmanager
    def waiting_for(self, activity: str) -> Iterator[None]:
        """Show and record an activity that the run waits for inside the context."""
        if self._record is None:
            yield
            return
        self._record(activity)
        self._bar.set_description_str(f"{self._name}: {activity}")
        try:
            yield
        finally:
            self._record(TRAINING_ACTIVITY)
            self._bar.set_description_str(self._name)
            # The time of the activity is not part of the next step's time.
            self._bar.unpause()


def describe_run(folder: Path, files: Mapping[str, str], scores: str) -> str:
    """Return the summary of a finished run: its files by use, its measurements, and advice.

    Args:
        folder: the run folder.
        files: names of files and folders in the run folder, by use; only existing ones are listed.
        scores: the module that scores this kind of run, such as "eval.clip_scores".
    """
    quoted_folder = shlex.quote(str(folder))
    lines: dict[str, str] = {}
    for use, name in files.items():
        if (folder / name).exists():
            lines[use] = str(folder / name)
    record = runlog.read_run(folder)

    saved_steps = checkpoint.steps(folder)
    if saved_steps:
        listed = f"steps {', '.join(map(str, saved_steps))}"
        # A run that was resumed from an earlier checkpoint may have saved a removed step again.
        removed_steps = sorted(set(record.get("removed_checkpoints", [])) - set(saved_steps))
        if removed_steps:
            removed = ", ".join(map(str, removed_steps))
            listed += f"; removed: {removed}; --checkpoints_total_limit 0 keeps all"
        lines["checkpoints"] = f"{folder / checkpoint.CHECKPOINTS} ({listed})"

    rows = runlog.read_metrics(folder)
    measure = record["results"].get("chosen_by", HELDOUT_LOSS)
    lines |= _describe_measurements(rows, measure)
    failures = record["results"].get("failed_evaluations", [])
    if failures:
        lines["failed"] = "; ".join(failure["sentence"] for failure in failures)
    config = record["config"]
    if config.get("guided_target", 1) > 1:
        # The weights contain the guidance.
        lines["sample it"] = (
            "without guidance (a scale of 1, no negative prompt); for new shapes use 2 to 4"
        )
    advice = ""
    if _column(rows, HELDOUT_LOSS):
        # The held-out loss ranks checkpoints wrongly for images (docs/results.md), not for text.
        is_by_samples = bool(_column(rows, HELDOUT_DISTANCE))
        if is_by_samples or "validation_dataset" not in config:
            if is_by_samples:
                measure = HELDOUT_DISTANCE
            exports_best = record["results"].get("best_step") is not None
            advice = _advice(quoted_folder, rows, measure, saved_steps, exports_best)
        else:
            advice = (
                "the held-out loss does not show which step has the best images, since images can"
                " improve long after the loss is lowest: compare the images of all steps, or train"
                " with --keep_best --choose_by samples"
            )
    else:
        # The scripts have different options for held-out data.
        fix = "give data that is not trained on as --validation_dataset"
        if "validation_file" in config:
            fix = "hold out rows with --validation_split 0.1, or give a --validation_file"
        advice = "nothing was held out, and the training loss does not show overfitting: " + fix
    if in_repository():
        lines["look at it"] = f"python -m app.viewer {shlex.quote(str(folder.parent))}"
        lines["score it"] = f"python -m {scores} {quoted_folder} base"

    # The uses form a column on the left.
    width = max(map(len, lines))
    block = [_describe_end(record)]
    block += [f"  {use:<{width}}  {value}" for use, value in lines.items()]
    if advice:
        block.append(advice)
    return "\n".join(block)


def describe_comparison(folders: Sequence[Path], score: str) -> str:
    """Describe the folders of paired runs and, in the repository, the commands to compare them.

    Args:
        folders: run folders with the same parent.
        score: command that scores the runs.
    """
    line = f"run and control: {' and '.join(map(str, folders))}"
    if not in_repository():
        return line
    parent = shlex.quote(str(folders[0].parent))
    return f"{line}\n  look at both  python -m app.viewer {parent}\n  score both    {score}"


def scoring_command(folders: Sequence[str], heldout: str) -> str:
    """Return the command that scores runs of the miniature on held-out icons.

    Guidance comes from the base model, since ordinary guidance removes much of the style.
    """
    return (
        f"python -m eval.clip_scores {shlex.join(folders)} --prompts {shlex.quote(heldout)}"
        " --guidance_from base --guidance_scale 2"
    )


def _describe_measurements(rows: Sequence[Mapping[str, Any]], chosen_by: str) -> dict[str, str]:
    """Return a line for each held-out measure, by its title; {} without held-out samples.

    Args:
        rows: metrics of the run.
        chosen_by: log name of the measure that chose the best step; scores that did not choose it
            get no line.
    """
    losses = _column(rows, HELDOUT_LOSS)
    if not losses:
        return {}
    lines = {measure_title(HELDOUT_LOSS): _describe_curve(losses, HELDOUT_LOSS)}
    # The loss of each concept, indented below the loss of all concepts.
    for key in dict.fromkeys(itertools.chain(*rows)):
        if key.startswith(BY_CONCEPT):
            concept_losses = _column(rows, key)
            line = "not finite"
            if concept_losses:
                line = _describe_curve(concept_losses, HELDOUT_LOSS)
            lines[f"  {key.removeprefix(BY_CONCEPT)}"] = line
    for measure in (HELDOUT_DISTANCE, chosen_by):
        values = _column(rows, measure)
        if values and measure_title(measure) not in lines:
            lines[measure_title(measure)] = _describe_curve(values, measure)
    return lines


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Return a metric by step, for the steps at which it was measured and finite."""
    return {row["step"]: row[key] for row in rows if row.get(key) is not None}


def _describe_curve(values: Mapping[int, float], measure: str) -> str:
    """Describe the first, the last and the best value of a measure, with their steps."""
    first_step = min(values)
    last_step = max(values)
    best_step = _best_step(values, measure)
    word = "lowest" if is_better(measure, 0, 1) else "highest"
    best = f"the {word} measured"
    if best_step != last_step:
        best = f"{word} {values[best_step]:.4f} at step {best_step}"
    return (
        f"{values[first_step]:.4f} at step {first_step}, {values[last_step]:.4f} at step"
        f" {last_step}, {best}"
    )


def _best_step(values: Mapping[int, float], measure: str) -> int:
    """Return the step with the best value of a measure, the earliest one in a tie."""
    best_step = min(values)
    for step in sorted(values):
        if is_better(measure, values[step], values[best_step]):
            best_step = step
    return best_step


def in_repository() -> bool:
    """Return whether the package is in its repository; a wheel has no viewer and no evaluation."""
    return (Path(__file__).resolve().parents[2] / "app" / "viewer.py").is_file()


def _describe_end(record: Mapping[str, Any]) -> str:
    """Describe a finished run's duration and end, and the step whose weights are in its files."""
    sentence = f"done in {duration(record['wall_seconds'])}"
    results = record["results"]
    if results.get("stopped_early"):
        sentence += f", stopped early at step {results['steps']} of {record['num_steps']}"
    exported_step = results.get("best_step")
    if exported_step is not None:
        sentence += (
            f"; the files have the weights of step {exported_step}, the best by the"
            f" {measure_title(results.get('chosen_by', HELDOUT_LOSS))}"
        )
    elif "steps" in results:
        sentence += f"; the files have the weights of step {results['steps']}, the last"
    return sentence


def _advice(
    folder: str,
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    saved_steps: Collection[int],
    exports_best: bool,
) -> str:
    """Return a sentence on the best trained step, how certain it is, and how to get its weights.

    Args:
        folder: the run folder, quoted for a shell.
        rows: metrics of the run.
        measure: log name of the measure.
        saved_steps: steps that have a checkpoint.
        exports_best: whether the run's files have the weights of the best step.
    """
    curve = _column(rows, measure)
    base_value = curve.pop(0, None)  # at step 0, where the adapters have no effect
    title = measure_title(measure)
    if not curve:
        return f"the {title} was not finite at any trained step: lower --learning_rate"
    last_step = max(curve)
    best_step = _best_step(curve, measure)
    if base_value is not None and not is_better(measure, curve[best_step], base_value):
        sentence = f"by the {title} no measured step was better than the base model"
        if not _is_sure(rows, measure, best_step, 0):
            return (
                f"{sentence}, and the best, step {best_step}, differs from it by no more than the"
                " spread over the held-out captions: train longer, or hold out more images"
            )
        return f"{sentence}: try more steps or another --learning_rate"
    if best_step == last_step:
        return (
            f"by the {title} step {last_step}, the last, was the best measured: more steps"
            " may be better still"
        )
    if is_better(measure, 0, 1):
        advantage = f"{100 * (1 - curve[best_step] / curve[last_step]):.1f} % better"
    else:  # a score may be 0 at the last step
        advantage = f"{curve[best_step] - curve[last_step]:.4f} better"
    sentence = f"by the {title} step {best_step} was {advantage} than step {last_step}"
    if not _is_sure(rows, measure, best_step, last_step):
        return (
            f"{sentence}, no more than the spread over the held-out captions: compare the images of"
            " both"
        )
    if exports_best:
        return sentence
    if best_step in saved_steps:
        export = f"python -m bilora_diffusion.export {folder} --step {best_step}"
        return f"{sentence}. Export it with {export}"
    return f"{sentence}. To get its weights, train again with --keep_best"


def _is_sure(rows: Sequence[Mapping[str, Any]], measure: str, step: int, other_step: int) -> bool:
    """Return whether two steps differ by more than the spread over held-out samples.

    The steps are compared sample by sample, so samples that are hard at every step do not widen the
    interval. Only the distance is recorded by sample; differences of other measures count as sure.
    """
    if measure != HELDOUT_DISTANCE:
        return True
    differences = []
    for name in dict.fromkeys(itertools.chain(*rows)):
        if name.startswith(DISTANCE_BY_PICTURE):
            values = _column(rows, name)
            if step not in values or other_step not in values:
                return False
            differences.append(values[step] - values[other_step])
    if not differences:
        return True
    interval = mean_interval(differences)
    return interval is not None and not interval.low <= 0 <= interval.high


def quiet() -> None:
    """Turn off progress bars, notices and warnings of diffusers and Transformers."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
