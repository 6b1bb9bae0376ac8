"""The interface of a fine-tuning method: one file, one class, one registration (`registry`).

The loop takes the micro-batches, noise and timesteps of one optimizer step, freezes them in a
`forward_backward` closure, and calls `Method.step(forward_backward, optimizer)`. A method may call
the closure once (LoRA, Bi-LoRA) or several times; each call sees the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import adapters
from ..adapters import INITIAL, PRIMARY, AdapterSpec, fused, inits
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


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes that a method takes beside the models (`Method.memory`).

    Attributes:
        adapters: parameters of each adapter, by its name.
        gradients: gradients of one step.
        optimized: parameters of which the optimizer keeps moments.
        result: parameters that the result consists of.
    """

    adapters: Mapping[str, int]
    gradients: int
    optimized: int
    result: int


class StepOptimizer(Protocol):
    """The optimizer as `Method.step` uses it: `step` clips `clip_parameters()` and then steps."""

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


class Method:
    """A way to fine-tune adapters. The defaults are plain LoRA.

    Attributes:
        options: options of all methods, of which this one reads some (`reads`).
        settings: options that this method alone has, of the type `own_options`.
        rho: the radius given, or the method's default; not that of a radius that sets itself.
        targets: the models given to `setup`.
        layers: ("target.module path", layer) of each adapted layer of all targets, after `setup`.
        weights: `clip_parameters()`, after `bind`. To collect them takes a walk through the models.
        loose_parameters: trained parameters that no module of the models holds. Nobody else
            averages their gradients over processes.
        depends_on_length: whether a step depends on the length of the run
            (`MethodOptions.num_steps`).
        gains_from_decay: whether a rate that falls to zero over twice the best step gives a better
            result than a constant rate up to that step; `--fit` then trains so.
        on_perturbed: called within a step while the primaries hold A + e_A and B + e_B, and their
            `.grad` holds e, where somebody wants to know (`train.dynamics`).
    """

    name: ClassVar[str] = ""  # under which it is registered
    title: ClassVar[str] = ""  # in tables and model cards
    summary: ClassVar[str] = ""  # a sentence or two for model cards
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
    # Options, as words of a command line, with which `--fit` tries it.
    search_options: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options = options or MethodOptions()
        self.settings: Any = self.options.settings
        if self.settings is None and self.own_options is not None:
            self.settings = self.own_options()
        rho = self.options.rho
        # Not used where the radius sets itself (rho "auto").
        self.rho = self.default_rho if rho is None or isinstance(rho, str) else rho
        self.targets: tuple[Target, ...] = ()
        self.layers: list[tuple[str, adapters.LoraLayer]] = []
        self.weights: list[nn.Parameter] = []
        self.loose_parameters: Sequence[nn.Parameter] = ()
        self.depends_on_length = False
        self.gains_from_decay = False
        self.on_perturbed: Callable[[], None] | None = None

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
        # All primaries before any other adapter, for the random values' sake.
        self.inject_adapters()
        for target in self.targets:
            inits.prepare(target.model, target.spec)
            adapters.activate(target.model, self.adapters)
            fused.fuse(target.model)
            for path, layer in adapters.layers(target.model, PRIMARY):
                self.layers.append((f"{target.name}.{path}", layer))
        return self.param_groups(self.targets)

    def inject_adapters(self) -> None:
        """Put the primary on every target; a method with further adapters adds them after it."""
        for target in self.targets:
            if not adapters.adopt(target.model, target.spec, PRIMARY):
                adapters.inject(target.model, target.spec, PRIMARY)

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, for the rates and decays of `targets`."""
        return [
            {
                "params": self.clip_parameters([target]),
                "lr": target.lr,
                "weight_decay": target.weight_decay,
                "name": target.name,
            }
            for target in targets
        ]

    def clip_parameters(self, targets: Sequence[Target] | None = None) -> list[nn.Parameter]:
        """The parameters that the result consists of: what gradient clipping sees and what weight
        averaging averages. The primary's come first, then those of modules that are trained whole
        beside it (`AdapterSpec.modules_to_save`).

        Args:
            targets: whose parameters; None for all.
        """
        parameters: list[nn.Parameter] = []
        for target in self.targets if targets is None else targets:
            parameters += adapters.parameters(target.model, PRIMARY)
            parameters += adapters.head_parameters(target.model, PRIMARY).values()
        return parameters

    def bind(self, optimizer: Optimizer) -> None:
        """See the raw torch optimizer once, before the first step: to check it, read it or put
        hooks on its steps.
        """
        # From here on the parameters are the same objects: the optimizer holds them too.
        self.weights = self.clip_parameters()

    def around_batch(
        self, samples: Sequence[int | None], snr: Sequence[float] = ()
    ) -> AbstractContextManager[None]:
        """A context for the forward and backward pass of a micro-batch.

        Args:
            samples: which sample of the training set each row is; None for one that is no sample.
            snr: signal-to-noise ratio of each row, where the model predicts noise; else ().
        """
        return nullcontext()

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        """Take one optimizer step.

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

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the models for a checkpoint: every trained parameter, and what was taken out
        of the base weights; detached.

        Keys are "target/adapter/module path.lora_A.weight" and so on.
        """
        tensors: dict[str, Tensor] = {}
        for target in self.targets:
            for adapter in (*self.adapters, INITIAL):
                for path, parameter in adapters.named_parameters(target.model, adapter).items():
                    tensors[f"{target.name}/{adapter}/{path}"] = parameter.detach()
        for target in self.targets:
            for path, parameter in adapters.head_parameters(target.model, PRIMARY).items():
                tensors[f"{target.name}/whole/{path}"] = parameter.detach()
        return tensors

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
        """Take back what `state_dict` returned.

        Raises:
            UserError: the state is of another method.
        """
        if state.keys() != self.state_dict().keys():
            raise UserError(
                f"The saved state of the method has the keys {sorted(state)}, but {self.name} keeps"
                f" {sorted(self.state_dict())}; resume with the method of the run's start."
            )

    def memory(self, step_samples: int) -> TrainedBytes:
        """Bytes that the method takes beside the models, after `setup`; weights without memory
        (device "meta") count like others.

        Args:
            step_samples: samples of one optimizer step.
        """
        by_adapter: dict[str, int] = {}
        for adapter in (*self.adapters, INITIAL):
            by_adapter[adapter] = 0
            for target in self.targets:
                parameters = adapters.parameters(target.model, adapter)
                by_adapter[adapter] += sum(parameter.nbytes for parameter in parameters)
        result = sum(parameter.nbytes for parameter in self.clip_parameters())
        return TrainedBytes(by_adapter, gradients=result, optimized=result, result=result)


class CountingMethod(Method):
    """A method whose steps depend on how many were taken; a resume goes on counting."""

    steps_taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.steps_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps_taken = state["taken"]


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside what accelerate or a scheduler may have wrapped around it.

    Raises:
        UserError: there is none that hooks can be put on.
    """
    # accelerate's wrapper is a torch optimizer by its class, but has no hooks of its own.
    while "_optimizer_step_post_hooks" not in getattr(optimizer, "__dict__", {}):
        if not hasattr(optimizer, "optimizer"):
            raise UserError(
                f"bind got a {type(optimizer).__name__}, which is not a torch.optim.Optimizer and "
                "can't be hooked; give the torch optimizer."
            )
        optimizer = cast(Any, optimizer).optimizer
    return optimizer


