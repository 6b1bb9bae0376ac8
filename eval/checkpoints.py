"""Checkpoints of runs as subjects (``--steps``): their scores over steps, and the best steps.

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
from bilora_diffusion.run.record import last_measured

from . import digests, plot, report
from .evaluation import Evaluation
from .plot import Curve, Panel
from .subjects import Subject
from .table import Entry, Metric, Result, Row, Summary

HELP = "Score these checkpoints of each run: all, or steps such as 40,80."
ALL, FIGURE = "all", "steps.png"
HELDOUT_LOSS = "heldout_loss"
LOSS = Metric(
    "held-out loss", "that of the run at this step, in metrics.jsonl, one number", form=".4f"
)
Summarize = Callable[..., Sequence[Summary]]
"""Rows, and the group that is the ``control`` -> their summaries."""
CHOSEN = (
    "The best step by each score, and its difference to the run's last step here. To be the best of"
    " several by the same measurements flatters it. Differences are paired, the figure's bands not."
)
_SHOWN = ("mean", "error", "low", "high", "difference", "difference_low", "difference_high")


class OverSteps(Evaluation):
    """A command that also scores checkpoints; its settings then have "best_steps", sentences."""

    curves: Result | None = None

    def over_steps(self, result: Result, summarize: Summarize) -> Result:
        """The result, with its best steps if it is one of checkpoints."""
        if self.args.steps is not None:
            self.curves = curves(result, summarize)
            self.settings["best_steps"] = best(self.curves)
        return result

    def figures(self, result: Result, folder: Path) -> list[str]:
        return [] if self.curves is None else [draw(self.curves, folder)]

    def best_steps(self, result: Result) -> str:
        """The best steps of a result of checkpoints; "" of others."""
        steps = result.settings.get("best_steps")
        return report.section("Best steps", CHOSEN, report.listed(steps)) if steps else ""


def read_steps(text: str) -> list[int] | None:
    """``40,80`` as numbers in order; None for ``all``."""
    words = [word.strip() for word in text.split(",")]
    if words == [ALL]:
        return None
    if not all(word.isdecimal() and len(word) < 10 for word in words):
        raise UserError(f'--steps is "{text}": write all, or steps with commas, such as 40,80.')
    return sorted(set(map(int, words)))


def of_runs(runs: Sequence[Subject], text: str) -> list[Subject]:
    """Checkpoints of runs as subjects, each with its primary as the run would have exported it.

    Their groups are those of the runs at one step, and "run" and "step" of ``about`` say which.
    The files last as long as this process. ``text`` is that of ``--steps``.
    """
    from bilora_diffusion.export.conversion import export_checkpoint
    from bilora_diffusion.run import checkpoint

    if not runs:
        raise UserError("--steps is given without runs: name run folders.")
    given, several = read_steps(text), len({run.group for run in runs}) > 1
    place = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    made = []
    for run in runs:
        assert run.folder is not None
        kind, digest = ("peft", digests.of_peft) if run.is_text else ("diffusers", digests.of_lora)
        steps = checkpoint.steps(run.folder) if given is None else given
        if not steps:
            raise UserError(f"{run.folder} has no checkpoints: train with --checkpointing_steps.")
        for step in steps:
            output, name = place / str(len(made)), f"step {step}"
            (weights,) = export_checkpoint(run.folder, step, kind, output)
            own = {"weights": weights, "digest": digest(weights)}
            own["label"] = f"{run.label} {name}" if len(runs) > 1 else name
            own["group"] = f"{run.group} {name}" if several else name
            made.append(replace(run, about={"run": run.group, "step": step}, **own))
    return made


def last_group(subjects: Sequence[Entry]) -> str | None:
    """Group of the first run's last step, the usual control; None without checkpoints."""
    first = subjects[0].about.get("run")
    own = [one for one in subjects if first and one.about["run"] == first]
    return max(own, key=lambda one: one.about["step"]).group if own else None


def heldout_loss(subject: Subject) -> list[Row]:
    """A row with the run's held-out loss at the checkpoint's step, if it was measured there."""
    assert subject.folder is not None
    at = subject.about["step"]
    step, value = last_measured(subject.folder, at).get(HELDOUT_LOSS, (None, None))
    return [subject.row(HELDOUT_LOSS, value, seed=None)] if step == at else []


def curves(result: Result, summarize: Summarize) -> Result:
    """The result over steps: groups are runs, values as shown, differences to a run's last step."""
    runs: dict[str, dict[str, int]] = {}  # run -> group -> step
    for one in result.subjects:
        runs.setdefault(one.about["run"], {})[one.group] = one.about["step"]
    lines = []
    for run, steps in runs.items():
        rows = [row for row in result.rows if row.group in steps and row.metric in result.metrics]
        for line in summarize(rows, control=max(steps, key=steps.__getitem__)):
            scale, values = result.metric(line.metric).scale, vars(line)
            shown = {n: None if values[n] is None else scale * values[n] for n in _SHOWN}
            lines.append(replace(line, group=run, step=steps[line.group], **shown))
    if not (measured := {line.metric for line in lines}):
        raise UserError("the runs recorded no held-out figure at these steps: give --benchmarks.")
    names = sorted(result.metrics, key=lambda name: name.endswith("loss"))
    metrics = {n: replace(result.metrics[n], scale=1.0) for n in names if n in measured}
    entries = [Entry(run, run) for run in runs]
    return replace(result, subjects=entries, metrics=metrics, summaries=lines, rows=())


def draw(curves: Result, folder: Path) -> str:
    """Draw a panel for each metric, with the intervals of the means; returns the picture's name."""
    panels = []
    for name, metric in curves.metrics.items():
        title = f"{metric.title}, {'higher' if metric.higher_is_better else 'lower'} is better"
        banded = any(line.interval for line in curves.summaries if line.metric == name)
        lines = [Curve(run, name, label=run, interval=True) for run in curves.groups]
        label, legend = "mean and 95 % interval" if banded else "", len(lines) > 1 and not panels
        panels.append(Panel(title, label, lines, legend=legend))
    rows = [panels[start : start + 3] for start in range(0, len(panels), 3)]
    plot.panels(curves, folder / FIGURE, rows)
    return FIGURE


def best(curves: Result) -> list[str]:
    """One sentence for each run and metric: its best step, and how it differs from the last."""
    sentences = []
    for run in curves.groups:
        for name, metric in curves.metrics.items():
            points = [p for p in curves.over_training(run, name) if p.mean is not None]
            if not points:
                continue
            sign = 1 if metric.higher_is_better else -1
            top = max(points, key=lambda point: sign * (point.mean or 0.0))
            change = "the last"
            if top.control:
                change = f"to the last step {report.difference(top, metric)} {top.over}s better"
            if ends := top.difference_interval:
                change += f": the interval {'in' if ends[0] <= 0 <= ends[1] else 'ex'}cludes zero"
            head = f"{run}: " * (len(curves.groups) > 1) + metric.title
            mean = report.number(top.mean, metric)
            sentences.append(f"{head}: best at step {top.step} ({mean}), {change}.")
    return sentences
