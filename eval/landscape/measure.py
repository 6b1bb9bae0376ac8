"""Measurements of one subject in one space, in parts that are cached one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..compare import mean
from ..subjects import Subject
from ..table import Row
from .sharpness import sharpness
from .weights import Direction, Loss, Weight, evaluate, line, plane


class Measurement(NamedTuple):
    """One thing to be measured."""

    key: list[Any]
    measure: Callable[[Sequence[Weight], Loss], Any]


def parts(space: str, settings: Mapping[str, Any], with_plane: bool) -> Iterator[Measurement]:
    """All parts of one space, first the loss at the weights themselves."""
    seed, positions = settings["seed"], settings["positions"][space]
    rho, steps = settings["rho"], settings["ascent_steps"]

    def along(number: int) -> Callable[[Sequence[Weight], Loss], Any]:
        return lambda w, loss: line(w, loss, Direction(w, seed, number), positions)

    yield Measurement(["start", space], _start)
    for number in range(settings["directions"]):
        yield Measurement(["line", space, seed, number, positions], along(number))
    ascent = ["sharpness", space, rho, steps]
    yield Measurement(ascent, lambda w, loss: sharpness(w, loss, rho, steps))
    if with_plane:
        grid = settings["grid_positions"][space]
        yield Measurement(
            ["plane", space, seed, grid],
            lambda w, loss: plane(w, loss, (Direction(w, seed, 0), Direction(w, seed, 1)), grid),
        )


def _start(weights: Sequence[Weight], loss: Loss) -> Any:
    return {"loss": evaluate(loss), "parameters": sum(w.tensor.numel() for w in weights)}


def rows(
    subject: Subject, space: str, measured: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]
) -> Iterator[Row]:
    """Rows from the parts of one space."""
    row = partial(subject.row, item=space)
    (start,), (ascent,), lines = measured["start"], measured["sharpness"], measured["line"]
    yield row("loss", start["loss"])
    yield row("parameters", start["parameters"])
    yield row("rise", rise(lines))
    yield row("sharpness", ascent)
    for number, losses in enumerate(lines):
        for at, value in zip(settings["positions"][space], losses, strict=True):
            yield row("profile", value, note=f"direction {number} at {at:.6g}")
    for losses in measured.get("plane", ()):
        positions = settings["grid_positions"][space]
        for first, along_second in zip(positions, losses, strict=True):
            for second, value in zip(positions, along_second, strict=True):
                yield row("plane", value, note=f"at {first:.6g}, {second:.6g}")


def rise(lines: Sequence[Sequence[float | None]]) -> float | None:
    """Mean over directions of the loss at both ends minus that in the middle."""
    rises = []
    for losses in lines:
        low, middle, high = losses[0], losses[len(losses) // 2], losses[-1]
        if low is None or middle is None or high is None:
            return None
        rises.append((low + high) / 2 - middle)
    return mean(rises)