class HookedMethod(Method):
    """A method that acts on the layers' gradients or factors before each step that is taken.

    Steps that a gradient scaler skips call nothing.
    """

    _hook: RemovableHandle | None = None

    def bind(self, optimizer: Optimizer) -> None:
        """Call `before_step` before every step of `optimizer`.

        Raises:
            UserError: it can't be hooked.
        """
        super().bind(optimizer)
        if self._hook is not None:  # bound before: the latest optimizer holds
            self._hook.remove()
        self._hook = unwrapped(optimizer).register_step_pre_hook(self.before_step)

    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Act before a step of `optimizer`; torch also hands over the step's arguments."""
        raise NotImplementedError


def turn_gradients(
    optimizer: Optimizer, parameters: Callable[[], Sequence[nn.Parameter]]
) -> list[RemovableHandle]:
    """Change the sign of these gradients during each step, and change it back after it.

    For an optimizer that does not know ``maximize`` that is the same, as long as the group has no
    weight decay.

    Raises (from the steps):
        UserError: `step` was given a closure, which is called too late.
    """

    def change_signs(*_: Any) -> None:
        gradients = [p.grad for p in parameters() if p.grad is not None]
        if gradients:
            torch._foreach_neg_(gradients)

    # `step(closure)` computes the gradients after the pre-hooks, so their signs would stay.
    def refuse_closure(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise UserError(
                f"{type(optimizer).__name__} knows no maximize and was given a closure, in which "
                "the auxiliary's gradients can't be turned; call step() without one."
            )

    return [
        optimizer.register_step_pre_hook(refuse_closure),
        optimizer.register_step_pre_hook(change_signs),
        optimizer.register_step_post_hook(change_signs),
    ]
