"""Movement of the adapters during training: the paper's Figures 2, A2 and A4 from recorded runs.

    python -m eval.dynamics runs/lora-sam runs/bilora
    python -m eval.dynamics runs/bilora-seed0 runs/bilora-seed1 runs/bilora-10x-seed0 \\
        --output_dir results/dynamics
    python -m eval.dynamics --group "equal rates=runs/a,runs/b" --group "10 eta_1=runs/c,runs/d"

The runs must be trained with --log_dynamics. Runs with the same method and settings but different
seeds are repeats; other runs are labeled by the settings that differ.
Writes rows.csv, summary.csv, result.json, report.md and the figures as PNG files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bilora_diffusion import methods
from bilora_diffusion.core.lora_names import AUXILIARY

from ..evaluation import Evaluation, require_common_steps
from ..results import report
from ..results.plot import Panel
from ..results.report import Column
from ..results.table import Result, Row
from ..subjects import Subject, by_group

# Options that the settings of the result contain for each group
COMPARED_OPTIONS = ("auxiliary_learning_rate", "rho", "rank", "auxiliary_rank", "learning_rate")


class Dynamics(Evaluation):
    """The recorded curves of each run, cosines with its final weights, and key figures.

    The curves are over all layers. For LoRA-SAM, some single layers have curves too; the item of
    their rows is the name of the layer.

    ``settings``:

    - ``level``: minimum cosine of settled weights;
    - ``steps``: group -> last recorded step;
    - ``options``: group -> learning rates, ranks and radius of its first run.
    """

    name = "dynamics"
    title = "Training dynamics"

    def prepare(self, subjects: Sequence[Subject]) -> None:
        from . import curves

        groups = by_group(subjects)
        self.layers: dict[str, list[str]] = {}  # group -> layers with separate curves
        self.curves: dict[str, dict[str, curves.RunCurves]] = {}  # run -> layer or "all" -> curves
        steps: dict[str, int] = {}
        options: dict[str, dict[str, object]] = {}
        for group, runs in groups.items():
            self.layers[group] = []
            # Figure A4 shows single layers for LoRA-SAM only.
            if runs[0].method == "lora-sam":
                self.layers[group] = curves.spread(curves.layer_names(runs[0]))
            recorded_steps, last_steps = [], []
            for run in runs:
                self.curves[run.label] = curves.read(run, self.layers[group])
                all_layers = self.curves[run.label][curves.ALL_LAYERS]
                recorded_steps.append(set(all_layers.values["primary/product"]))  # the snapshots'
                last_steps.append(max(map(max, all_layers.values.values())))
            require_common_steps(group, recorded_steps)
            steps[group] = max(last_steps)
            options[group] = compared_options(runs[0])
        self.settings |= {"level": curves.SETTLED_COSINE, "steps": steps, "options": options}
        self._note(groups)

    def rows(self, subject: Subject) -> Iterator[Row]:
        from .curves import ALL_LAYERS, OF_LAYERS

        all_layers = self.curves[subject.label][ALL_LAYERS]
        for name, values in all_layers.values.items():
            for step, value in values.items():
                yield subject.row(name, value, step=step)
        for name, value in all_layers.layer_summary().items():
            yield subject.row(name, value)
        for layer in self.layers[subject.group]:
            layer_curves = self.curves[subject.label][layer]
            for name in OF_LAYERS:
                for step, value in layer_curves.values.get(name, {}).items():
                    yield subject.row(name, value, step=step, item=layer)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        from . import curves, figures

        # Key figures belong to single runs: they become rows, so the summaries average them too.
        rows += curves.summarize_curves(rows, self.settings["steps"])
        return replace(super().complete(subjects, rows), metrics=figures.metrics())

    def panels(self, result: Result) -> Mapping[str, Sequence[Sequence[Panel]]]:
        from . import figures

        return figures.panels(result)

    def introduction(self, result: Result) -> str:
        return (
            f"All layers form one vector. Values are means over seeds with {report.INTERVALS}."
            " Cosines are taken with the last recorded weights, so they end at 1. A cosine has"
            f' "settled" at the step from which it stays at {result.settings["level"]:g} or above.'
        )

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        from . import figures

        return figures.columns(result)

    def _note(self, groups: dict[str, list[Subject]]) -> None:
        for label, runs in groups.items():
            running = [run.label for run in runs if not run.finished]
            if running:
                self.notes.append(
                    f"{label}: not finished ({', '.join(running)}), so the last snapshot is used"
                    " instead of the final weights."
                )
            if len(runs) == 1:
                self.notes.append(f"{label}: one seed, so there are no bands and no intervals.")
        if any(runs[0].method == "lora-sam" for runs in groups.values()):
            self.notes.append(
                "The terms of Eq. 5 are measured at the perturbation, before the step's update. A"
                " ratio is left out if e_B e_A is zero (the first step, when B is zero)."
            )


def compared_options(run: Subject) -> dict[str, object]:
    """Return a run's learning rates, ranks and radius, and the norm that the radius bounds.

    Options that the run's method does not read are left out.
    """
    method = methods.get(str(run.method))
    read_options = {*method.reads, "rank", "learning_rate"}
    names = [name for name in COMPARED_OPTIONS if name in read_options]
    if AUXILIARY in method.adapters:
        names.append("rho_norm")
    return {name: run.option(name) for name in names}


main = Dynamics.main
