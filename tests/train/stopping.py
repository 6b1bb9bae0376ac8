"""The plain reading of a run's held-out losses that stopping and keeping must agree with."""

from collections.abc import Sequence


def reading(
    rows: Sequence[tuple[int, float | None]], patience: int
) -> tuple[int | None, int | None]:
    """The step of the lowest loss up to the end, and the step at which the patience ended."""
    lowest, best, since = float("inf"), None, 0
    for step, loss in rows:
        value = float("inf") if loss is None else loss
        lowest, best, since = (value, step, 0) if value < lowest else (lowest, best, since + 1)
        if since == patience:
            return best, step
    return best, None
