"""One run measured in its spaces, part by part; a part that is kept is not measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bilora_diffusion.errors import UserError

from ..statistics import mean
from . import hessian, profile, sharpness
from .directions import Direction
from .models import Model
from .result import RunResult, Settings, SpaceResult
from .store import Store
from .subjects import Subject
from .weights import Loss, Weight, evaluate

LINE, GRADIENT, PRODUCT = 1, 3, 8
"""What a loss, a gradient and a Hessian-vector product cost, in losses (measured: 1, 2.6, 6-10)."""
EXPECTED_PRODUCTS = 10  # for the progress bar


@dataclass(frozen=True)
class Part:
    """One thing to be measured.

    Args:
        key: what it depends on beside weights and loss; also its key in the store.
        cost: in losses, for the progress bar.
        measure: takes weights, loss and a function to be called after each step.
    """

    key: list[Any]
    cost: int
    unit: int
    measure: Callable[[Sequence[Weight], Loss, Callable[[], None]], Any]


def parts(space: str, settings: Settings, with_grid: bool) -> list[Part]:
    """All parts of one space."""
    seed, positions = settings.seed, settings.positions[space]
    lines = [_line(space, seed, number, positions) for number in range(settings.directions)]
    rest = [_start(space), _sharpness(space, settings)]
    if settings.eigenvalue:
        rest.append(_eigenvalue(space, seed))
    if with_grid and settings.grid_positions:
        rest.append(_plane(space, seed, settings.grid_positions[space]))
    return lines + rest


def _start(space: str) -> Part:
    def measure(weights: Sequence[Weight], loss: Loss, tick: Callable[[], None]) -> Any:
        value = evaluate(loss)
        tick()
        return {"loss": value, "parameters": sum(weight.tensor.numel() for weight in weights)}

    return Part(["start", space], LINE, LINE, measure)


def _line(space: str, seed: int, number: int, positions: Sequence[float]) -> Part:
    def measure(weights: Sequence[Weight], loss: Loss, tick: Callable[[], None]) -> list[float]:
        return profile.line(weights, loss, Direction(weights, seed, number), positions, tick)

    return Part(["line", space, seed, number, list(positions)], len(positions), LINE, measure)


def _plane(space: str, seed: int, positions: Sequence[float]) -> Part:
    def measure(weights: Sequence[Weight], loss: Loss, tick: Callable[[], None]) -> Any:
        both = Direction(weights, seed, 0), Direction(weights, seed, 1)
        return profile.plane(weights, loss, both, positions, tick)

    return Part(["plane", space, seed, list(positions)], len(positions) ** 2, LINE, measure)


def _sharpness(space: str, settings: Settings) -> Part:
    options = {
        "steps": settings.ascent_steps,
        "restarts": settings.restarts,
        "seed": settings.seed,
    }

    def measure(weights: Sequence[Weight], loss: Loss, tick: Callable[[], None]) -> Any:
        return asdict(sharpness.sharpness(weights, loss, settings.rho, tick=tick, **options))

    gradients = (1 + settings.restarts) * (1 + settings.ascent_steps)
    key = ["sharpness", space, settings.rho, options]
    return Part(key, GRADIENT * gradients, GRADIENT, measure)


def _eigenvalue(space: str, seed: int) -> Part:
    def measure(weights: Sequence[Weight], loss: Loss, tick: Callable[[], None]) -> Any:
        return asdict(hessian.top_eigenvalue(weights, loss, seed=seed, tick=tick))

    key = ["eigenvalue", space, seed, hessian.TOLERANCE, hessian.LANCZOS_VECTORS]
    return Part(key, PRODUCT * EXPECTED_PRODUCTS, PRODUCT, measure)


def run(
    subject: Subject,
    settings: Settings,
    store: Store,
    load: Callable[[], Model],
    *,
    with_grid: bool,
    advance: Callable[[int], object],
) -> RunResult:
    """Measure what is not in the store.

    Args:
        subject: the run.
        settings: how.
        store: of these weights.
        load: loads the run; called only if something is missing.
        with_grid: whether the plane is measured too.
        advance: told the cost of what was done.

    Raises:
        UserError: the loss at the run's own weights is not finite.
    """
    cached: list[Model] = []

    def loaded() -> Model:
        if not cached:
            cached.append(load())
        return cached[0]

    spaces, losses = {}, []
    for space in settings.spaces:
        if space == "lora" and not subject.has_factors:
            continue
        found: dict[str, list[Any]] = {}
        for part in parts(space, settings, with_grid):
            key = [*part.key, settings.full_weights if space == "full" else None]
            value = store.get(key)
            if value is None:
                value = store.put(key, _measure(part, loaded().spaces[space], loaded(), advance))
            else:
                advance(part.cost)
            found.setdefault(part.key[0], []).append(value)
        start = found["start"][0]
        if start["loss"] is None:
            raise UserError(f"the loss of {subject.folder} is not finite: leave this run out.")
        losses.append(start["loss"])
        spaces[space] = _space(found)
    return RunResult(
        label=subject.label,
        group=subject.group,
        kind=subject.kind,
        method=subject.method,
        seed=subject.seed,
        source=subject.folder.resolve().name if subject.record else "base",
        digest=subject.digest,
        loss=losses[0],
        spaces=spaces,
    )


def _measure(
    part: Part, weights: Sequence[Weight], model: Model, advance: Callable[[int], object]
) -> Any:
    done = 0

    def tick() -> None:
        nonlocal done
        done += part.unit
        advance(part.unit)

    value = part.measure(weights, model.loss.terms, tick)
    advance(part.cost - done)  # how many steps a part takes is not known before
    return value


def _space(found: dict[str, list[Any]]) -> SpaceResult:
    (start,), profiles, (ascent,) = found["start"], found["line"], found["sharpness"]
    top = found.get("eigenvalue", [{}])[0]
    return SpaceResult(
        parameters=start["parameters"],
        profiles=profiles,
        rise=_rise(profiles),
        sharpness=ascent["value"],
        one_step=ascent["one_step"],
        gradient_norm=ascent["gradient_norm"],
        grid=found.get("plane", [None])[0],
        eigenvalue=top.get("value"),
        eigenvalue_residual=top.get("residual"),
    )


def _rise(profiles: Sequence[Sequence[float | None]]) -> float | None:
    """Mean over directions of the loss at both ends minus that in the middle."""
    rises = []
    for own in profiles:
        low, middle, high = own[0], own[len(own) // 2], own[-1]
        if low is None or middle is None or high is None:
            return None
        rises.append((low + high) / 2 - middle)
    return mean(rises)
