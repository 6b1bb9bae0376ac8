"""How flat the minima are that runs end in (the paper's Fig. 3): loss around them, sharpness.

    python -m eval.landscape runs/lora runs/bilora
    python -m eval.landscape runs/sweep/method-*/ --eigenvalue --output_dir results/landscape
    python -m eval.landscape base --group "rho 0.05=runs/a,runs/b" --group "rho 1=runs/c,runs/d"
    python -m eval.landscape runs/lora --directions 1 --points 5 --grid 0 --max_images 2 --levels 1

Loss along filter-normalized random directions and on a plane of two, the largest loss within a ball
(SAM sharpness) and, with --eigenvalue, the largest eigenvalue of the Hessian; all of them in the
space of the LoRA factors and in that of the model's own weights. Runs of one method and setting
that differ in the seed are repeats. What was measured is kept, so an interrupted command goes on
where it stopped.

Writes rows.csv, summary.csv, result.json, report.md, landscape.png and landscape_grid.png.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from bilora_diffusion.choices import NOISE_LEVELS
from bilora_diffusion.errors import UserError

from ..command import Parser, open_device
from ..evaluation import Evaluation
from ..kept import Kept
from ..subjects import Subject, by_group, gather
from ..table import Metric, Result, Row
from . import findings

SPACES = ("lora", "full")


def _only(kind: Any, rule: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """What argparse reads a word by; the rule is said of a word that does not fit it."""

    def read(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan  # which fits no rule
        if not fits(value):
            raise ArgumentTypeError(f'"{word}" is not {rule}')
        return value

    return read


def _one_of(*words: str) -> Callable[[str], str]:
    return _only(str, " or ".join(words), words.__contains__)


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    rule = f"a whole number from {least} " + ("on" if most == math.inf else f"to {most}")
    return _only(int, rule, lambda value: least <= value <= most)


_ODD = _only(int, "an odd number from 3 on", lambda value: value >= 3 and value % 2 == 1)
_ODD_OR_NONE = _only(
    int,
    "an odd number from 3 on, or 0 for no plane",
    lambda value: value == 0 or (value >= 3 and value % 2 == 1),
)
_SPACES = _only(
    lambda word: word.split(","),
    "lora, full, or both with a comma",
    lambda spaces: set(spaces) <= set(SPACES),
)
_DISTANCE = _only(float, "a number above 0", lambda value: 0 < value < math.inf)


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

    name = "landscape"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "rise": Metric("rise along random directions"),
        "sharpness": Metric("SAM sharpness"),
        "eigenvalue": Metric("top Hessian eigenvalue"),
        "loss": Metric("loss"),
    }

    @classmethod
    def arguments(cls, parser: Parser) -> None:
        add = parser.add_argument
        parser.add_runs('run folders, or "base" for the model before')
        add("--control", help="the group to compare with; default: the first")
        add("--space", type=_SPACES, default="lora,full", help="lora, full, or both with a comma")
        add(
            "--full_weights",
            default="all",
            type=_one_of("all", "adapted"),
            help="all weights of the trained models, or those that adapters sit on",
        )
        add("--directions", type=_whole(1), default=3, help="random directions of each profile")
        add("--radius", type=_DISTANCE, default=1.0, help="of profiles and plane, LoRA space")
        add("--full_radius", type=_DISTANCE, default=0.3, help="the same in the full space")
        add("--points", type=_ODD, default=21, help="of each profile, odd")
        add("--grid", type=_ODD_OR_NONE, default=11, help="of the plane's axes, odd; 0 for none")
        add(
            "--grid_runs",
            type=_whole(0),
            default=1,
            help="runs of each group whose planes are averaged; 0 for all",
        )
        add("--rho", type=_DISTANCE, default=0.05, help="radius of the SAM sharpness")
        add("--ascent_steps", type=_whole(1), default=10, help="steps of its gradient ascent")
        add("--restarts", type=_whole(0), default=0, help="further ascents from random points")
        add("--eigenvalue", action="store_true", help="also the top eigenvalue of the Hessian")
        split = "images of the loss: train or heldout"
        add("--split", type=_one_of("train", "heldout"), default="train", help=split)
        add("--max_images", type=_whole(0), default=8, help="the first so many of them; 0: all")
        add(
            "--levels",
            type=_whole(1, NOISE_LEVELS),
            default=4,
            help=f"noise levels of the loss, 1 to {NOISE_LEVELS}",
        )
        add("--seed", type=int, default=0, help="of directions and starts")
        add("--device", default="auto", help="cpu, cuda, or auto")
        parser.add_output(cls.name)

    def subjects(self) -> Sequence[Subject]:
        from bilora_diffusion.run.console import quiet

        quiet()
        return gather(self.args.runs, self.args.group, weights=True)

    def prepare(self, subjects: Sequence[Subject]) -> None:
        from .. import compare
        from . import measure, runs

        spaces = [space for space in SPACES if space in self.args.space]
        for subject in subjects:
            if "full" not in spaces and not runs.has_factors(subject):
                raise UserError(
                    f"{subject.source} has no adapter: take --space full, or leave it out."
                )
        self.control = compare.control(subjects, self.args.control, prefer=None)
        self.device = open_device(None if self.args.device == "auto" else self.args.device)
        self.points = runs.points(subjects, self.args.split)
        if not any(map(runs.has_factors, subjects)):
            spaces = ["full"]
        self.settings |= self._settings(spaces)
        count = self.args.grid_runs or len(subjects) if self.args.grid else 0
        with_plane = [one.label for own in by_group(subjects).values() for one in own[:count]]
        self.parts = {
            one.label: {
                space: list(measure.parts(space, self.settings, one.label in with_plane))
                for space in spaces
                if space == "full" or runs.has_factors(one)
            }
            for one in subjects
        }

    def _settings(self, spaces: Sequence[str]) -> dict[str, Any]:
        from .profile import coordinates

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
        """The progress over all subjects, in losses."""
        from tqdm import tqdm

        spaces = [parts for own in self.parts.values() for parts in own.values()]
        total = sum(part.unit * part.steps for parts in spaces for part in parts)
        return tqdm(total=total, unit="loss", smoothing=0.05)

    def rows(self, subject: Subject) -> Iterator[Row]:
        from . import measure, models

        given, point, parts = self.args, self.points[subject.label], self.parts[subject.label]
        sample = {"max_images": given.max_images, "levels": given.levels}
        about = [subject.digest, subject.kind, point.loss, given.split, sample]
        kept = Kept(self.folder, about)
        model = cache(  # one model is in memory at a time, and none where all is kept
            lambda: models.load(
                point, list(parts), given.full_weights, device=self.device, **sample
            )
        )
        self.bar.set_description(subject.label)
        for space, own in parts.items():
            measured: dict[str, list[Any]] = {}
            for part in own:
                value = measure.take(part, kept, model, self.bar.update)
                measured.setdefault(part.key[0], []).append(value)
            if measured["start"][0]["loss"] is None:
                raise UserError(f"the loss of {subject.source} is not finite: leave this run out.")
            yield from measure.rows(subject, space, measured, self.settings)

    def complete(self, subjects: Sequence[Subject], rows: list[Row]) -> Result:
        from .. import compare

        self.bar.close()
        summed = [row for row in rows if row.metric in self.metrics]
        lines = compare.summaries(summed, self.control)
        return self.result(subjects, rows, lines, self.control)

    def figures(self, result: Result, folder: Path) -> list[str]:
        from . import figures

        return figures.draw(result, folder)

    def report(self, result: Result) -> str:
        return findings.report(result)


main = Landscape.main
