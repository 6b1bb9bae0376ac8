"""An adapter of which each row of a layer's input has factors of its own.

Side by side with the primary's, in one batched product; B is held as rows, (r, m), as in `fused`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

_ROWS = "_by_row"  # under which a layer holds its `Rows`


class Scales:
    """What the rows' products are multiplied with, of all layers.

    Args:
        own: of each row, (rows,).
    """

    def __init__(self, own: Tensor) -> None:
        self._own = own[:, None, None]
        self._made: dict[tuple[float, int, int], Tensor] = {}

    def beside(self, scale: float, primary: int, rank: int) -> Tensor:
        """For a primary of that scale and rank, and then the rows' own: (rows, 1, ranks)."""
        key = (scale, primary, rank)
        if key not in self._made:
            own = self._own.expand(-1, -1, rank)
            first = own.new_full((len(own), 1, primary), scale)
            self._made[key] = torch.cat((first, own), 2)
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
    gradients: list[Tensor] = field(default_factory=list)

    def side_by_side(self, primary: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[A1; A2] and [B1, B2]^T of each row, of a primary's A1 and B1 or of none."""
        ups = [B.transpose(0, 1) for B in primary[1:]]
        pairs = (primary[:1], self.A), (ups, self.up)
        sides = [torch.cat([t for own in each for t in (*first, own)]) for first, each in pairs]
        A, up = (side.unflatten(0, (len(self.A), -1)).to(dtype) for side in sides)
        return A, up

    def add(self, g_A: Tensor, g_up: Tensor) -> None:
        """Take gradients of a backward pass, in the precision of the factors."""
        own = [g.to(self.A[0].dtype) for g in (g_A, g_up)]
        before = self.gradients
        self.gradients = [a + b for a, b in zip(before, own, strict=True)] if before else own

    def gathered(self) -> list[Tensor]:
        """All gradients; zeros where no backward pass was here."""
        each = (self.A, self.up)
        return self.gradients or [torch.zeros_like(torch.stack(tuple(side))) for side in each]


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
            takes_rows = getattr(layer, "takes_rows", False)
            if own and not (takes_rows and getattr(own.along, "groups", 1) == 1):
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


def add_rows(x: Tensor, result: Tensor, rows: Rows) -> Tensor:
    """The layer's output with each row's own product added."""
    along: Any = rows.along
    x = x.to(result.dtype)
    if along.weight.dim() == 2:
        return RowProduct.apply(x, result, None, None, rows, 1.0)  # type: ignore[no-any-return]
    patches = F.unfold(x, along.kernel_size, along.dilation, along.padding, along.stride).mT
    made: Any = RowProduct.apply(patches, result.flatten(2).mT, None, None, rows, 1.0)
    return made.mT.unflatten(2, result.shape[2:])


class RowProduct(torch.autograd.Function):
    """y_i + s x_i A^T B^T + x_i A_i^T B_i^T of `Rows` and perhaps a primary, its scale s; y is
    W x + b, or given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Rows,
        scale: float,
        *primary: Tensor,
    ) -> Tensor:
        A, up = rows.side_by_side(primary, x.dtype)
        own = rows.A[0].shape[0]
        scales = rows.scales.beside(scale, A.shape[1] - own, own)
        x_rows = x.reshape(len(A), -1, x.shape[-1])
        hidden = torch.bmm(x_rows, A.mT).mul_(scales)
        if result is None:
            assert weight is not None
            made = F.linear(x_rows, weight, bias).baddbmm_(hidden, up)
        else:
            made = torch.baddbmm(result.reshape(len(A), -1, result.shape[-1]), hidden, up)
        ctx.save_for_backward(x_rows, weight, A, up, hidden, scales)
        ctx.rows, ctx.rank, ctx.shape = rows, A.shape[1] - own, x.shape
        ctx.dtypes = [factor.dtype for factor in primary]
        return made.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, A, up, hidden, scales = ctx.saved_tensors
        above = gradient.reshape(len(A), -1, gradient.shape[-1])
        below = torch.bmm(above, up.mT).mul_(scales)
        through = None
        if ctx.needs_input_grad[0]:
            straight = None if weight is None else above @ weight
            through = torch.bmm(below, A) if straight is None else straight.baddbmm_(below, A)
            through = through.view(ctx.shape)
        given = gradient if ctx.needs_input_grad[1] else None
        sides, rank = (torch.bmm(below.mT, x), torch.bmm(hidden.mT, above)), ctx.rank
        ctx.rows.add(*(side[:, rank:] for side in sides))
        first: list[Tensor] = []
        if rank:
            g_A, g_up = (s[0, :rank] if len(s) == 1 else s[:, :rank].sum(0) for s in sides)
            of_A, of_B = ctx.dtypes
            g_B = g_up.transpose(0, 1).to(of_B, memory_format=torch.contiguous_format)
            first = [g_A.to(of_A), g_B]
        return through, given, None, None, None, None, *first
