"""The interface of a fine-tuning method: one file, one class, one registration (`registry`).

The loop draws the micro-batches, noise and timesteps of one optimizer step, freezes them in a
`forward_backward` closure, and calls `Method.step(forward_backward, optimizer)`. A method may call
the closure once (LoRA, Bi-LoRA) or several times; the same inputs come each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import adapters, inits
from ..adapters import INITIAL, PRIMARY, AdapterSpec, fused
from ..core.errors import UserError
from .options import MethodOptions, OwnOptions


@dataclass(frozen=True)
class Target:
    """One model to train, such as "unet" or "text_encoder", and how."""

    name: str
    model: nn.Module
    spec: AdapterSpec
    lr: float
    weight_decay: float = 0.0


class StepOptimizer(Protocol):
    """The optimizer as `Method.step` uses it: `step` clips `clip_parameters()` and then steps."""

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


class Method:
    """A way to fine-tune adapters; plain LoRA, where a method does not override it.

    Attributes:
        targets: the models given to `setup`.
        on_perturbed: called within a step while the primaries hold A + e_A and B + e_B, and their
            `.grad` holds e, where somebody wants to know (`train.dynamics`).
    """

    name: ClassVar[str] = ""  # the one it is registered under
    title: ClassVar[str] = ""  # its name in tables and model cards
    summary: ClassVar[str] = ""  # a sentence or two about it, for model cards
    # The adapters it trains, in the order in which they act; what a checkpoint holds.
    adapters: ClassVar[tuple[str, ...]] = (PRIMARY,)
    # Fields of `MethodFlags` that matter to it; registering it adds those of `own_options`.
    reads: ClassVar[frozenset[str]] = frozenset()
    own_options: ClassVar[type[OwnOptions] | None] = None  # those that it alone has
    default_rho: ClassVar[float] = 0.05  # its radius where `MethodOptions.rho` is None
    default_text_rho: ClassVar[float | None] = None  # that of the text script, if another
    passes: ClassVar[int] = 1  # gradients that a step takes: the "Cost" of the paper's Table 3
    exports_weights: ClassVar[bool] = False  # leaves whole models behind, not adapters
    # Options under which it trains as plain LoRA does, None if there are none.
    limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({})

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options = options or MethodOptions()
        self.targets: tuple[Target, ...] = ()
        self.on_perturbed: Callable[[], None] | None = None

    @property
    def rho(self) -> float:
        """The radius asked for, or the method's own; not for one that sets itself."""
        rho = self.options.rho
        return self.default_rho if rho is None or isinstance(rho, str) else rho

    @property
    def own(self) -> Any:
        """Its own options, of the type `own_options`."""
        return self.options.own or (self.own_options() if self.own_options else None)

    @classmethod
    def usual(cls) -> dict[str, Any]:
        """Options that it reads, with their defaults."""
        groups = (MethodOptions, *([cls.own_options] if cls.own_options else []))
        defaults = {field.name: field.default for group in groups for field in fields(group)}
        return {name: defaults[name] for name in sorted(cls.reads)}

    @property
    def depends_on_length(self) -> bool:
        """True if a step depends on the number of steps (`MethodOptions.num_steps`)."""
        return False

    def layers(self, adapter: str = PRIMARY) -> list[tuple[str, adapters.LoraLayer]]:
        """("target.module path", layer) of each layer of all targets that has the adapter."""
        return [
            (f"{target.name}.{path}", layer)
            for target in self.targets
            for path, layer in adapters.layers(target.model, adapter)
        ]

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
            inits.prepare(target.model, target.spec)
            adapters.activate(target.model, self.adapters)
            fused.fuse(target.model)
        return self.param_groups(self.targets)

    def inject_others(self) -> None:
        """Inject what a method needs beside the primaries, when all of these are in."""

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, for the rates and decays of `targets`."""
        return [
            {
                "params": self.trained(target.model),
                "lr": target.lr,
                "weight_decay": target.weight_decay,
                "name": target.name,
            }
            for target in targets
        ]

    def bind(self, optimizer: Optimizer) -> None:
        """See the raw torch optimizer once, before the first step (for hooks on its steps)."""

    def seen(
        self, samples: Sequence[int | None], snr: Sequence[float] = ()
    ) -> AbstractContextManager[None]:
        """A context for the forward and backward pass of a micro-batch.

        Args:
            samples: which sample of the training set each row is; None for one that is no sample.
            snr: signal-to-noise ratio of each row, where the model predicts noise; else ().
        """
        return nullcontext()

    def apart(self) -> list[nn.Parameter]:
        """The trained parameters that no module holds, whose gradients nobody else averages over
        processes.
        """
        return []

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        """One optimizer step.

        Args:
            forward_backward: runs all micro-batches of this step; leaves the mean gradient in
                `.grad`; returns the mean loss.
            optimizer: steps and clears the gradients.

        Returns:
            The loss, a 0-d tensor.
        """
        with self.moved():
            loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def moved(self) -> AbstractContextManager[None]:
        """A context in which the weights are those that a step's gradient is taken at."""
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the models for a checkpoint: every trained parameter, and what was taken out
        of the base weights; detached.

        Keys are "target/adapter/module path.lora_A.weight" and so on.
        """
        factors = {
            f"{target.name}/{adapter}/{name}": parameter.detach()
            for target in self.targets
            for adapter in (*self.adapters, INITIAL)
            for name, parameter in adapters.named_parameters(target.model, adapter).items()
        }
        heads = {
            f"{target.name}/whole/{name}": parameter.detach()
            for target in self.targets
            for name, parameter in adapters.whole(target.model, PRIMARY).items()
        }
        return factors | heads

    def clip_parameters(self) -> list[nn.Parameter]:
        """The parameters that the result is made of: what gradient clipping sees and what weight
        averaging averages.
        """
        return [p for target in self.targets for p in self.trained(target.model)]

    @staticmethod
    def trained(model: nn.Module) -> list[nn.Parameter]:
        """A model's parameters of the result: the primary's, then those of modules that are trained
        whole beside it (`AdapterSpec.modules_to_save`).
        """
        head = adapters.whole(model, PRIMARY).values()
        return [*adapters.parameters(model, PRIMARY), *head]

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """`clip_parameters()` of the first step, after which they are the same ones for ever: to
        find them is to walk through the whole model.
        """
        return self.clip_parameters()

    @cached_property
    def primary_layers(self) -> list[tuple[str, adapters.LoraLayer]]:
        """`layers()` of the primary; after `setup`."""
        return self.layers()

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
        """State for a resume beside adapters and optimizer, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            UserError: the state is of another method.
        """
        if state.keys() != self.state_dict().keys():
            raise UserError(
                f"The saved state of the method has the keys {sorted(state)}, but {self.name} keeps"
                f" {sorted(self.state_dict())}; resume with the method of the run's start."
            )


class Counting(Method):
    """A method whose steps depend on how many were taken; a resume goes on counting."""

    taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.taken = state["taken"]
