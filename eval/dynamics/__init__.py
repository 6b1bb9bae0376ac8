"""Movement of the adapters while they are trained: Figures 2, A2 and A4 from recorded runs.

    python -m eval.dynamics runs/lora-sam runs/bilora
    python -m eval.dynamics runs/bilora-seed0 runs/bilora-seed1 runs/bilora-10x-seed0 \\
        --output_dir results/dynamics
    python -m eval.dynamics --group "eta_2 = eta_1=runs/a,runs/b" --group "10 eta_1=runs/c,runs/d"

The runs have to be trained with --log_dynamics. Runs of one method and setting that differ in the
seed are repeats; the others are told apart by what differs in their settings.
Writes rows.csv, summary.csv, result.json, report.md and the figures as PNG.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bilora_diffusion import methods
from bilora_diffusion.core.lora_names import AUXILIARY

from .. import report
from ..evaluation import Evaluation, require_common_steps
from ..plot import Panel
from ..report import Column
from ..subjects import Subject, by_group
from ..table import Result, Row

_COMPARED = ("auxiliary_learning_rate", "rho", "rank", "auxiliary_rank", "learning_rate")


class Dynamics(Evaluation):
    """The recorded curves of each run over all layers, cosines to its final weights, and key
    figures of them; of LoRA-SAM also the curves of some layers, which a row's item names.

    ``settings`` has the cosine at which weights count as settled (``level``), and of each group its
    number of ``steps`` and its ``options``: learning rates, ranks and radius.
    """

    name, title = "dynamics", "Training dynamics"

    def prepare(self, subjects: Sequence[Subject]) -> None:
        from . import curves

        groups = by_group(subjects)
        self.small: dict[str, list[str]] = {}
        self.curves: dict[str, dict[str, curves.RunCurves]] = {}
        steps: dict[str, int] = {}
        for group, runs in groups.items():
            sam = runs[0].method == "lora-sam"
            self.small[group] = curves.spread(curves.layer_names(runs[0])) if sam else []
            self.curves |= {run.label: curves.read(run, self.small[group]) for run in runs}
            whole = [self.curves[run.label][curves.ALL] for run in runs]
            require_common_steps(group, [own.recorded for own in whole])
            steps[group] = max(own.steps[-1] for own in whole)
        options = {group: compared_options(runs[0]) for group, runs in groups.items()}
        self.settings |= {"level": curves.LEVEL, "steps": steps, "options": options}
        self._note(groups)

    def rows(self, subject: Subject) -> Iterator[Row]:
        from .curves import ALL, OF_LAYERS

        read = self.curves[subject.label]
        for name, values in read[ALL].values.items():
            for step, value in values.items():
                yield subject.row(name, value, step=step)
        for name, value in read[ALL].figures().items():
            yield subject.row(name, value)
        for layer in self.small[subject.group]:
            for name in OF_LAYERS:
                for step, value in read[layer].values.get(name, {}).items():
                    yield subject.row(name, value, step=step, item=layer)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        from . import curves, figures

        rows += curves.key_figures(rows, self.settings["steps"])
        return replace(super().complete(subjects, rows), metrics=figures.metrics())

    def panels(self, result: Result) -> Mapping[str, Sequence[Sequence[Panel]]]:
        from . import figures

        return figures.panels(result)

    def introduction(self, result: Result) -> str:
        return (
            f"Of all layers as one vector; mean over seeds with {report.INTERVALS}. Cosines are to"
            ' the last recorded weights, which they reach by definition; "settled" is the step from'
            f" which on a cosine stays at {result.settings['level']:g} or above."
        )

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        from . import figures

        return figures.columns(result)

    def _note(self, groups: dict[str, list[Subject]]) -> None:
        for label, runs in groups.items():
            if running := [run.label for run in runs if not run.finished]:
                self.notes.append(
                    f"{label}: not finished ({', '.join(running)}), so the last snapshot stands for"
                    " the final weights."
                )
            if len(runs) == 1:
                self.notes.append(f"{label}: one seed, so there are no bands and no intervals.")
        if any(runs[0].method == "lora-sam" for runs in groups.values()):
            self.notes.append(
                "Terms of Eq. 5 are taken at the perturbation, so before the step's update; a ratio"
                " is left out where e_B e_A is zero (the first step, when B is zero)."
            )


def compared_options(run: Subject) -> dict[str, object]:
    """Learning rates, ranks and radius of a run, as far as its method reads them."""
    method = methods.get(str(run.method))
    names = [n for n in _COMPARED if n in method.reads or n in ("rank", "learning_rate")]
    names += ["rho_norm"] if AUXILIARY in method.adapters else []
    return {name: run.option(name) for name in names}


main = Dynamics.main
