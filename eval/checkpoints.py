"""Checkpoints of runs as subjects (``--steps``): scores over training steps, and the best steps.

python -m eval.clip_scores runs/dog --steps all
python -m eval.text_scores runs/reviews --steps 40,80,200
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import counted
from bilora_diffusion.core.statistics import CONFIDENCE
from bilora_diffusion.core.values import HELDOUT_LOSS
from bilora_diffusion.run.record import last_measured, read_run

from .cache import hash_of_lora, hash_of_peft
from .evaluation import Evaluation
from .results import plot, report
from .results.plot import Curve, Panel
from .results.table import Entry, Metric, Result, Row, Summary
from .subjects import Subject

HELP = (
    "Score checkpoints of each run: steps such as 40,80, or all for the checkpoints of"
    " --checkpointing_steps and the last one."
)
# Value of ``--steps`` for all regular checkpoints, and the picture of the scores over steps
ALL_STEPS = "all"
FIGURE = "steps.png"
LOSS = Metric(
    "held-out loss", "the run's loss at this step, from metrics.jsonl; a single value", form=".4f"
)
# Computes summaries from rows, given the ``control`` group and the ``confidence`` of the intervals
# of differences
Summarize = Callable[..., Sequence[Summary]]
BEST_STEPS_NOTE = (
    "The best step by each score, and its difference from the last step. The same measurements"
    " choose the step and give its score, so this score is too favorable. Differences are paired;"
    " the figure's bands are not. With more than two steps, the intervals here are wider than usual"
    " 95 % intervals, because they hold for all steps at the same time (Bonferroni's correction)."
)
# Fields of a `Summary` that have the unit of its metric
SCALED_FIELDS = ("mean", "error", "low", "high", "difference", "difference_low", "difference_high")


class OverSteps(Evaluation):
    """A command that can also score checkpoints.

    With ``--steps``, its settings have "best_steps", a list of sentences.
    """

    curves: Result | None = None

    def over_steps(self, result: Result, summarize: Summarize) -> Result:
        """Return the result; with ``--steps``, first add the sentences on the best steps."""
        if self.args.steps is not None:
            self.curves = curves(result, summarize)
            self.settings["best_steps"] = best(self.curves)
        return result

    def control_mark(self, result: Result) -> str:
        """Return "last" if the control is the last step of a single group of runs, or "control"."""
        runs = {subject.about.get("run") for subject in result.subjects}
        is_last = result.control == last_group(result.subjects)
        return "last" if is_last and len(runs) == 1 else "control"

    def draw_figures(self, result: Result, folder: Path) -> list[str]:
        if self.curves is None:
            return []
        return [draw(self.curves, folder)]

    def best_steps(self, result: Result) -> str:
        """Return the report's section on the best steps; "" without ``--steps``."""
        steps = result.settings.get("best_steps")
        if not steps:
            return ""
        return report.section("Best steps", BEST_STEPS_NOTE, report.bullet_list(steps))


def read_steps(text: str) -> list[int] | None:
    """Return the steps of a text such as ``40,80`` in ascending order; None for ``all``."""
    words = [word.strip() for word in text.split(",")]
    if words == [ALL_STEPS]:
        return None
    if not all(word.isdecimal() and len(word) < 10 for word in words):  # below 10^9
        raise UserError(f'--steps is "{text}": write all, or a list of steps, such as 40,80.')
    return sorted(set(map(int, words)))


def scheduled_steps(steps: Sequence[int], interval: int | None) -> list[int]:
    """Return the steps of a run's regular checkpoints and of its last checkpoint.

    An interruption can save a further checkpoint at any step, which is not needed to follow the
    run's progress.

    Args:
        steps: steps of all checkpoints of the run, in ascending order.
        interval: ``--checkpointing_steps`` of the run; without one, all steps are returned.
    """
    chosen_steps = []
    for step in steps:
        if not interval or step % interval == 0 or step == steps[-1]:
            chosen_steps.append(step)
    return chosen_steps


