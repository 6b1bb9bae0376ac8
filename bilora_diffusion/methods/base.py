"""The interface of fine-tuning methods. Each method is a class that is registered in `registry`.

For each optimizer step, the loop puts the micro-batches, noise and timesteps into a closure
`forward_backward` and calls `Method.step(forward_backward, optimizer)`. A method may call the
closure once (LoRA, Bi-LoRA) or several times; each call uses the same inputs.
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
    """One model to train, with its training settings."""

    name: str  # such as "unet" or "text_encoder"
    model: nn.Module
    spec: AdapterSpec  # shape of the primary
    lr: float  # learning rate of the primary
    weight_decay: float = 0.0
    # Frozen adapters from LoRA files, which are used with the trained ones.
    frozen: tuple[FrozenAdapter, ...] = ()
    # Initial values of the primary (`inits.start_from_file`); None for those of `spec.init`.
    start: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class TrainedBytes:
    """Memory that a method needs in addition to the models, in bytes (`Method.memory`).

    Attributes:
        adapters: size of each adapter's parameters by adapter name, including frozen adapters.
        gradients: size of one step's gradients.
        optimized: size of the parameters that the optimizer stores moments for.
        result: size of the parameters that the run exports.
    """

    adapters: Mapping[str, int]
    gradients: int
    optimized: int
    result: int


class StepOptimizer(Protocol):
    """The optimizer of `Method.step`; it clips the gradients of `result_parameters()` first."""

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


class Method:
    """A fine-tuning method. The defaults implement plain LoRA.

    Attributes:
        options: options of all methods; this method uses those in `reads`.
        rho: the given radius, or the method's default.
        targets: models that were passed to `setup`.
        layers: ("target.module path", layer) for each adapted layer of all targets, after `setup`.
        weights: `result_parameters()`, stored by `bind`, since collecting them takes time.
        depends_on_length: whether a step depends on the length of the run
            (`MethodOptions.num_steps`).
        on_perturbed: function that is called within a step while the primaries hold A + e_A and
            B + e_B and their `.grad` holds e (`train.dynamics` sets it); None if nothing is called.
    """

    name: ClassVar[str] = ""  # name under which the method is registered
    title: ClassVar[str] = ""  # name in tables and model cards
    summary: ClassVar[str] = ""  # one or two sentences for model cards
    # Adapters that the method trains, in the order in which they are active. Checkpoints have them.
    adapters: ClassVar[tuple[str, ...]] = (PRIMARY,)
    reads: ClassVar[frozenset[str]] = frozenset()  # fields of `MethodFlags` that the method uses
    default_rho: ClassVar[float] = 0.05  # radius if `MethodOptions.rho` is None
    default_text_rho: ClassVar[float | None] = None  # the same for text; None if it is equal
    passes: ClassVar[int] = 1  # gradients per step, called "Cost" in the paper's Table 3
    exports_weights: ClassVar[bool] = False  # whether runs export models instead of adapters
    # Options with which the method trains like plain LoRA; None if there are none.
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
        """Return the default radius for "image" or "text"; None for a method without a radius."""
        if "rho" not in cls.reads:
            return None
        if modality == "text" and cls.default_text_rho is not None:
            return cls.default_text_rho
        return cls.default_rho

    def setup(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """Inject the adapters into every target, activate them, and fuse their forward.

        Random values come from torch's global generator, the primaries' first, so all methods have
        equal primaries after the same seed. A frozen adapter that is active in training comes after
        the trained adapters.

        Returns:
            The optimizer's parameter groups (keys: params, lr, weight_decay, name).

        Raises:
            UserError: a target can't have the adapters, or a LoRA file does not match them.
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
        """Inject the primary into every target.

        A method with further adapters injects them after all primaries, so that the primaries get
        the same random values in all methods.
        """
        for target in self.targets:
            if not adapters.adopt(target.model, target.spec, PRIMARY):
                adapters.inject(target.model, target.spec, PRIMARY)

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups, with each target's rate and weight decay."""
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
        """Return the parameters that a run exports, whose gradients are clipped.

        For each target, the primary's parameters come first, then those of the modules that are
        trained in full with it (`AdapterSpec.modules_to_save`).

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
        """Connect the method to the torch optimizer, before the first step.

        A method may check the optimizer, read it, or add hooks to its steps.
        """
        # From now on the parameters stay the same objects, since the optimizer refers to them.
        self.weights = self.result_parameters()

    def step(self, forward_backward: Callable[[], Tensor], optimizer: StepOptimizer) -> Tensor:
        """Take one optimizer step.

        Args:
            forward_backward: closure that runs all micro-batches of this step, leaves the mean
                gradient in `.grad`, and returns the mean loss.
            optimizer: optimizer that takes the step and clears the gradients.

        Returns:
            The loss, a 0-d tensor.
        """
        loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Return detached tensors of the models for a checkpoint.

        These are all trained parameters, and the factors that an init subtracted from the base
        weights. Keys have the form "target/adapter/module path.lora_A.weight", and
        "target/whole/parameter path" for modules that are trained in full.
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
        """Use only the primary, with PEFT's own forward, within the context.

        This is how an exported file is used.
        """
        with ExitStack() as stack:
            for target in self.targets:
                stack.enter_context(fused.unfused(target.model))
                stack.enter_context(adapters.only(target.model, (PRIMARY,)))
            yield

    def metrics(self) -> dict[str, float]:
        """Return values of the last step for the log. Reading them waits for the device."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resume needs besides tensors and optimizer, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            UserError: the state has other keys, so it belongs to another method.
        """
        if state.keys() != self.state_dict().keys():
            raise UserError(
                f"The method's saved state has the keys {sorted(state)}, but {self.name} needs"
                f" {sorted(self.state_dict())}; resume with the method that started the run."
            )

    def memory(self) -> TrainedBytes:
        """Return the memory that the method needs in addition to the models, after `setup`.

        Weights on the "meta" device, which take no memory, are counted like others.
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
    """A method that counts its steps, including those before a resume."""

    steps_taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.steps_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps_taken = state["taken"]


def unwrap(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers such as accelerate's or a scheduler's.

    Raises:
        UserError: there is no torch optimizer inside, so hooks are not possible.
    """
    # accelerate's wrapper is a subclass of torch's optimizer but lacks its hooks.
    while "_optimizer_step_post_hooks" not in getattr(optimizer, "__dict__", {}):
        if not hasattr(optimizer, "optimizer"):
            raise UserError(
                f"bind got a {type(optimizer).__name__}, which is not a torch.optim.Optimizer and "
                "can't have hooks; pass the torch optimizer."
            )
        optimizer = cast(Any, optimizer).optimizer
    return optimizer
