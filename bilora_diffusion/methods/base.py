"""The interface of a fine-tuning method: one file, one class, one registration (`registry`).

The loop takes the micro-batches, noise and timesteps of one optimizer step, puts them into a
closure `forward_backward`, and calls `Method.step(forward_backward, optimizer)`. A method may call
the closure once (LoRA, Bi-LoRA) or several times; each call sees the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import adapters
from ..adapters import FROZEN, INITIAL, PRIMARY, AdapterSpec, FrozenAdapter, fused, inits
from ..core.errors import UserError
from .options import MethodOptions


@dataclass(frozen=True)
class Target:
    """One model to train, and how."""

    name: str  # such as "unet" or "text_encoder"
    model: nn.Module
    spec: AdapterSpec  # shape of the primary
    lr: float  # of the primary
    weight_decay: float = 0.0
    # Adapters of LoRA files that are added to the trained ones.
    frozen: tuple[FrozenAdapter, ...] = ()
    # First values of the primary (`inits.start_from_file`); None for those of `spec.init`.
    start: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes that a method takes in addition to the models (`Method.memory`).

    Attributes:
        adapters: bytes of each adapter's parameters, frozen ones too, by its name.
        gradients: bytes of the gradients of one step.
        optimized: bytes of the parameters that the optimizer keeps moments of.
        result: bytes of the parameters that the result consists of.
    """

    adapters: Mapping[str, int]
    gradients: int
    optimized: int
    result: int


class StepOptimizer(Protocol):
    """The optimizer that `Method.step` uses; its `step` first clips `result_parameters()`."""

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


