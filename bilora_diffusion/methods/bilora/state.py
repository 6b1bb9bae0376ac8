"""What the loop, the log, checkpoints and `--dry_run` see of Bi-LoRA's auxiliaries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ...adapters import AUXILIARY
from ..base import CountingMethod, TrainedBytes
from . import ball
from .auxiliary import Auxiliary, check_groups
from .radius import AutoRadius


class AuxiliaryMethod(CountingMethod):
    """A method with auxiliaries beside the primary.

    Attributes:
        auxiliary: B2 and A2: one pair for all samples, or one for each sample or group of them;
            set by `inject_adapters`.
        radius: a radius that sets itself (`--rho auto`), else None.
        projection: the last step's projection onto the ball; None before the first.
    """

    auxiliary: Auxiliary
    radius: AutoRadius | None = None
    projection: ball.Projection | None = None

    @property
    def is_ascending(self) -> bool:
        """Whether the auxiliary ascends; it descends in an ablation of Eq. 9."""
        return self.options.auxiliary_direction == "ascent"

    def check_groups(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer whose groups are not those of `param_groups`.

        Raises:
            UserError: it would not move the adapters as Eq. 9 does.
        """
        auxiliary, primary = self.auxiliary.parameters(), self.clip_parameters()
        check_groups(optimizer, auxiliary, primary, self.is_ascending)

    def around_batch(
        self, samples: Sequence[int | None], snr: Sequence[float] = ()
    ) -> AbstractContextManager[None]:
        return self.auxiliary.around_batch(samples, snr)

    def auxiliary_norm(self) -> float:
        """The auxiliary's total norm in the units of `rho_norm`; the largest of several."""
        return float(self.auxiliary.norm())

    def metrics(self) -> dict[str, float]:
        """Norms before and after the last projection (of several the largest), and the radius."""
        if self.projection is None:
            return {}
        metrics = {
            "auxiliary_norm_before": float(self.projection.before),  # c of Eq. 10
            "auxiliary_norm": float(self.projection.after),
        }
        # "rho" and "loss_rise" are logged only where the radius sets itself.
        if self.radius is not None:
            metrics |= self.radius.metrics()
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        loose = self.auxiliary.tensors([target.name for target in self.targets])
        if loose:  # then the layers' own parameters of the auxiliary are not used
            tensors = {key: t for key, t in tensors.items() if key.split("/")[1] != AUXILIARY}
        return tensors | loose

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # The auxiliary itself is among the tensors, and its moments in the optimizer's state.
        if self.radius is not None:
            state |= self.radius.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.radius is not None:
            self.radius.load_state_dict(state)

    def memory(self, step_samples: int) -> TrainedBytes:
        trained = super().memory(step_samples)
        # Auxiliaries by sample do not use the layers' own, so their parameters are counted.
        stored = sum(parameter.nbytes for parameter in self.auxiliary.parameters())
        # At most as many auxiliaries have a gradient in one step as it has samples.
        count = self.auxiliary.count
        with_gradient = stored // count * min(count, step_samples)
        return TrainedBytes(
            {**trained.adapters, AUXILIARY: stored},
            gradients=trained.gradients + with_gradient,
            optimized=trained.optimized + stored,
            result=trained.result,
        )