def left_out(subjects: Sequence[Subject], text: str) -> list[str]:
    """Return a sentence for each run with checkpoints that ``--steps all`` does not score.

    If ``--steps`` lists the steps, there is no sentence.

    Args:
        subjects: checkpoints that are scored.
        text: value of ``--steps``.
    """
    from bilora_diffusion.run import checkpoint

    if read_steps(text) is not None:  # the user has chosen the steps
        return []
    scored_steps: dict[Path, list[int]] = {}
    for subject in subjects:
        if subject.folder is not None and "step" in subject.about:
            scored_steps.setdefault(subject.folder, []).append(subject.about["step"])
    sentences = []
    for folder, steps in scored_steps.items():
        all_steps = checkpoint.steps(folder)
        missing_steps = [step for step in all_steps if step not in steps]
        if missing_steps:
            sentences.append(
                f"Left out of {folder.name}: {counted(len(missing_steps), 'checkpoint')}"
                f" ({', '.join(map(str, missing_steps))}) at steps that are not multiples of"
                f" --checkpointing_steps; --steps {','.join(map(str, all_steps))} scores all, if"
                " every run has these checkpoints."
            )
    return sentences


def of_runs(runs: Sequence[Subject], text: str) -> list[Subject]:
    """Export checkpoints of runs, and return them as subjects.

    Each subject has the weights that the run would have exported at this step. Checkpoints of one
    group of runs at the same step form a group. In ``about``, "run" is the label of the runs' group
    and "step" the step. The exported files are removed when this process ends.

    Args:
        runs: subjects that are runs.
        text: value of ``--steps``.

    Raises:
        UserError: there are no runs, or a run does not have the checkpoints or can't be exported.
    """
    from bilora_diffusion.export.conversion import export_checkpoint
    from bilora_diffusion.run import checkpoint

    if not runs:
        raise UserError("--steps is given without runs: name run folders.")
    chosen_steps = read_steps(text)
    has_groups = len({run.group for run in runs}) > 1
    # No context manager: the files are needed until all images or answers are generated.
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subjects: list[Subject] = []
    for run in runs:
        assert run.folder is not None
        steps = chosen_steps
        if steps is None:
            interval = run.record["config"].get("checkpointing_steps")
            steps = scheduled_steps(checkpoint.steps(run.folder), interval)
        if not steps:
            raise UserError(without_checkpoints(run.folder))
        for step in steps:
            output = folder / str(len(subjects))
            name = f"step {step}"
            if run.is_text:
                (weights,) = export_checkpoint(run.folder, step, "peft", output)
                digest = hash_of_peft(weights)
            else:
                (weights,) = export_checkpoint(run.folder, step, "diffusers", output)
                digest = hash_of_lora(weights)
            label = f"{run.label} {name}" if len(runs) > 1 else name
            group = f"{run.group} {name}" if has_groups else name
            about = {"run": run.group, "step": step}
            fields = {"label": label, "group": group, "about": about}
            subjects.append(replace(run, weights=weights, digest=digest, **fields))
    return subjects


def without_checkpoints(folder: Path) -> str:
    """Return a sentence that says why a run has no checkpoints and how to fix this."""
    record = read_run(folder)
    last_step = record["results"].get("steps")
    interval = record["config"].get("checkpointing_steps")
    if last_step is None or interval is None or last_step >= interval:
        return (
            f"{folder} has no checkpoints, because they were deleted or the run has not saved one"
            " yet: train again, or leave out --steps."
        )
    return (
        f"{folder} has no checkpoints, because it ended at step {last_step}, before the first one"
        f" (--checkpointing_steps {interval}): train with a smaller interval, or leave out --steps."
    )


def last_group(subjects: Sequence[Entry]) -> str | None:
    """Return the default control: the first group of runs at its last step.

    The result is None if the subjects are not checkpoints.
    """
    run = subjects[0].about.get("run")
    if run is None:
        return None
    checkpoints = [subject for subject in subjects if subject.about["run"] == run]
    return max(checkpoints, key=lambda subject: subject.about["step"]).group


