"""An adapter of which each row of a layer's input has factors of its own, B's as rows, (r, m)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UserError

Sides = Callable[[bool, torch.dtype], list[Tensor]]


class Seen:
    """What the layers of a model take in place of an adapter that acts for all rows.

    Args:
        adapter: in whose place.
        beside: adapters whose product can be one with these.
        rank, scale: of these.

    Attributes:
        now: whether they take it now.
        sides: in a precision all layers' A (R, n) and B^T (R, m), or (rows, R, n) and (rows, R, m),
            with their graph: alone, or below those that are `beside`. None: no row has any.
        count: how many rows have factors; of one alone, all rows have them.
    """

    def __init__(self, adapter: str, beside: list[str], rank: int, scale: float) -> None:
        self.adapter, self.beside, self.rank, self.scale = adapter, beside, rank, scale
        self.now, self.count, self.sides = False, 1, cast(Sides | None, None)

    @contextmanager
    def taken(self, sides: Sides | None = None, count: int = 1) -> Iterator[None]:
        """Within the context the layers take these."""
        self.now, self.sides, self.count = True, sides, count
        try:
            yield
        finally:
            self.now, self.sides = False, None


class Rows(NamedTuple):
    """A layer's part in what is seen.

    Attributes:
        A, up: the places of its A and its B^T among the sides.
        along: A's own module, which says how a convolution moves.
    """

    seen: Seen
    A: int
    up: int
    along: nn.Module

    def sides(self, beside: bool, to: torch.dtype) -> tuple[Tensor, Tensor]:
        """Its own A and B^T."""
        sides = cast(Sides, self.seen.sides)(beside, to)
        return sides[self.A], sides[self.up]


def rows_of(layer: Any, x: Tensor) -> tuple[Rows | None, str | None]:
    """What a layer adds by row now, if anything, and the adapter in whose place.

    Raises:
        UserError: its input has not a row for each sample.
    """
    rows: Rows | None = layer.rows
    if rows is None or not rows.seen.now:
        return None, None
    seen = rows.seen
    if seen.sides and seen.count not in (1, len(x)):
        raise UserError(
            f"A layer with an auxiliary for each sample got {len(x)} rows for {seen.count} "
            "samples, so whose they are can't be told; give the samples one by one "
            "(train_batch_size 1)."
        )
    return rows if seen.sides else None, seen.adapter


def add_convolutions(x: Tensor, result: Tensor, rows: Rows) -> Tensor:
    """A convolution's output with each row's own product added; rows become groups of channels."""
    along, seen = cast(Any, rows.along), rows.seen
    A, up = rows.sides(False, x.dtype)
    count, shape = seen.count, along.weight.shape[1:]
    x, down = x.reshape(-1, count * shape[0], *x.shape[2:]), A.reshape(-1, *shape)
    hidden = F.conv2d(x, down, None, along.stride, along.padding, groups=count)
    B = (up * seen.scale).mT.reshape(-1, seen.rank, 1, 1)
    return result + F.conv2d(hidden, B, groups=count).reshape(result.shape)