class Method:
    """A way to fine-tune adapters. The defaults are plain LoRA.

    Attributes:
        options: options of all methods; this one uses those in `reads`.
        rho: the radius that is given, or the method's default.
        targets: the models given to `setup`.
        layers: ("target.module path", layer) of each adapted layer of all targets, after `setup`.
        weights: `result_parameters()`, after `bind`: to collect them is a walk through the models.
        depends_on_length: whether a step depends on the length of the run
            (`MethodOptions.num_steps`).
        on_perturbed: a function to call within a step while the primaries hold A + e_A and B + e_B,
            and their `.grad` holds e (`train.dynamics` sets it); None to call nothing.
    """

    name: ClassVar[str] = ""  # the name that it is registered under
    title: ClassVar[str] = ""  # its name in tables and model cards
    summary: ClassVar[str] = ""  # a sentence or two for model cards
    # The adapters that it trains, in the order in which they act. A checkpoint has them.
    adapters: ClassVar[tuple[str, ...]] = (PRIMARY,)
    reads: ClassVar[frozenset[str]] = frozenset()  # fields of `MethodFlags` that it uses
    default_rho: ClassVar[float] = 0.05  # its radius where `MethodOptions.rho` is None
    default_text_rho: ClassVar[float | None] = None  # the same for text, if it differs
    passes: ClassVar[int] = 1  # gradients that a step takes: the "Cost" of the paper's Table 3
    exports_weights: ClassVar[bool] = False  # a run exports models, not adapters
    # Options under which it trains as plain LoRA does; None if there are none.
    lora_limit: ClassVar[Mapping[str, Any] | None] = MappingProxyType({})

    def __init__(self, options: MethodOptions | None = None) -> None:
        self.options = options or MethodOptions()
        self.rho = self.default_rho
        if self.options.rho is not None:
            self.rho = self.options.rho
        self.targets: tuple[Target, ...] = ()
        self.layers: list[tuple[str, adapters.LoraLayer]] = []
        self.weights: list[nn.Parameter] = []
        self.depends_on_length = False
        self.on_perturbed: Callable[[], None] | None = None

    @classmethod
    def usual_rho(cls, modality: str) -> float | None:
        """The radius where none is given, for "image" or "text"; None for a method without one."""
        if "rho" not in cls.reads:
            return None
        if modality == "text" and cls.default_text_rho is not None:
            return cls.default_text_rho
        return cls.default_rho

    def setup(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """Inject the adapters into every target, activate them, and fuse their forward.

        Random values come from torch's global generator, those of the primaries first, so that two
        methods have equal primaries after the same seed. A frozen adapter that acts in training
        comes after the trained ones.

        Returns:
            The optimizer's parameter groups (keys: params, lr, weight_decay, name).

        Raises:
            UserError: a target that can't have the adapters.
        """
        self.targets = tuple(targets)
        self.inject_adapters()
        for target in self.targets:
            if target.start is not None:
                inits.start_from_file(target.model, target.start)
            for adapter in target.frozen:
                adapters.inject_frozen(target.model, adapter)
            inits.prepare(target.model, target.spec)
            acting = (*self.adapters, *adapters.assisting(target.model))
            adapters.activate(target.model, acting)
            fused.fuse(target.model)
            for path, layer in adapters.layers(target.model, PRIMARY):
                self.layers.append((f"{target.name}.{path}", layer))
        return self.param_groups(self.targets)

    def inject_adapters(self) -> None:
        """Put the primary on every target.

        A method with further adapters adds them after all primaries, for equal random values.
        """
        for target in self.targets:
            if not adapters.adopt(target.model, target.spec, PRIMARY):
                adapters.inject(target.model, target.spec, PRIMARY)

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with the rates and decays of `targets`."""
        groups: list[dict[str, Any]] = []
        for target in targets:
            groups.append(
                {
                    "params": self.result_parameters([target]),
                    "lr": target.lr,
                    "weight_decay": target.weight_decay,
                    "name": target.name,
                }
            )
        return groups

    def result_parameters(self, targets: Sequence[Target] | None = None) -> list[nn.Parameter]:
        """The parameters that the result consists of, which are clipped.

        Of each target the primary's come first, then those of modules that are trained whole
        with it (`AdapterSpec.modules_to_save`).

        Args:
            targets: models whose parameters are returned; None for all.
        """
        if targets is None:
            targets = self.targets
        parameters: list[nn.Parameter] = []
        for target in targets:
            parameters += adapters.parameters(target.model, PRIMARY)
            parameters += adapters.head_parameters(target.model, PRIMARY).values()
        return parameters

    def bind(self, optimizer: Optimizer) -> None:
        """Receive the torch optimizer, once before the first step.

        A method may check it, read it or put hooks on its steps.
        """
        # From here on the parameters stay the same objects, since the optimizer holds them.
        self.weights = self.result_parameters()

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        """Take one optimizer step.

        Args:
            forward_backward: runs all micro-batches of this step, leaves the mean gradient in
                `.grad`, and returns the mean loss.
            optimizer: steps, and clears the gradients.

        Returns:
            The loss, a 0-d tensor.
        """
        loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Detached tensors of the models for a checkpoint.

        They are every trained parameter, and what an init took out of the base weights. Keys are
        "target/adapter/module path.lora_A.weight" and the like.
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
        """Let only the primary act within the context, by PEFT's own forward, as in an export."""
        with ExitStack() as stack:
            for target in self.targets:
                stack.enter_context(fused.unfused(target.model))
                stack.enter_context(adapters.only(target.model, (PRIMARY,)))
            yield

    def metrics(self) -> dict[str, float]:
        """Values of the last step for the log. Reading them waits for the device."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State for a resume beyond the tensors and the optimizer, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            UserError: the state belongs to another method.
        """
        if state.keys() != self.state_dict().keys():
            raise UserError(
                f"The saved state of the method has the keys {sorted(state)}, but {self.name} keeps"
                f" {sorted(self.state_dict())}; resume with the method of the run's start."
            )

    def memory(self) -> TrainedBytes:
        """Bytes that the method takes in addition to the models, after `setup`.

        Weights on the device "meta", which take no memory, count like others.
        """
        by_adapter: dict[str, int] = {}
        for adapter in (*self.adapters, INITIAL, *FROZEN):
            by_adapter[adapter] = 0
            for target in self.targets:
                parameters = adapters.parameters(target.model, adapter)
                by_adapter[adapter] += sum(parameter.nbytes for parameter in parameters)
        result = sum(parameter.nbytes for parameter in self.result_parameters())
        return TrainedBytes(by_adapter, gradients=result, optimized=result, result=result)


class CountingMethod(Method):
    """A method that counts its steps, also over a resume."""

    steps_taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.steps_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps_taken = state["taken"]


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers, such as accelerate's or a scheduler's.

    Raises:
        UserError: there is none that can have hooks.
    """
    # accelerate's wrapper is a torch optimizer by its class, but without the hooks of one.
    while "_optimizer_step_post_hooks" not in getattr(optimizer, "__dict__", {}):
        if not hasattr(optimizer, "optimizer"):
            raise UserError(
                f"bind got a {type(optimizer).__name__}, which is not a torch.optim.Optimizer and "
                "can't be hooked; give the torch optimizer."
            )
        optimizer = cast(Any, optimizer).optimizer
    return optimizer
