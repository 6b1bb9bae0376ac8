"""An adapter of which each row of a layer's input has factors of its own, as one batched product.

B is held as rows, (r, m), as in `fused`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

_ROWS = "_by_row"  # under which a layer holds its `Rows`


class Rows(NamedTuple):
    """An adapter of which each row of a layer's input has factors of its own.

    Attributes:
        A: (rows, r, n); n of a convolution is that of its patches.
        up: B^T times the adapter's scale, (rows, r, m).
        g_A, g_up: to which a backward pass adds their gradients; fast on a CPU if contiguous.
        along: A's own module, which says how a convolution moves.
    """

    A: Tensor
    up: Tensor
    g_A: Tensor
    g_up: Tensor
    along: nn.Module


@contextmanager
def acting(rows: Mapping[Any, Rows], adapter: str) -> Iterator[None]:
    """Within the context these layers take `Rows` in place of an adapter that acts for all rows.

    Raises:
        UserError: a layer computes in a way to which rows can't be added.
    """
    before: dict[Any, list[str]] = {layer: layer.active_adapters for layer in rows}
    try:
        for layer, own in rows.items():
            if not getattr(layer, "takes_rows", False) or getattr(own.along, "groups", 1) != 1:
                raise UserError(
                    f"Samples of several auxiliaries in one micro-batch can't pass through a "
                    f"{type(layer).__name__}; give them one by one (train_batch_size 1)."
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
    if rows is not None and len(x) != len(rows.A):
        raise UserError(
            f"A layer with an auxiliary for each sample got {len(x)} rows for {len(rows.A)} "
            "samples, so whose they are can't be told; give the samples one by one "
            "(train_batch_size 1)."
        )
    return rows


def add_rows(x: Tensor, result: Tensor, rows: Rows) -> Tensor:
    """The layer's output with each row's own product added."""
    along: Any = rows.along
    if along.weight.dim() == 2:
        made: Any = _RowProduct.apply(x, result, rows)
        return made
    patches = F.unfold(x, along.kernel_size, along.dilation, along.padding, along.stride).mT
    made = _RowProduct.apply(patches, result.flatten(2).mT, rows)
    return made.mT.unflatten(2, result.shape[2:])


class _RowProduct(torch.autograd.Function):
    """y_i + x_i A_i^T B_i^T of `Rows`; x (rows, ..., n) and y (rows, ..., m)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rows: Rows) -> Tensor:
        x, made = x.to(y.dtype), y.clone(memory_format=torch.contiguous_format)
        ctx.rows = rows
        ctx.save_for_backward(x, *add_(made, x, rows))
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *each = ctx.saved_tensors
        through = torch.zeros_like(x, memory_format=torch.contiguous_format)
        add_gradients_(ctx.rows, x, gradient, through, *each)
        return through, gradient, None


def add_(made: Tensor, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Add the rows' product to y in place; what its backward pass needs."""
    A, up = rows.A.to(x.dtype), rows.up.to(x.dtype)
    hidden = torch.bmm(_by_row(x, A), A.mT)
    made.view(len(A), -1, made.shape[-1]).baddbmm_(hidden, up)
    return A, up, hidden


def add_gradients_(
    rows: Rows, x: Tensor, above: Tensor, through: Tensor | None, *saved: Tensor
) -> None:
    """Add to the gradients of the rows' factors, and to that of x."""
    A, up, hidden = saved
    above = _by_row(above, A)
    below = torch.bmm(above, up.mT)
    if through is not None:
        through.view(len(A), -1, through.shape[-1]).baddbmm_(below, A)
    for kept, left, right in (
        (rows.g_A, below, _by_row(x, A)),
        (rows.g_up, hidden, above),
    ):
        if kept.dtype == left.dtype:
            kept.baddbmm_(left.mT, right)
        else:
            kept.add_(torch.bmm(left.mT, right))


def _by_row(values: Tensor, A: Tensor) -> Tensor:
    """(rows, tokens, features)."""
    return values.reshape(len(A), -1, values.shape[-1])
