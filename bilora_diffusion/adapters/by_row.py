"""An adapter of which each row of a layer's input has factors of its own.

B is held as rows, (r, m), as in `fused`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

_ROWS = "_by_row"  # under which a layer holds its `Rows`


@dataclass(slots=True)
class Rows:
    """An adapter of which each row of a layer's input has factors of its own.

    Attributes:
        A: of each row (r, n), n of a convolution that of its patches; of one alone, all rows'.
        up: B^T of each, (r, m).
        g_A, g_up: what backward passes add their gradients to, (rows, r, n) and (rows, r, m).
        scale: of the products.
        along: A's own module, which says how a convolution moves.
    """

    A: Sequence[Tensor]
    up: Sequence[Tensor]
    g_A: Tensor
    g_up: Tensor
    scale: float
    along: nn.Module


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
    A.register_hook(rows.g_A.add_)
    up.register_hook(rows.g_up.add_)
    count, shape = len(A), along.weight.shape[1:]
    x, down = x.reshape(-1, count * shape[0], *x.shape[2:]), A.reshape(-1, *shape).to(x.dtype)
    hidden = F.conv2d(x, down, None, along.stride, along.padding, groups=count)
    B = (up * rows.scale).mT.reshape(-1, up.shape[1], 1, 1)
    return result + F.conv2d(hidden, B.to(x.dtype), groups=count).reshape(result.shape)