def heldout_loss(subject: Subject) -> list[Row]:
    """Return one row with the held-out loss at the checkpoint's step; [] if it was not measured."""
    assert subject.folder is not None
    checkpoint_step = subject.about["step"]
    measured = last_measured(subject.folder, checkpoint_step)
    step, value = measured.get(HELDOUT_LOSS, (None, None))
    if step != checkpoint_step:
        return []
    return [subject.row(HELDOUT_LOSS, value, seed=None)]


def curves(result: Result, summarize: Summarize) -> Result:
    """Return the result as curves over steps, with a group for each group of runs.

    Differences are relative to the last step. Their intervals hold for all steps of a curve at the
    same time, so they can be used to choose a step: with n differences, each interval has the level
    1 - 0.05 / n (Bonferroni's correction). Values are multiplied by the scale of their metric, as
    figures show them.
    """
    runs: dict[str, dict[str, int]] = {}  # run -> group -> step
    for subject in result.subjects:
        runs.setdefault(subject.about["run"], {})[subject.group] = subject.about["step"]
    lines: list[Summary] = []
    for run, steps in runs.items():
        rows = []
        for row in result.rows:
            if row.group in steps and row.metric in result.metrics:
                rows.append(row)
        last_group = max(steps, key=steps.__getitem__)
        confidence = 1 - (1 - CONFIDENCE) / max(1, len(steps) - 1)
        for line in summarize(rows, control=last_group, confidence=confidence):
            scale = result.metric(line.metric).scale
            scaled = {}
            for name in SCALED_FIELDS:
                value = getattr(line, name)
                if value is not None:
                    scaled[name] = scale * value
            lines.append(replace(line, group=run, step=steps[line.group], **scaled))
    measured = {line.metric for line in lines}
    if not measured:
        raise UserError(
            "the runs recorded no held-out metric at these steps: give --benchmarks with a"
            " benchmark to measure, such as gsm8k."
        )
    metrics = {}
    for name in sorted(result.metrics, key=lambda name: name.endswith("loss")):  # losses last
        if name in measured:
            metrics[name] = replace(result.metrics[name], scale=1.0)  # values are scaled above
    entries = [Entry(run, run) for run in runs]
    return replace(result, subjects=entries, metrics=metrics, summaries=lines, rows=())


def draw(curves: Result, folder: Path) -> str:
    """Draw a panel for each metric, with intervals of the means, and return the picture's name."""
    panels = []
    for name, metric in curves.metrics.items():
        direction = "higher" if metric.higher_is_better else "lower"
        has_bands = any(line.interval for line in curves.summaries if line.metric == name)
        label = "mean and 95 % interval" if has_bands else ""
        lines = [Curve(run, name, label=run, interval=True) for run in curves.groups]
        # All panels have the same legend, so only the first one shows it.
        has_legend = len(lines) > 1 and not panels
        title = f"{metric.title}, {direction} is better"
        panels.append(Panel(title, label, lines, legend=has_legend))
    rows = [panels[start : start + 3] for start in range(0, len(panels), 3)]
    plot.panels(curves, folder / FIGURE, rows)
    return FIGURE


def best(curves: Result) -> list[str]:
    """Return a sentence for each group of runs and metric.

    It names the best step and compares it with the last step.
    """
    sentences = []
    for run in curves.groups:
        for name, metric in curves.metrics.items():
            points = [point for point in curves.over_training(run, name) if point.mean is not None]
            if not points:
                continue
            choose = max if metric.higher_is_better else min
            best_point = choose(points, key=lambda point: point.mean or 0.0)  # the first in a tie
            change = "the last step"
            if best_point.control:
                difference = report.difference(best_point, metric)
                change = f"difference from the last step {difference} {best_point.over}s better"
            if interval := best_point.difference_interval:
                verb = "includes" if interval[0] <= 0 <= interval[1] else "excludes"
                change += f"; the interval {verb} zero"
            head = f"{run}: {metric.title}" if len(curves.groups) > 1 else metric.title
            mean = report.number(best_point.mean, metric)
            sentences.append(f"{head}: best at step {best_point.step} ({mean}), {change}.")
    return sentences
