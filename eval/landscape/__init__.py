"""Flatness of the minima that runs end in (the paper's Fig. 3): loss around them, sharpness.

    python -m eval.landscape runs/lora runs/bilora
    python -m eval.landscape runs/sweep/method-*/ --eigenvalue --output_dir results/landscape
    python -m eval.landscape base --group "rho 0.05=runs/a,runs/b" --group "rho 1=runs/c,runs/d"
    python -m eval.landscape runs/lora --directions 1 --points 5 --grid 0 --max_images 2 --levels 1

Loss along filter-normalized random directions and on a plane of two, the largest loss within a ball
(SAM sharpness) and, with --eigenvalue, the largest eigenvalue of the Hessian; all of them in the
space of the LoRA factors and in that of the model's own weights. Runs of one method and setting
that differ in the seed are repeats. What was measured is cached, so an interrupted command goes on
where it stopped.

Writes rows.csv, summary.csv, result.json, report.md, landscape.png and landscape_grid.png.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from bilora_diffusion.choices import NOISE_LEVELS
from bilora_diffusion.errors import UserError
from bilora_diffusion.fields import option
from bilora_diffusion.values import check_choice

from .. import report
from ..cache import Cache
from ..command import COUNTS, POSITIVE, open_device
from ..evaluation import Evaluation
from ..report import Column
from ..subjects import Subject, by_group, gather
from ..table import Metric, Result, Row

TITLES = {"lora": "LoRA space (A and B)", "full": "full space (weights without the adapters)"}
SPACES = tuple(TITLES)


@dataclass(frozen=True)
class LandscapeOptions:
    """Flags of the command."""

    section = "measurement"
    control: str | None = option(None, "Group to compare with (default: the first).")
    space: str = option("lora,full", "lora, full, or both with a comma.")
    full_weights: str = option(
        "all",
        "All weights of the trained models, or those that adapters sit on.",
        choices=("all", "adapted"),
    )
    directions: int = option(3, "Random directions of each profile.", range=COUNTS)
    radius: float = option(1.0, "Radius of profiles and plane in the LoRA space.", range=POSITIVE)
    full_radius: float = option(0.3, "The same in the full space.", range=POSITIVE)
    points: int = option(21, "Points of each profile, an odd number.", range=COUNTS)
    grid: int = option(11, "Points of the plane's axes, odd; 0 for none.", range=COUNTS.or_zero)
    grid_runs: int = option(
        1, "Runs of each group whose planes are averaged; 0 for all.", range=COUNTS.or_zero
    )
    rho: float = option(0.05, "Radius of the SAM sharpness.", range=POSITIVE)
    ascent_steps: int = option(10, "Steps of its gradient ascent.", range=COUNTS)
    restarts: int = option(0, "Further ascents from random points.", range=COUNTS.or_zero)
    eigenvalue: bool = option(False, "Also the top eigenvalue of the Hessian.")
    split: str = option("train", "Images of the loss.", choices=("train", "heldout"))
    max_images: int = option(8, "The first so many of them; 0 for all.", range=COUNTS.or_zero)
    levels: int = option(4, "Noise levels of the loss.", range=replace(COUNTS, most=NOISE_LEVELS))
    seed: int = option(0, "Seed of directions and starts.")
    device: str = option("auto", "cpu, cuda, or auto.")


class Landscape(Evaluation):
    """The loss around the weights of each subject; the item of a row is the space.

    Rows "profile" hold the loss along each direction at each of the ``positions``, in this order;
    rows "plane" that on the plane of the first two directions, line by line of ``grid_positions``.

    ``settings``: ``spaces``; ``full_weights`` ("all" or "adapted"); number of ``directions``;
    ``positions`` and ``grid_positions`` of each space, multiples of a direction; ``rho``,
    ``ascent_steps`` and ``restarts`` of the sharpness; ``eigenvalue``, whether it was asked for;
    ``split``, ``images`` and ``levels``, which the loss is a mean over; ``seed`` of directions and
    starts.
    """

    name, title, options = "landscape", "Flatness", (LandscapeOptions,)
    runs = 'run folders, or "base" for the model before'
    metrics: ClassVar[Mapping[str, Metric]] = {
        "rise": Metric("rise along random directions"),
        "sharpness": Metric("SAM sharpness"),
        "eigenvalue": Metric("top Hessian eigenvalue"),
        "loss": Metric("loss"),
    }

    def subjects(self) -> Sequence[Subject]:
        from bilora_diffusion.run.console import quiet

        quiet()
        return gather(self.args.runs, self.args.group, weights=True)

    def prepare(self, subjects: Sequence[Subject]) -> None:
        from .. import compare
        from . import measure, models

        for name, value in (("points", self.args.points), ("grid", self.args.grid or 3)):
            if value < 3 or value % 2 == 0:
                raise UserError(f"--{name} is {value}: give an odd number from 3 on.")
        for word in self.args.space.split(","):
            check_choice("--space", word, SPACES)
        spaces = [space for space in SPACES if space in self.args.space.split(",")]
        for subject in subjects:
            if "full" not in spaces and not models.has_factors(subject):
                raise UserError(
                    f"{subject.source} has no adapter: take --space full, or leave it out."
                )
        self.control = compare.control(subjects, self.args.control, prefer=None)
        self.device = open_device(None if self.args.device == "auto" else self.args.device)
        self.points = models.points(subjects, self.args.split)
        if not any(map(models.has_factors, subjects)):
            spaces = ["full"]
        self.settings |= self._settings(spaces)
        count = self.args.grid_runs or len(subjects) if self.args.grid else 0
        with_plane = [one.label for own in by_group(subjects).values() for one in own[:count]]
        self.parts = {
            one.label: {
                space: list(measure.parts(space, self.settings, one.label in with_plane))
                for space in spaces
                if space == "full" or models.has_factors(one)
            }
            for one in subjects
        }

    def _settings(self, spaces: Sequence[str]) -> dict[str, Any]:
        from .weights import coordinates

        given, count = self.args, len(next(iter(self.points.values())).images)
        radii = {"lora": given.radius, "full": given.full_radius}
        grid = spaces if given.grid else ()
        names = ("full_weights", "directions", "rho", "ascent_steps", "restarts", "eigenvalue")
        return {name: getattr(given, name) for name in (*names, "split", "levels", "seed")} | {
            "spaces": spaces,
            "positions": {space: coordinates(radii[space], given.points) for space in spaces},
            "grid_positions": {space: coordinates(radii[space], given.grid) for space in grid},
            "images": min(count, given.max_images or count),
        }

    @cached_property
    def bar(self) -> Any:
        """The progress over all subjects, in parts."""
        from tqdm import tqdm

        spaces = [parts for own in self.parts.values() for parts in own.values()]
        return tqdm(total=sum(map(len, spaces)), unit="part")

    def rows(self, subject: Subject) -> Iterator[Row]:
        from . import measure, models

        given, point, parts = self.args, self.points[subject.label], self.parts[subject.label]
        sample = {"max_images": given.max_images, "levels": given.levels}
        about = [subject.digest, subject.kind, point.loss, given.split, sample]
        cached = Cache(self.folder, about)
        model = cache(  # one model is in memory at a time, and none where all is cached
            lambda: models.load(
                point, list(parts), given.full_weights, device=self.device, **sample
            )
        )
        self.bar.set_description(subject.label)
        for space, own in parts.items():
            measured: dict[str, list[Any]] = {}
            for key, measure_it in own:

                def make(space: str = space, measure_it: Any = measure_it) -> Any:
                    return measure_it(model().spaces[space], model().loss.terms)

                measured.setdefault(key[0], []).append(cached.item(key, make))
                self.bar.update()
            if measured["start"][0]["loss"] is None:
                raise UserError(f"the loss of {subject.source} is not finite: leave this run out.")
            yield from measure.rows(subject, space, measured, self.settings)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        from .. import compare

        self.bar.close()
        summed = [row for row in rows if row.metric in self.metrics]
        lines = compare.summaries(summed, self.control)
        self.notes += notes(self.settings)
        return self.result(subjects, rows, lines, self.control)

    def figures(self, result: Result, folder: Path) -> list[str]:
        from . import figures

        return figures.draw(result, folder)

    def introduction(self, result: Result) -> str:
        settings = result.settings
        return (
            f"Mean {grounds(result)} loss of {settings['images']} images at {settings['levels']}"
            " noise levels each, with the same noise for every run. Lower is flatter. Each figure"
            f" is a mean over runs with {report.INTERVALS}, and its difference to"
            f" {report.escaped(result.control)}, paired by seed, with its interval and the number"
            " of seeds in which it is lower."
        )

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        names = ["rise", "sharpness", *["eigenvalue"] * result.settings["eigenvalue"]]
        tables = {}
        for space in result.settings["spaces"]:
            sizes = {int(row.value or 0) for row in result.select("parameters", item=space)}
            numbers = " or ".join(f"{size:,}" for size in sorted(sizes))
            compared = [Column(name, space, difference=True) for name in names]
            tables[f"{TITLES[space]}, {numbers} numbers"] = [*compared, Column("loss", space)]
        return tables


def grounds(result: Result) -> str:
    """Name of the loss."""
    return "training" if result.settings["split"] == "train" else "held-out"


def notes(settings: Mapping[str, Any]) -> Iterator[str]:
    """Sentences that explain the tables."""
    radii = [f"{own[-1]:g} ({space})" for space, own in settings["positions"].items()]
    yield (
        "Directions are filter-normalized (Li et al. 2018): at radius t every filter has moved by"
        " t times its norm. Filters are the rows of A, the columns of B, and the outputs of a"
        " weight. Biases, norms and DoRA's magnitudes stay where they are. Every run is looked at"
        " along the same directions."
    )
    full = {
        "all": "all weight matrices and convolutions of the trained models",
        "adapted": "the weights that the adapters sit on",
    }[settings["full_weights"]]
    yield f"The full space is {full}; the adapter acts and is not moved."
    yield (
        f"Rise: loss at radius {' and '.join(radii)}, minus the loss at 0, mean over both ends of"
        f" {settings['directions']} directions."
    )
    yield (
        f"SAM sharpness: highest L(w + e) - L(w) with a norm of e up to {settings['rho']:g} over"
        f" all weights of the space together, found by {settings['ascent_steps']} steps of"
        f" projected gradient ascent ({settings['restarts']} restarts): a lower bound. A and B have"
        " the scale of training, W the model's own."
    )
    if settings["eigenvalue"]:
        yield (
            "Top eigenvalue: the algebraically largest of the Hessian, by Lanczos to a relative"
            " accuracy of 1 %; n/a where it did not converge."
        )


main = Landscape.main
