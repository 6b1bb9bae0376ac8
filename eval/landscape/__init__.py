"""Flatness of the minima that runs reach (the paper's Figure 3): loss around them, and sharpness.

    python -m eval.landscape runs/lora runs/bilora
    python -m eval.landscape runs/sweep/method-*/ --output_dir results/landscape
    python -m eval.landscape base --group "rho 0.05=runs/a,runs/b" --group "rho 1=runs/c,runs/d"
    python -m eval.landscape runs/lora --directions 1 --points 5 --grid 0 --max_images 2 --levels 1

Measures the training loss along filter-normalized random directions and on the plane of two of
them, and the largest loss within a ball (SAM sharpness), in the space of the LoRA factors and in
the space of the model's own weights. Runs with the same method and settings but different seeds are
repeats. Measurements are cached, so the same command resumes after an interruption.

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

if TYPE_CHECKING:  # imported inside functions, so that --help does not wait for torch
    from .points import Model
    from .surface import Loss, Weight

SPACES = tuple(TITLES)
# Losses at a list of positions; None for a loss that is not finite
LossValues = Sequence[float | None]


@dataclass(frozen=True)
class LandscapeOptions:
    """Flags of the command."""

    section = "measurement"
    control: str | None = option(
        None, "Group to compare with (default: the first that is not the base model)."
    )
    space: str = option("lora,full", "Space to measure in: lora, full, or both (lora,full).")
    directions: int = option(3, "Number of random directions in each space.", range=COUNTS)
    radius: float = option(
        1.0, "Radius of the profiles and the plane in the LoRA space.", range=POSITIVE
    )
    full_radius: float = option(
        0.3, "Radius of the profiles and the plane in the full space.", range=POSITIVE
    )
    points: int = option(21, "Number of points of each profile; odd, at least 3.", range=COUNTS)
    grid: int = option(
        11,
        "Number of points on each axis of the plane, which is measured for the first run of each"
        " group; odd and at least 3, or 0 for no plane.",
        range=COUNTS.or_zero,
    )
    rho: float = option(0.05, "Radius of the ball of the SAM sharpness.", range=POSITIVE)
    ascent_steps: int = option(
        10, "Number of gradient ascent steps for the sharpness.", range=COUNTS
    )
    max_images: int = option(
        8,
        "Number of training images in the loss, starting with the first; 0 for all.",
        range=COUNTS.or_zero,
    )
    levels: int = option(
        4, "Number of noise levels in the loss.", range=replace(COUNTS, maximum=NOISE_LEVELS)
    )
    seed: int = option(0, "Seed of the random directions.")
    device: str | None = option(
        None, "Device, such as cpu, cuda or cuda:1 (default: a GPU if there is one)."
    )


class Landscape(Evaluation):
    """The loss around the weights of each subject; the item of a row is the space.

    Rows with the metric "profile" contain the losses along each direction, at each of the
    ``positions``, in this order. Rows with the metric "plane" contain the losses on the plane of
    the first two directions, at the ``grid_positions``, row by row.

    ``settings``:

    - ``spaces``: measured spaces;
    - ``directions``: number of directions;
    - ``positions``, ``grid_positions``: positions in each space, as multiples of a direction;
    - ``rho``, ``ascent_steps``: radius and number of ascent steps of the sharpness;
    - ``images``, ``levels``: number of images and of noise levels in the mean loss;
    - ``seed``: seed of the directions.
    """

    name = "landscape"
    title = "Flatness"
    options = (LandscapeOptions,)
    runs = 'run folders, or "base" for the base model'
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
            # An odd number, so that the middle point is the weights themselves.
            if count < 3 or count % 2 == 0:
                raise UserError(f"--{name} is {count}: give an odd number of at least 3.")
        # The order on the command line has no effect.
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
                    f"{subject.source} has no adapter: use --space full, or another subject."
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
            # In each space: the loss, the sharpness, the profiles, and perhaps the plane
            count = 2 + self.args.directions + (label in self.with_plane)
            self.measurement_count += count * len(subject_spaces)

    def _settings(self, spaces: Sequence[str]) -> dict[str, Any]:
        from .surface import coordinates

        args = self.args
        # All points have the same images; see `open_points`.
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
        """Progress bar over the measurements of all subjects."""
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
        """Yield the rows of a subject in one space; cached measurements are not repeated.

        Args:
            subject: the subject.
            space: "lora" or "full".
            load_model: loads the subject's model; called only if a measurement is not cached.
            cache: cache of the subject's measurements.

        Raises:
            UserError: the loss at the subject's weights is not finite.
        """
        from .surface import Direction, evaluate, line, plane, sharpness

        seed = self.settings["seed"]
        rho = self.settings["rho"]
        steps = self.settings["ascent_steps"]
        row = partial(subject.row, item=space)

        def cached_measurement(name: str, *facts: Any, measure: Callable[..., Any]) -> Any:
            """Return the result of ``measure(weights, loss)``, cached under a name and facts."""

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
        lines: list[LossValues] = []  # losses along each direction
        for number in range(self.settings["directions"]):

            def on_line(weights: Sequence[Weight], loss: Loss, number: int = number) -> LossValues:
                return line(weights, loss, Direction(weights, seed, number), positions)

            lines.append(cached_measurement("line", seed, number, positions, measure=on_line))
        yield row("rise", rise(lines))
        ascent = partial(sharpness, rho=rho, steps=steps)
        yield row("sharpness", cached_measurement("sharpness", rho, steps, measure=ascent))
        for number, values in enumerate(lines):
            # A row for each point: the figures rely on this order.
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
            " noise levels each, with the same noise for every run. A lower rise and a lower"
            " sharpness mean a flatter minimum. Each value is a mean over runs, with"
            f" {report.INTERVALS}. Differences from"
            f" {report.escape_table_cell(result.control)} are paired by seed, with an interval and"
            " the number of seeds in which the group is lower."
        )

    def columns(self, result: Result) -> Mapping[str, Sequence[Column]]:
        tables = {}
        for space in result.settings["spaces"]:
            # Runs of different ranks have LoRA spaces of different sizes.
            sizes = {int(row.value or 0) for row in result.select("parameters", item=space)}
            numbers = " or ".join(f"{size:,}" for size in sorted(sizes))
            tables[f"{TITLES[space]}, {numbers} parameters"] = [
                Column("rise", space, difference=True),
                Column("sharpness", space, difference=True),
                Column("loss", space),
            ]
        return tables


def notes(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences that explain the tables."""
    radii = []
    for space, positions in settings["positions"].items():
        radii.append(f"{positions[-1]:g} ({space})")
    yield (
        "Directions are filter-normalized (Li et al. 2018): at radius t, every filter has moved by"
        " t times its norm. Filters are the rows of A, the columns of B, and the weights of each"
        " output of a layer. Biases, normalization layers and DoRA's magnitudes are not moved. The"
        " directions come from the same random numbers for every run."
    )
    yield (
        "The full space consists of all weight matrices and convolutions of the trained models; the"
        " adapter is active and is not moved."
    )
    yield (
        f"Rise: loss at radius {' and '.join(radii)} minus the loss at 0, as the mean over both"
        f" ends of {settings['directions']} directions."
    )
    yield (
        f"SAM sharpness: largest L(w + e) - L(w) for a perturbation e with a norm of at most"
        f" {settings['rho']:g} over all weights of the space. It is found by"
        f" {settings['ascent_steps']} steps of projected gradient ascent, so it is a lower bound."
        " A and B are scaled as in training, and W as in the model."
    )


def rise(lines: Sequence[LossValues]) -> float | None:
    """Return the mean rise of the loss from the middle to both ends, over all directions.

    The result is None if a loss is not finite.
    """
    rises = []
    for values in lines:
        # The positions run from -radius to radius, with the weights themselves in the middle.
        low, middle, high = values[0], values[len(values) // 2], values[-1]
        if low is None or middle is None or high is None:
            return None
        rises.append((low + high) / 2 - middle)
    return mean(rises)


main = Landscape.main
