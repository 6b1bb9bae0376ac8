"""An adapter of which each row of a layer's input has factors of its own.

B is held as rows, (r, m), as in `fused`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

_ROWS = "_by_row"  # under which a layer holds its `Rows`


class Scales:
    """What the rows' products are multiplied with, of all layers.

    Args:
        each: of each row, (rows,).
    """

    def __init__(self, each: Tensor) -> None:
        self.each = each
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def beside(self, scales: tuple[float, ...], ranks: tuple[int, ...]) -> Tensor:
        """Behind those of adapters that act for all rows: (rows, 1, sum of `ranks`), of which the
        last is the rows' own.
        """
        key = (scales, ranks)
        if key not in self._made:
            own = self.each[:, None, None]
            each = [*(torch.full_like(own, scale) for scale in scales), own]
            parts = [one.expand(-1, -1, rank) for one, rank in zip(each, ranks, strict=True)]
            self._made[key] = torch.cat(parts, 2)
        return self._made[key]


@dataclass(slots=True)
class Rows:
    """An adapter of which each row of a layer's input has factors of its own.

    Attributes:
        A: of each row (r, n), n of a convolution that of its patches; of one alone, all rows'.
        up: B^T of each, (r, m).
        scales: of the products.
        along: A's own module, which says how a convolution moves.
        gradients: of A and up, (rows, r, n) and (rows, r, m), once a backward pass was here.
    """

    A: Sequence[Tensor]
    up: Sequence[Tensor]
    scales: Scales
    along: nn.Module
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def side_by_side(
        self, shared: Sequence[Tensor], scales: tuple[float, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[A1; A2] and [B1, B2]^T of each row, of the A1, B1, ... of adapters of all rows, and what
        the product of each rank is multiplied with; of one row alone without a dimension for rows.
        """
        count, ups = len(self.A), [B.transpose(0, 1) for B in shared[1::2]]
        pairs = (shared[::2], self.A), (ups, self.up)
        A, up = (
            torch.cat([t for own in each for t in (*first, own)]).to(dtype) for first, each in pairs
        )
        by = self.scales.beside(scales, tuple([len(one) for one in (*shared[::2], self.A[0])]))
        if count == 1:
            return A, up, by[0]
        return A.unflatten(0, (count, -1)), up.unflatten(0, (count, -1)), by

    def take(self, g_A: Tensor, g_up: Tensor) -> list[Tensor]:
        """Take the rows' own of the gradients of what `side_by_side` gave, in the precision of the
        factors, and give the rest, summed over the rows.
        """
        dtype, rank, rest = self.A[0].dtype, g_A.shape[-2] - len(self.A[0]), []
        for side, gradient in (("A", g_A.to(dtype)), ("up", g_up.to(dtype))):
            self.add(side, gradient[..., rank:, :])
            shared = gradient[..., :rank, :]
            rest.append(shared if shared.dim() == 2 else shared.sum(0))
        return rest

    def add(self, side: str, gradient: Tensor) -> None:
        """Take a backward pass's gradient of a side."""
        before = self.gradients.get(side)
        self.gradients[side] = gradient if before is None else before + gradient

    def gathered(self, side: str) -> Tensor:
        """A side's gradient of all rows, (rows, numbers); zeros where no backward pass was here."""
        made, own = self.gradients.get(side), getattr(self, side)
        made = own[0].new_zeros(len(own), own[0].numel()) if made is None else made
        return made.reshape(len(own), -1)


@contextmanager
def acting(rows: Mapping[Any, Rows | None], adapter: str) -> Iterator[None]:
    """Within the context these layers take `Rows`, or nothing, in place of an adapter that acts for
    all rows.

    Raises:
        UserError: a layer computes in a way to which rows can't be added.
    """
    before: dict[Any, list[str]] = {layer: layer.active_adapters for layer in rows}
    try:
        for layer, own in rows.items():
            if own is not None and not getattr(layer, "takes_rows", False):
                raise UserError(
                    f"An auxiliary for each sample can't be added in a {type(layer).__name__}; "
                    "leave it out of the target modules, or have one auxiliary (auxiliaries 1)."
                )
            layer.__dict__["_active_adapter"] = [n for n in before[layer] if n != adapter]
            layer.__dict__[_ROWS] = own
        yield
    finally:
        for layer, active in before.items():
            layer.__dict__["_active_adapter"] = active
            layer.__dict__.pop(_ROWS, None)


def rows_of(layer: nn.Module, x: Tensor) -> Rows | None:
    """Rows that a layer adds within `acting`; None outside of it.

    Raises:
        UserError: its input has not a row for each sample.
    """
    rows: Rows | None = layer.__dict__.get(_ROWS)
    if rows is not None and len(rows.A) not in (1, len(x)):
        raise UserError(
            f"A layer with an auxiliary for each sample got {len(x)} rows for {len(rows.A)} "
            "samples, so whose they are can't be told; give the samples one by one "
            "(train_batch_size 1)."
        )
    return rows


def add_convolutions(x: Tensor, result: Tensor, rows: Rows) -> Tensor:
    """A convolution's output with each row's own product added; rows become groups of channels."""
    along: Any = rows.along
    A, up = (torch.stack(tuple(side)).requires_grad_() for side in (rows.A, rows.up))
    A.register_hook(partial(rows.add, "A"))
    up.register_hook(partial(rows.add, "up"))
    count, shape = len(A), along.weight.shape[1:]
    x, down = x.reshape(-1, count * shape[0], *x.shape[2:]), A.reshape(-1, *shape).to(x.dtype)
    hidden = F.conv2d(x, down, None, along.stride, along.padding, groups=count)
    B = (up * rows.scales.each[:, None, None]).mT.reshape(-1, up.shape[1], 1, 1)
    return result + F.conv2d(hidden, B.to(x.dtype), groups=count).reshape(result.shape)
