"""Auxiliaries that belong to samples: sample i sees the auxiliary g(i), which only its own
gradients move.

    min over B1, A1, max over all ||B2g A2g||_F <= rho of mean_i L_i(W0 + B1 A1 + B2g(i) A2g(i))

Each auxiliary is one flat parameter of the optimizer for each trained model, so one whose samples
are not in a step has no gradient, and every optimizer leaves it, its moments and its count alone.
Within `Auxiliaries.seen` those that rows see are put beside the primary for all layers at once, and
autograd takes the gradients apart (`adapters.by_row`); the layers' own parameters are not used.

In a flat parameter lie the A of all layers, then their B^T, layers of one shape side by side: norms
and projections take as many operations for one auxiliary as for those of a whole step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from itertools import groupby, islice, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import adapters
from ...adapters import AUXILIARY, PRIMARY, by_row
from ...core.choices import SAMPLE
from ...core.errors import UserError
from ..options import MethodOptions
from . import ball
from .ablations import PerLayer, Unbounded
from .auxiliary import Auxiliary, Layers, scales

MOST = 512
"""So many auxiliaries are kept for the samples without being asked for by number."""
_Row = tuple[int | None, float]  # the auxiliary that a row sees, and how much of it


def deal(asked: int | str, names: Sequence[str]) -> tuple[int, list[int]]:
    """The number of auxiliaries, and the auxiliary of each sample: dealt in the order of the
    samples' names.

    Args:
        asked: a number, or "sample" for one each.
        names: of the samples; where there are none, sample i sees the auxiliary i % count.

    Raises:
        UserError: there would be more than `MOST`, or nobody knows how many.
    """
    if asked == SAMPLE and len(names) > MOST:
        raise UserError(
            f"auxiliaries {SAMPLE} would keep one for each of {len(names)} samples, each as large "
            f"as the adapter and its optimizer state; give {MOST} or fewer."
        )
    if asked == SAMPLE and not names:
        raise UserError(
            f"auxiliaries {SAMPLE} needs to know how many samples there are; give that number."
        )
    count = len(names) if asked == SAMPLE else min(int(asked), len(names) or int(asked))
    groups = [0] * len(names)
    for place, i in enumerate(sorted(range(len(names)), key=lambda i: (names[i], i))):
        groups[i] = place % count
    return count, groups


class _Flat:
    """The auxiliaries of one trained model.

    Args:
        layers: those that have the adapter.
        measures: what the norm of each one's B A is multiplied with.
        count: how many auxiliaries there are.
    """

    def __init__(self, layers: Layers, measures: Sequence[float], count: int) -> None:
        factors, others = (adapters.factors_of(layers, name) for name in (AUXILIARY, PRIMARY))
        order = sorted(range(len(factors)), key=lambda i: (factors[i].A.shape, factors[i].B.shape))
        self.layers = [layers[i][1] for i in order]
        self.held = [adapters.weights(one, AUXILIARY)[1] for one in self.layers]
        self._primary = [adapters.weights(one, PRIMARY)[i] for i in (0, 1) for one in self.layers]
        # All auxiliaries have one rank and scale. Where all primaries have too, the two products
        # are made as one, with the quotient of their scales in the auxiliary's B.
        rank, scale = len(factors[0].A), factors[0].scale
        kinds = {(len(other.A), other.scale) for other in others}
        beside, shared = ([PRIMARY], others[0].scale) if len(kinds) == 1 else ([], scale)
        self._seen, self._quotient = by_row.Seen(AUXILIARY, beside, rank, shared), scale / shared
        for i, layer in enumerate(cast(list[Any], self.layers)):
            layer.rows = by_row.Rows(self._seen, i, i + len(order), layer.lora_A[AUXILIARY])
        self._squared = torch.tensor([measures[i] for i in order], dtype=torch.float64).square()
        # Layers of one shape lie side by side: their A, (layers, r, n), and B^T, (layers, r, m).
        sides = [factors[i].A for i in order], [factors[i].B.T for i in order]
        shapes = (groupby(weight.shape for weight in side) for side in sides)
        A, B = ([(len([*own]), *shape) for shape, own in side] for side in shapes)
        self._blocks, self._first_up = A + B, len(A)
        self.up = sum(weight.numel() for weight in sides[0])  # where the B^T begin
        first = torch.cat([w.detach().flatten() for side in sides for w in side])
        self.parameters = [nn.Parameter(first.clone()) for _ in range(count)]

    def _blocks_of(self, flat: Tensor) -> list[Tensor]:
        """The A of the layers of each shape, then their B^T, each (..., layers, r, n)."""
        parts = zip(flat.split([*map(math.prod, self._blocks)], -1), self._blocks, strict=True)
        return [part.unflatten(-1, shape) for part, shape in parts]

    def _sides(self, rows: Sequence[_Row], beside: bool, to: torch.dtype) -> list[Tensor]:
        """`by_row.Seen.sides` of these rows."""
        made: list[Tensor] = []
        nothing = next(self.parameters[g].detach() for g, _ in rows if g is not None), 0.0
        with torch.enable_grad():  # whichever of the passes asks first
            own = (nothing if g is None else (self.parameters[g], share) for g, share in rows)
            blocks = zip(*(self._blocks_of(self._part(*one)) for one in own), strict=True)
            primary = iter(self._primary)
            for number, parts in enumerate(blocks):
                if beside:
                    layers = islice(primary, self._blocks[number][0])
                    # A 1 x 1 convolution shares its block with linear layers of its size.
                    first = torch.stack([weight.flatten(1) for weight in layers])
                    first = first if number < self._first_up else first.mT
                    parts = [side for part in parts for side in (first, part)]
                block = torch.cat(parts, 1).unflatten(1, (len(rows), -1))
                made += block.to(to).squeeze(1).unbind()
        return made

    def _part(self, flat: Tensor, share: float) -> Tensor:
        """So much of its B, for products with the scale of what is seen."""
        if (share := share * self._quotient) == 1:
            return flat
        # In contrast to * it keeps no tensor, so that several backward passes can go through it.
        return torch.cat((flat[: self.up], torch.ops.aten.mul.Scalar(flat[self.up :], share)))

    def seen(self, rows: Sequence[_Row]) -> AbstractContextManager[None]:
        """Within the context every input has these rows, or sees the same in all if it is one."""
        if all(group is None for group, _ in rows):
            return self._seen.taken()
        if odd := {type(one).__name__ for one in self.layers if not hasattr(type(one), "rows")}:
            raise UserError(
                f"An auxiliary for each sample can't be added in a {odd.pop()}; leave it out of "
                "the target modules, or have one auxiliary (auxiliaries 1)."
            )
        return self._seen.taken(cache(partial(self._sides, rows)), len(rows))

    def squares(self, groups: Sequence[int]) -> Tensor:
        """`ball.Squares` of these auxiliaries, (4, layers, groups)."""
        parts = list(zip(*(self._blocks_of(self.parameters[g].data) for g in groups), strict=True))
        sides = parts[: self._first_up], parts[self._first_up :]
        A, B = (torch.cat([ball.grams(part) for part in side]) for side in sides)
        n, m = (max(part[0].shape[-1] for part in side) for side in sides)
        squares = ball.of_grams(A, B, n, m, parts[0][0].dtype)
        self._squared = self._squared.to(squares)  # a copy in each step would wait for the device
        return squares * self._squared[:, None]


class Auxiliaries(Auxiliary):
    """The auxiliaries of all trained models, one for each sample or group of samples.

    Args:
        layers: of each model, those that have the adapter; its values are all auxiliaries' first.
        measures: what the norm of each layer's B A is multiplied with, model by model.
        count: how many auxiliaries there are.
        dealt: which of them each sample sees; [] for sample i % count.
        gamma: above this signal-to-noise ratio a row sees the whole; 0 where every row does.
    """

    def __init__(
        self,
        layers: Sequence[Layers],
        measures: Sequence[float],
        count: int,
        dealt: Sequence[int] = (),
        gamma: float = 0.0,
    ) -> None:
        rest = iter(measures)
        self.count, self._dealt, self._gamma = count, dealt, gamma
        self._models = [_Flat(own, [next(rest) for _ in own], count) for own in layers]
        device = self._models[0].held[0].device
        self.norms = torch.zeros(count, dtype=ball.wide(device), device=device)  # when projected

    def parameters(self, model: int | None = None) -> list[nn.Parameter]:
        """The flat parameters, of one of the models or of all."""
        own = self._models if model is None else self._models[model : model + 1]
        return [parameter for flat in own for parameter in flat.parameters]

    def apart(self) -> list[nn.Parameter]:
        return self.parameters()

    def follow(self) -> None:
        device = self._models[0].held[0].device
        self.norms = self.norms.to(device)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    def _groups(self, samples: Sequence[int | None]) -> list[int | None]:
        """The auxiliary of each of these samples."""
        dealt, count = self._dealt, self.count
        return [None if i is None else dealt[i] if dealt else i % count for i in samples]

    def before_step(self, optimizer: Optimizer) -> None:
        """Refuse a step without samples.

        Raises:
            UserError: gradients came from elsewhere than a pass within `seen`.
        """
        if any(weight.grad is not None for flat in self._models for weight in flat.held):
            raise UserError(
                "A backward pass did not say whose samples its rows are, so no auxiliary was moved:"
                ' run it within samples(ids), or give a trainer\'s data set a column "sample_id".'
            )

    def release(self, optimizer: Optimizer) -> None:
        """After a step: forget the gradients."""
        for parameter in self.parameters():
            parameter.grad = None  # as model.zero_grad() would, did the model hold it

    @contextmanager
    def seen(self, samples: Sequence[int | None], snr: Sequence[float] = ()) -> Iterator[None]:
        """Within the context, for a forward and a backward pass, row i of a micro-batch sees the
        auxiliary of `samples[i]`, or none; of `snr[i]` the share sqrt(min(snr, gamma) / gamma).

        Raises:
            UserError: a layer to which rows can't be added; ratios of other rows.
        """
        if snr and len(snr) != len(samples):
            raise UserError(f"snr has {len(snr)} ratios for {len(samples)} samples; give one each.")
        gamma = self._gamma
        shares = [math.sqrt(min(own, gamma) / gamma) if gamma else 1.0 for own in snr]
        rows = [*zip(self._groups(samples), shares or repeat(1.0), strict=False)]
        rows = rows[:1] if len(set(rows)) == 1 else rows
        with ExitStack() as stack:
            for flat in self._models:
                stack.enter_context(flat.seen(rows))
            yield

    def norm(self) -> Tensor:
        return self.norms.amax()

    def seen_norm(self) -> Tensor | None:
        return self.norms[self.moving()].mean()

    def moving(self) -> list[int]:
        """Those that have a gradient: that the step's samples see."""
        own = self._models[0].parameters
        return [g for g, parameter in enumerate(own) if parameter.grad is not None]

    def squares(self, groups: Sequence[int]) -> ball.Squares:
        """Of the norms of these auxiliaries over all layers, each (groups,)."""
        return ball.Squares(*torch.cat([f.squares(groups) for f in self._models], dim=1).sum(1))

    @torch.no_grad()
    def project_(self, groups: Sequence[int], rho: float | Tensor) -> ball.Projection:
        """Equation 10 for each of these auxiliaries; the norms given are the largest among them."""
        before, factor = ball.clipping(self.squares(groups), rho)
        after = before * factor * factor
        for flat in self._models:
            own = [flat.parameters[g].data for g in groups]
            torch._foreach_mul_(own, list(factor.to(own[0]).unbind()))
        self.norms[groups] = after
        return ball.Projection(before.amax(), after.amax(), factor.amin())

    def _slopes(self, groups: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
        for flat in self._models:
            for p in (flat.parameters[g] for g in groups):
                if p.grad is not None:
                    yield p.data[flat.up :], p.grad[flat.up :]

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        own = {
            f"{name}/{AUXILIARY}/{number}": parameter.detach()
            for name, flat in zip(names, self._models, strict=True)
            for number, parameter in enumerate(flat.parameters)
        }
        return own | {f"{AUXILIARY}/norms": self.norms}


def create(layers: Sequence[Layers], options: MethodOptions) -> Auxiliary:
    """The kind that the options ask for, on adapters that are injected already."""
    measures = [scale for own in layers for scale in scales(own, options.rho_norm)]
    count, dealt = deal(options.auxiliaries, options.sample_names)
    if count > 1:
        return Auxiliaries(layers, measures, count, dealt, options.auxiliary_snr_gamma)
    kind = {"global": Auxiliary, "per-layer": PerLayer, "none": Unbounded}[options.ball]
    return kind(layers, measures)
