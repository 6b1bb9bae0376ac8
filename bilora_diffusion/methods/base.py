"""What a fine-tuning method is: one file, one class, one registration.

The loop draws the micro-batches, noise and timesteps of one optimizer step, freezes them in a
`forward_backward` closure, and calls `Method.step(forward_backward, optimizer)`. A method may call
the closure once (LoRA, Bi-LoRA) or several times; the same inputs come each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import adapters, fused
from ..adapters import PRIMARY, AdapterSpec
from ..errors import UserError, did_you_mean

RHO_NORMS = ("scaled", "unscaled")


@dataclass(frozen=True)
class Target:
    """One model to train, such as "unet" or "text_encoder", and how."""

    name: str
    model: nn.Module
    spec: AdapterSpec
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class MethodOptions:
    """What the methods can be told; each reads its own part.

    Args:
        rho: radius of the ball that bounds the auxiliary (Eq. 8).
        rho_norm: "scaled" measures s * B2 @ A2, the change of the weights; "unscaled" the literal
            B2 @ A2.
        auxiliary_rank: rank of the auxiliary; None is the primary's.
        auxiliary_alpha: alpha of the auxiliary; None is the primary's.
        auxiliary_learning_rate: learning rate of the auxiliary; None is the primary's.

    Raises:
        UserError: a value outside its range.
    """

    rho: float = 0.05
    rho_norm: str = "scaled"
    auxiliary_rank: int | None = None
    auxiliary_alpha: float | None = None
    auxiliary_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise UserError(f"rho is {self.rho}; use a number above 0, such as 0.05.")
        if self.rho_norm not in RHO_NORMS:
            hint = did_you_mean(self.rho_norm, RHO_NORMS)
            raise UserError(f'rho_norm is "{self.rho_norm}"{hint}; use "scaled" or "unscaled".')
        if self.auxiliary_rank is not None and self.auxiliary_rank < 1:
            raise UserError(
                f"auxiliary_rank is {self.auxiliary_rank}; use a whole number of 1 or more, "
                "or leave it out for the primary's rank."
            )
        if self.auxiliary_alpha is not None and not self.auxiliary_alpha > 0:
            raise UserError(f"auxiliary_alpha is {self.auxiliary_alpha}; use a number above 0.")
        rate = self.auxiliary_learning_rate
        if rate is not None and not rate >= 0:
            raise UserError(f"auxiliary_learning_rate is {rate}; use 0 or more.")


class StepOptimizer(Protocol):
    """What `Method.step` needs of an optimizer: `step` clips `clip_parameters()` and then steps."""

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


class Method:
    """A way to fine-tune adapters; plain LoRA, where a method does not override it.

    Attributes:
        name: the name it is registered under.
        adapters: the adapters it trains, in the order in which they act; what a checkpoint holds.
        targets: the models given to `setup`.
    """

    name: ClassVar[str] = ""
    adapters: ClassVar[tuple[str, ...]] = (PRIMARY,)

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options = options or MethodOptions()
        self.targets: tuple[Target, ...] = ()

    def setup(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """Inject the adapters into every target, activate them, and speed up their forward.

        Random values come from torch's global generator, primaries first, so that two methods
        started from the same seed have equal primaries.

        Returns:
            The optimizer's parameter groups (keys: params, lr, weight_decay, name).

        Raises:
            UserError: a target that the adapters can't be put on.
        """
        self.targets = tuple(targets)
        for target in self.targets:
            if not adapters.adopt(target.model, target.spec, PRIMARY):
                adapters.inject(target.model, target.spec, PRIMARY)
        self.inject_others()
        for target in self.targets:
            adapters.activate(target.model, self.adapters)
            fused.fuse(target.model)
        return self.param_groups(self.targets)

    def inject_others(self) -> None:
        """Inject what a method needs beside the primaries, when all of these are in."""

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, for the rates and decays of `targets`."""
        return [
            {
                "params": adapters.parameters(target.model, PRIMARY),
                "lr": target.lr,
                "weight_decay": target.weight_decay,
                "name": target.name,
            }
            for target in targets
        ]

    def bind(self, optimizer: Optimizer) -> None:
        """See the raw torch optimizer once, before the first step (for hooks on its steps)."""

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        """One optimizer step.

        Args:
            forward_backward: runs all micro-batches of this step; leaves the mean gradient in
                `.grad`; returns the mean loss.
            optimizer: steps and clears the gradients.

        Returns:
            The loss, a 0-d tensor.
        """
        loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def clip_parameters(self) -> list[nn.Parameter]:
        """The parameters that gradient clipping sees."""
        return [p for target in self.targets for p in adapters.parameters(target.model, PRIMARY)]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the context only the primary acts, by PEFT's own forward, as in use."""
        with ExitStack() as stack:
            for target in self.targets:
                stack.enter_context(fused.unfused(target.model))
                stack.enter_context(adapters.only(target.model, (PRIMARY,)))
            yield

    def metrics(self) -> dict[str, float]:
        """Values of the last step for the log. Reads them from the device."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside adapters and optimizer, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            UserError: the state is of another method.
        """
        if state.keys() != self.state_dict().keys():
            raise UserError(
                f"The saved state of the method has the keys {sorted(state)}, but {self.name} "
                f"keeps {sorted(self.state_dict())}; resume with the method that the run was "
                "started with."
            )


_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: M) -> M:
        if name in _METHODS:
            raise ValueError(
                f'A method "{name}" is registered already: {_METHODS[name].__qualname__}.'
            )
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def create(name: str, options: MethodOptions | None = None) -> Method:
    """A new method by name.

    Raises:
        UserError: no such method.
    """
    if name not in _METHODS:
        hint = did_you_mean(name, _METHODS)
        raise UserError(f'method is "{name}"{hint}; use one of {", ".join(names())}.')
    return _METHODS[name](options)


def names() -> tuple[str, ...]:
    """The names of all registered methods, in order of registration."""
    return tuple(_METHODS)
