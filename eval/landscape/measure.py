"""Measurements of one subject in one space, each cached before the next is made, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bilora_diffusion.core.errors import UserError

from ..cache import Cache
from ..compare import mean
from ..subjects import Subject
from ..table import Row
from .points import Model
from .surface import Direction, evaluate, line, plane, sharpness

LossValues = Sequence[float | None]
"""Losses at some positions; None where one is not finite."""


@dataclass(frozen=True)
class SpaceLosses:
    """What was measured in one space.

    Attributes:
        loss: at the weights themselves.
        parameters: how many numbers the space has.
        lines: losses along each direction.
        sharpness: SAM's, of the radius in the settings.
        plane: losses on the plane of the first two directions, or None.
    """

    loss: float
    parameters: int
    lines: Sequence[LossValues]
    sharpness: float | None
    plane: Sequence[LossValues] | None


def part_count(settings: Mapping[str, Any], with_plane: bool) -> int:
    """How many measurements `measure_space` makes: loss, lines, sharpness and perhaps the plane."""
    return 2 + settings["directions"] + with_plane


def measure_space(
    subject: Subject,
    space: str,
    load_model: Callable[[], Model],
    cache: Cache,
    settings: Mapping[str, Any],
    with_plane: bool,
    bar: Any,
) -> SpaceLosses:
    """Measure what the cache does not have.

    Args:
        load_model: called for each measurement, so that nothing is loaded where all is cached.
        bar: shows the progress, one step per measurement.

    Raises:
        UserError: the loss at the weights themselves is not finite.
    """
    seed, rho, steps = settings["seed"], settings["rho"], settings["ascent_steps"]
    positions = settings["positions"][space]

    def measured(key: list[Any], measure: Callable[..., Any]) -> Any:
        def compute() -> Any:
            model = load_model()
            return measure(model.spaces[space], model.loss.terms)

        value = cache.item(key, compute)
        bar.update()
        return value

    start = measured(
        ["start", space],
        lambda weights, loss: {
            "loss": evaluate(loss),
            "parameters": sum(weight.tensor.numel() for weight in weights),
        },
    )
    if start["loss"] is None:
        raise UserError(f"the loss of {subject.source} is not finite: leave this run out.")

    lines = []
    for number in range(settings["directions"]):

        def measure_line(weights: Any, loss: Any, number: int = number) -> LossValues:
            return line(weights, loss, Direction(weights, seed, number), positions)

        lines.append(measured(["line", space, seed, number, positions], measure_line))
    ascent = measured(
        ["sharpness", space, rho, steps],
        lambda weights, loss: sharpness(weights, loss, rho, steps),
    )
    plane_losses = None
    if with_plane:
        grid = settings["grid_positions"][space]

        def measure_plane(weights: Any, loss: Any) -> Sequence[LossValues]:
            first, second = Direction(weights, seed, 0), Direction(weights, seed, 1)
            return plane(weights, loss, (first, second), grid)

        plane_losses = measured(["plane", space, seed, grid], measure_plane)
    return SpaceLosses(start["loss"], start["parameters"], lines, ascent, plane_losses)


def rows(
    subject: Subject, space: str, losses: SpaceLosses, settings: Mapping[str, Any]
) -> Iterator[Row]:
    """Rows of one space."""
    row = partial(subject.row, item=space)
    yield row("loss", losses.loss)
    yield row("parameters", losses.parameters)
    yield row("rise", rise(losses.lines))
    yield row("sharpness", losses.sharpness)
    for number, values in enumerate(losses.lines):
        for position, value in zip(settings["positions"][space], values, strict=True):
            yield row("profile", value, note=f"direction {number} at {position:.6g}")
    if losses.plane is None:
        return
    positions = settings["grid_positions"][space]
    for first, values in zip(positions, losses.plane, strict=True):
        for second, value in zip(positions, values, strict=True):
            yield row("plane", value, note=f"at {first:.6g}, {second:.6g}")


def rise(lines: Sequence[LossValues]) -> float | None:
    """Mean over directions of the loss at both ends minus that in the middle."""
    rises = []
    for values in lines:
        low, middle, high = values[0], values[len(values) // 2], values[-1]
        if low is None or middle is None or high is None:
            return None
        rises.append((low + high) / 2 - middle)
    return mean(rises)
