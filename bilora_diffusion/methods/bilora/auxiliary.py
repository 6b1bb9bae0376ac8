"""The auxiliary of the paper: one for all rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import adapters
from ...adapters import AUXILIARY
from ...core.errors import UserError
from .. import perturb
from ..base import Counting, Target
from ..options import MethodOptions
from . import ball

Layers = Sequence[tuple[str, adapters.LoraLayer]]


class Auxiliary:
    """One auxiliary, of which every row sees the same: the adapter that the layers hold.

    Args:
        layers: of each trained model, those that have the adapter.
        measures: what the norm of each layer's B A is multiplied with, model by model.
    """

    count = 1

    def __init__(self, layers: Sequence[Layers], measures: Sequence[float]) -> None:
        self._layers = [list(own) for own in layers]
        self._measures = measures

    def parameters(self, model: int | None = None) -> list[nn.Parameter]:
        """Parameters for the optimizer, of one of the models or of all."""
        return [w for _, layer in self._own(model) for w in adapters.weights(layer, AUXILIARY)]

    def apart(self) -> list[nn.Parameter]:
        """The parameters that no module holds."""
        return []

    def follow(self) -> None:
        """Move to where the models are now; before an optimizer knows the parameters."""

    def seen(
        self, samples: Sequence[int | None], snr: Sequence[float]
    ) -> AbstractContextManager[None]:
        """A context for the forward and backward pass of a micro-batch; see `Method.seen`."""
        return nullcontext()

    def before_step(self, optimizer: Optimizer) -> None:
        """Have everything where the step is taken."""

    def release(self, optimizer: Optimizer) -> None:
        """Let go of what the step alone needed."""

    def moving(self) -> Sequence[int]:
        """The numbers of the auxiliaries that the step moves."""
        return (0,)

    def norm(self) -> Tensor:
        """The total norm over all layers now, 0-d; the largest of several."""
        return ball.frobenius_norm(self.factors())

    def seen_norm(self) -> Tensor | None:
        """The mean norm of those that the step's gradient saw, 0-d, where the last projection does
        not tell it.
        """
        return None

    @torch.no_grad()
    def rise(self, groups: Sequence[int]) -> Tensor:
        """By how much it raises the loss of the step to first order: sum of <g_B, B>, 0-d."""
        return perturb.dot(*zip(*self._slopes(groups), strict=True))

    def _slopes(self, groups: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
        ups = [adapters.weights(layer, AUXILIARY)[1] for _, layer in self._own()]
        return [(ball.whole(B), ball.whole(B.grad)) for B in ups if B.grad is not None]

    def project_(self, groups: Sequence[int], rho: float | Tensor) -> ball.Projection:
        """Equation 10."""
        return ball.project_(self.factors(), rho)

    def factors(self) -> list[adapters.Factors]:
        """A and B of each layer, with what the norm is multiplied with as scale."""
        pairs = zip(adapters.factors_of(self._own(), AUXILIARY), self._measures, strict=True)
        return [factors._replace(scale=measure) for factors, measure in pairs]

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors for a checkpoint beside the layers' parameters."""
        return {}

    def _own(self, model: int | None = None) -> Layers:
        own = self._layers if model is None else self._layers[model : model + 1]
        return [pair for layers in own for pair in layers]


class WithAuxiliary(Counting):
    """A method with auxiliaries beside the primary: what the loop and checkpoints see of them.

    Attributes:
        auxiliary: one for all rows, or one for each sample or group of them; set by
            `inject_others`.
    """

    auxiliary: Auxiliary

    @property
    def _climbs(self) -> bool:
        return self.options.auxiliary_direction == "ascent"

    def seen(
        self, samples: Sequence[int | None], snr: Sequence[float] = ()
    ) -> AbstractContextManager[None]:
        return self.auxiliary.seen(samples, snr)

    def apart(self) -> list[nn.Parameter]:
        return self.auxiliary.apart()

    def check_groups(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that would not move the auxiliary as Eq. 9 does, apart from the
        primary.

        Raises:
            UserError: its groups are not those of `param_groups`.
        """
        auxiliary, primary = (
            {id(p) for p in own} for own in (self.auxiliary.parameters(), self.clip_parameters())
        )
        missing, fix = auxiliary | primary, "make the optimizer from param_groups() as it is."
        for group in optimizer.param_groups:
            ids = {id(p) for p in group["params"]}
            missing -= ids
            ascends, decay = bool(group.get("maximize", False)), group.get("weight_decay", 0)
            alike = ids <= auxiliary and ascends == self._climbs and decay == 0
            if ids & auxiliary and not alike:
                raise UserError(
                    f"The auxiliary's group has maximize={ascends}, weight_decay={decay} and "
                    f"{len(ids - auxiliary)} foreign parameters; {fix}"
                )
            if ids & primary and ascends:
                raise UserError(
                    f"A group with maximize=True holds parameters of the primary; {fix}"
                )
        if missing:
            raise UserError(f"The optimizer lacks {len(missing)} parameters of the adapters; {fix}")

    def auxiliary_norm(self) -> float:
        """The auxiliary's total norm in the units of `rho_norm`; the largest of several."""
        return float(self.auxiliary.norm())

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        if own := self.auxiliary.tensors([target.name for target in self.targets]):
            # The layers' own parameters are not used.
            tensors = {key: t for key, t in tensors.items() if key.split("/")[1] != AUXILIARY}
        return tensors | own


def scales(layers: Layers, rho_norm: str, adapter: str = AUXILIARY) -> list[float]:
    """Factor on the norm of each layer's B A: s, or 1 ("unscaled")."""
    return [1.0 if rho_norm == "unscaled" else float(layer.scaling[adapter]) for _, layer in layers]


def learning_rate(options: MethodOptions, target: Target, first: Target) -> float:
    """eta_2 for a model: the primary's, or what is given, in the ratio of the models' rates.

    Raises:
        UserError: the first model's rate is 0, so there is no ratio.
    """
    rate = options.auxiliary_learning_rate
    if rate is None or target.lr == first.lr:
        return target.lr if rate is None else rate
    if first.lr == 0:
        raise UserError(
            f"The learning rate of {first.name} is 0, so auxiliary_learning_rate {rate} has no "
            f"ratio to keep for {target.name}; leave auxiliary_learning_rate out."
        )
    return rate * target.lr / first.lr
