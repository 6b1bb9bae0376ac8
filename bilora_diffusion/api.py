"""Bi-LoRA in your own training loop: attach the adapters, create an optimizer, bind it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from . import adapters
from .adapters import AdapterSpec, inits
from .core.errors import UserError
from .core.fields import check, like, options_of
from .methods.base import MethodOptions, Target
from .methods.bilora.algorithm import BiLoRA as _Method
from .methods.options import AdapterOptions, MethodFlags
from .train.initialisation import collecting


@dataclass(frozen=True)
class BiLoRAConfig:
    """Configuration of the adapters that `attach` adds to a model.

    Args:
        rank: rank of the primary.
        alpha: the primary's scale is alpha / rank.
        auxiliary_rank: rank of the auxiliary; None uses the primary's.
        auxiliary_alpha: alpha of the auxiliary; None uses the primary's.
        rho: radius of the ball that bounds the auxiliary (Eq. 8).
        rho_norm: what the ball bounds: "scaled" is the change of the weights, s * B2 @ A2;
            "unscaled" is B2 @ A2, as in Eq. 10.
        auxiliary_learning_rate: learning rate of the auxiliary; None uses the one given to
            `param_groups`.
        target_modules: "all-linear", a regular expression for module names, or a tuple of names or
            name endings.
        modules_to_save: names of modules whose full weights are trained and saved together with
            the primary, such as ("classifier",) for a classifier's new head.
        dropout: dropout on the primary's input.
        init: initialization of the primary: "default", "gaussian", "pissa", or "lora-ga", which
            needs `BiLoRA.initialise`. The last two change the base weights in memory; saved files
            apply to the original base weights.
        use_dora: whether to use DoRA for the primary.

    Raises:
        UserError: a value is not allowed.
    """

    rank: int = like(AdapterOptions, "rank", default=8)
    alpha: float = like(AdapterOptions, "lora_alpha", default=16)
    auxiliary_rank: int | None = like(MethodFlags, "auxiliary_rank")
    auxiliary_alpha: float | None = like(MethodFlags, "auxiliary_alpha")
    rho: float = like(MethodFlags, "rho", default=_Method.default_rho)
    rho_norm: str = like(MethodFlags, "rho_norm")
    auxiliary_learning_rate: float | None = like(MethodFlags, "auxiliary_learning_rate")
    target_modules: str | tuple[str, ...] = adapters.ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()
    dropout: float = like(AdapterOptions, "lora_dropout")
    init: str = like(AdapterOptions, "init_lora_weights")
    use_dora: bool = like(AdapterOptions, "use_dora")

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, str):
            # The class is frozen. A list is accepted in place of a tuple.
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        check(options_of([type(self)]), vars(self), dashes="")
        self.spec()

    def spec(self) -> AdapterSpec:
        """Return the primary's specification: shape, targets, initialization and saved modules."""
        return AdapterSpec(
            **{field.name: getattr(self, field.name) for field in fields(AdapterSpec)}
        )

    def options(self) -> MethodOptions:
        """Return the options of the method `bilora`."""
        values: dict[str, Any] = {}
        for field in fields(MethodOptions):
            if hasattr(self, field.name):
                values[field.name] = getattr(self, field.name)
        return MethodOptions(**values)


class BiLoRA:
    """A model with a primary and an auxiliary adapter; returned by `attach`."""

    def __init__(self, model: nn.Module, config: BiLoRAConfig) -> None:
        self.model = model
        self.config = config
        self._target = Target("model", model, config.spec(), lr=0.0)
        self._method = _Method(config.options())
        self._method.setup([self._target])
        # PiSSA needs only the weights; LoRA-GA also needs a gradient (`initialise`).
        self._initialised = not config.spec().changes_base
        if not self._initialised and not inits.needs_gradient(config.init):
            self._start(None)

    def initialise(self, forward_backward: Callable[[], object]) -> None:
        """Initialize the primary from the gradient of your loss; for init "lora-ga".

        Call it before `param_groups`.

        Args:
            forward_backward: function that runs the model and `backward()` on some samples of the
                training data, in one pass or several; Wang et al. 2024 use 128 samples. The
                adapters are disabled during the call, and `.grad` is empty afterwards. The result
                does not depend on the scale of the loss.

        Raises:
            UserError: `init` is not "lora-ga", the primary has already been initialized, or there
                is no gradient.
            TrainingError: a gradient or a weight is not finite.
        """
        if not inits.needs_gradient(self.config.init):
            raise UserError(
                f'init "{self.config.init}" needs no gradient; remove the call to initialise.'
            )
        if self._initialised:
            raise UserError("initialise has already been called; attach to a new model instead.")
        with collecting(self.model) as gradients:
            forward_backward()
        self._start(gradients)

    def _start(self, gradients: dict[str, Tensor] | None) -> None:
        inits.compute(self.model, self.config.spec(), gradients)
        adapters.start_from_initial(self.model)
        self._initialised = True

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer (Eq. 9): descent and ascent.

        Args:
            lr: learning rate of the primary and `modules_to_save`, and of the auxiliary unless the
                config sets one.
            weight_decay: weight decay of the primary and `modules_to_save`; the auxiliary has none.

        Raises:
            UserError: `init` is "lora-ga", and `initialise` has not been called.
        """
        if not self._initialised:
            raise UserError(
                f'init "{self.config.init}" needs a gradient; call '
                "initialise(forward_backward) before param_groups."
            )
        return self._method.param_groups([replace(self._target, lr=lr, weight_decay=weight_decay)])

    def bind(self, optimizer: Optimizer) -> None:
        """Make every step of `optimizer` ascend on the auxiliary and project it (Eqs. 9 and 10).

        Raises:
            UserError: `optimizer` is already bound, its groups are not those of `param_groups`, or
                it can't have hooks.
        """
        self._method.bind(optimizer)

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context without the auxiliary, for evaluation without backward passes."""
        return self._method.evaluating()

    def auxiliary_norm(self) -> float:
        """Return the auxiliary's Frobenius norm over all layers, as `rho_norm` defines it."""
        return self._method.auxiliary_norm()

    def clip_parameters(self) -> list[nn.Parameter]:
        """Return the parameters to clip: the primary and `modules_to_save`.

        The auxiliary is not clipped, since the ball bounds it.
        """
        return self._method.result_parameters()

    def primary_state_dict(self) -> dict[str, Tensor]:
        """Return the primary's tensors under PEFT's keys; they apply to the original base weights.

        If `init` changes the base weights, these tensors have twice the rank and need twice the
        alpha (`adapters.portable_state_dict`). They do not include `modules_to_save`.
        """
        return adapters.portable_state_dict(self.model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the primary and `modules_to_save` as an adapter for `PeftModel.from_pretrained`.

        The adapter applies to the original base weights, even if `init` changed them in memory.
        """
        adapters.save_pretrained(self.model, folder)


def attach(model: nn.Module, config: BiLoRAConfig | None = None) -> BiLoRA:
    """Add a primary and an auxiliary adapter to a model, in place.

    Args:
        model: any module with linear layers, such as a Transformers model, a diffusers UNet or a
            plain network. An adapter "default" that the model already has becomes the primary if it
            has the shape that `config` describes.
        config: configuration; None uses the defaults.

    Returns:
        An object with the methods `param_groups`, `bind`, `evaluating` and `save_pretrained`.

    Raises:
        UserError: no layer matches, a layer can't have the adapters or the init, or the model's
            adapter has another shape.
        TrainingError: `init` is "pissa", and a weight is not finite.
    """
    return BiLoRA(model, config or BiLoRAConfig())
