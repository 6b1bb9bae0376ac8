"""Flatness of the minima that runs end in (the paper's Fig. 3): loss around them, sharpness.

    python -m eval.landscape runs/lora runs/bilora
    python -m eval.landscape runs/sweep/method-*/ --output_dir results/landscape
    python -m eval.landscape base --group "rho 0.05=runs/a,runs/b" --group "rho 1=runs/c,runs/d"
    python -m eval.landscape runs/lora --directions 1 --points 5 --grid 0 --max_images 2 --levels 1

The training loss along filter-normalized random directions and on a plane of two, and the largest
loss within a ball (SAM sharpness); all of them in the space of the LoRA factors and in that of the
model's own weights. Runs of one method and setting that differ in the seed are repeats. What was
measured is cached, so an interrupted command goes on where it stopped.

Writes rows.csv, summary.csv, result.json, report.md, landscape.png and landscape_grid.png.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import option
from bilora_diffusion.core.values import NOISE_LEVELS, check_choice

from ..cache import Cache
from ..command import COUNTS, POSITIVE, open_device
from ..evaluation import Evaluation
from ..results import compare, report
from ..results.compare import mean
from ..results.report import Column
from ..results.table import Metric, Result, Row
from ..subjects import Subject, by_group, gather
from .figures import TITLES, draw

if TYPE_CHECKING:  # imported where it is used, so that --help does not wait for torch
    from .points import Model
    from .surface import Loss, Weight

SPACES = tuple(TITLES)
# Losses at some positions; None where one is not finite.
LossValues = Sequence[float | None]


@dataclass(frozen=True)
class LandscapeOptions:
    """Flags of the command."""

    section = "measurement"
    control: str | None = option(None, "Group to compare with (default: the first).")
    space: str = option("lora,full", "lora, full, or both with a comma.")
    directions: int = option(3, "Random directions of each profile.", range=COUNTS)
    radius: float = option(1.0, "Radius of profiles and plane in the LoRA space.", range=POSITIVE)
    full_radius: float = option(0.3, "The same in the full space.", range=POSITIVE)
    points: int = option(21, "Points of each profile, an odd number.", range=COUNTS)
    grid: int = option(
        11,
        "Points of the axes of the plane of each group's first run, odd; 0 for none.",
        range=COUNTS.or_zero,
    )
    rho: float = option(0.05, "Radius of the SAM sharpness.", range=POSITIVE)
    ascent_steps: int = option(10, "Steps of its gradient ascent.", range=COUNTS)
    max_images: int = option(
        8, "The first so many images of the loss; 0 for all.", range=COUNTS.or_zero
    )
    levels: int = option(
        4, "Noise levels of the loss.", range=replace(COUNTS, maximum=NOISE_LEVELS)
    )
    seed: int = option(0, "Seed of the directions.")
    device: str | None = option(None, "cpu, cuda, cuda:1 (default: a GPU if there is one).")


class Landscape(Evaluation):
    """The loss around the weights of each subject; the item of a row is the space.

    Rows "profile" hold the loss at each of the ``positions`` along each direction, in this order;
    rows "plane" hold it on the plane of the first two directions, row by row, at the
    ``grid_positions``.

    ``settings``: ``spaces``; number of ``directions``; ``positions`` and ``grid_positions`` of each
    space, multiples of a direction; ``rho`` and ``ascent_steps`` of the sharpness; ``images`` and
    ``levels``, over which the loss is a mean; ``seed`` of the directions.
    """

    name = "landscape"
    title = "Flatness"
    options = (LandscapeOptions,)
    runs = 'run folders, or "base" for the model before'
    metrics: ClassVar[Mapping[str, Metric]] = {
        "rise": Metric("rise along random directions"),
        "sharpness": Metric("SAM sharpness"),
        "loss": Metric("loss"),
    }

    def subjects(self) -> Sequence[Subject]:
        from bilora_diffusion.run.console import quiet

        quiet()
        return gather(self.args.runs, self.args.group, weights=True)

    def prepare(self, subjects: Sequence[Subject]) -> None:
        from . import points

        for name, count in (("points", self.args.points), ("grid", self.args.grid or 3)):
            # An odd number, so that the weights themselves are one of the points.
            if count < 3 or count % 2 == 0:
                raise UserError(f"--{name} is {count}: give an odd number from 3 on.")
        # The order on the command line plays no part.
        words = self.args.space.split(",")
        for word in words:
            check_choice("--space", word, SPACES)
        spaces = [space for space in SPACES if space in words]
        self.spaces: dict[str, list[str]] = {}  # label of a subject -> its spaces
        for subject in subjects:
            if points.has_factors(subject):
                self.spaces[subject.label] = spaces
            elif "full" in spaces:
                self.spaces[subject.label] = ["full"]
            else:
                raise UserError(
                    f"{subject.source} has no adapter: take --space full, or leave it out."
                )
        self.control = compare.control(subjects, self.args.control, prefer=None)
        self.device = open_device(self.args.device)
        self.points = points.open_points(subjects)
        if not any(map(points.has_factors, subjects)):  # such as the base model and full runs
            spaces = ["full"]
        self.settings |= self._settings(spaces)
        self.with_plane: set[str] = set()
        if self.args.grid:
            self.with_plane = {runs[0].label for runs in by_group(subjects).values()}
        self.measurement_count = 0
        for label, subject_spaces in self.spaces.items():
            # In each space the loss, the sharpness, the lines and perhaps the plane
            count = 2 + self.args.directions + (label in self.with_plane)
            self.measurement_count += count * len(subject_spaces)

    def _settings(self, spaces: Sequence[str]) -> dict[str, Any]:
        from .surface import coordinates

        args = self.args
        # All points have the same images, see `open_points`.
        image_count = len(next(iter(self.points.values())).images)
        radii = {"lora": args.radius, "full": args.full_radius}
        positions, grid_positions = {}, {}
        for space in spaces:
            positions[space] = coordinates(radii[space], args.points)
            if args.grid:
                grid_positions[space] = coordinates(radii[space], args.grid)
        return {
            "directions": args.directions,
            "rho": args.rho,
            "ascent_steps": args.ascent_steps,
            "levels": args.levels,
            "seed": args.seed,
            "spaces": spaces,
            "positions": positions,
            "grid_positions": grid_positions,
            "images": min(image_count, args.max_images or image_count),
        }

    @cached_property
    def bar(self) -> Any:
        """The progress over all subjects, in measurements."""
        from tqdm import tqdm

        return tqdm(total=self.measurement_count, unit="part")

    def rows(self, subject: Subject) -> Iterator[Row]:
        from . import points

        point = self.points[subject.label]
        spaces = self.spaces[subject.label]
        sample = {"max_images": self.args.max_images, "levels": self.args.levels}
        measurements = Cache(self.folder, [subject.digest, subject.kind, point.loss, sample])

        # One model is in memory at a time, and none if all measurements are cached.
        @cache
        def load_model() -> Model:
            return points.load(point, spaces, device=self.device, **sample)

        self.bar.set_description(subject.label)
        for space in spaces:
            yield from self._space_rows(subject, space, load_model, measurements)

    def _space_rows(
        self, subject: Subject, space: str, load_model: Callable[[], Model], cache: Cache
    ) -> Iterator[Row]:
        """Rows of a subject in one space; cached measurements are not repeated.

        Args:
            load_model: called only if a measurement is not cached.

        Raises:
            UserError: the loss at the weights themselves is not finite.
        """
        from .surface import Direction, evaluate, line, plane, sharpness

        seed = self.settings["seed"]
        rho = self.settings["rho"]
        steps = self.settings["ascent_steps"]
        row = partial(subject.row, item=space)

        def cached_measurement(name: str, *facts: Any, measure: Callable[..., Any]) -> Any:
            """The cached result of ``measure(weights, loss)``, by its name and facts."""

            def measure_model() -> Any:
                model = load_model()
                return measure(model.spaces[space], model.loss.terms)

            value = cache.item([name, space, *facts], measure_model)
            self.bar.update()
            return value

        def at_weights(weights: Sequence[Weight], loss: Loss) -> dict[str, Any]:
            sizes = [weight.tensor.numel() for weight in weights]
            return {"loss": evaluate(loss), "parameters": sum(sizes)}

        start = cached_measurement("start", measure=at_weights)
        if start["loss"] is None:
            raise UserError(f"the loss of {subject.source} is not finite: leave this run out.")
        yield row("loss", start["loss"])
        yield row("parameters", start["parameters"])

        positions = self.settings["positions"][space]
        lines: list[LossValues] = []  # the losses along each direction
        for number in range(self.settings["directions"]):

            def on_line(weights: Sequence[Weight], loss: Loss, number: int = number) -> LossValues:
                return line(weights, loss, Direction(weights, seed, number), positions)

            lines.append(cached_measurement("line", seed, number, positions, measure=on_line))
        yield row("rise", rise(lines))
        ascent = partial(sharpness, rho=rho, steps=steps)
        yield row("sharpness", cached_measurement("sharpness", rho, steps, measure=ascent))
        for number, values in enumerate(lines):
            # A row for each point: the figures need them one by one, in this order.
            for position, value in zip(positions, values, strict=True):
                yield row("profile", value, note=f"direction {number} at {position:.6g}")

        if subject.label not in self.with_plane:
            return
        grid = self.settings["grid_positions"][space]

        def on_plane(weights: Sequence[Weight], loss: Loss) -> Sequence[LossValues]:
            directions = Direction(weights, seed, 0), Direction(weights, seed, 1)
            return plane(weights, loss, directions, grid)

        losses = cached_measurement("plane", seed, grid, measure=on_plane)
        for first, values in zip(grid, losses, strict=True):
            for second, value in zip(grid, values, strict=True):
                yield row("plane", value, note=f"at {first:.6g}, {second:.6g}")

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        self.bar.close()
        compared = [row for row in rows if row.metric in self.metrics]
        summaries = compare.summaries(compared, self.control)
        self.notes += notes(self.settings)
        return self.result(subjects, rows, summaries, self.control)

    def draw_figures(self, result: Result, folder: Path) -> list[str]:
        return draw(result, folder)

    def introduction(self, result: Result) -> str:
        settings = result.settings
        return (
            f"Mean training loss of {settings['images']} images at {settings['levels']}"
            " noise levels each, with the same noise for every run. Lower is flatter. Each value"
            f" is a mean over runs with {report.INTERVALS}, and its difference to"
            f" {report.escape_table_cell(result.control)}, paired by seed, with its interval and"
            " the number of seeds in which it is lower."
        )

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        tables = {}
        for space in result.settings["spaces"]:
            # Runs of different ranks have LoRA spaces of different sizes.
            sizes = {int(row.value or 0) for row in result.select("parameters", item=space)}
            numbers = " or ".join(f"{size:,}" for size in sorted(sizes))
            tables[f"{TITLES[space]}, {numbers} numbers"] = [
                Column("rise", space, difference=True),
                Column("sharpness", space, difference=True),
                Column("loss", space),
            ]
        return tables


def notes(settings: Mapping[str, Any]) -> Iterator[str]:
    """Sentences that explain the tables."""
    radii = []
    for space, positions in settings["positions"].items():
        radii.append(f"{positions[-1]:g} ({space})")
    yield (
        "Directions are filter-normalized (Li et al. 2018): at radius t every filter has moved by"
        " t times its norm. Filters are the rows of A, the columns of B, and the outputs of a"
        " weight. Biases, norms and DoRA's magnitudes are not moved. The directions are the same"
        " for every run."
    )
    yield (
        "The full space is all weight matrices and convolutions of the trained models; the adapter"
        " is on and is not moved."
    )
    yield (
        f"Rise: loss at radius {' and '.join(radii)}, minus the loss at 0, mean over both ends of"
        f" {settings['directions']} directions."
    )
    yield (
        f"SAM sharpness: highest L(w + e) - L(w) with a norm of e up to {settings['rho']:g} over"
        f" all weights of the space together, found by {settings['ascent_steps']} steps of"
        " projected gradient ascent: a lower bound. A and B have the scale of training, W the"
        " model's own."
    )


def rise(lines: Sequence[LossValues]) -> float | None:
    """Mean over directions of the loss at both ends minus that in the middle."""
    rises = []
    for values in lines:
        # The positions run from -radius to radius, with the weights themselves in the middle.
        low, middle, high = values[0], values[len(values) // 2], values[-1]
        if low is None or middle is None or high is None:
            return None
        rises.append((low + high) / 2 - middle)
    return mean(rises)


main = Landscape.main
