"""Target layers of an adapter, and its shape."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.choices import ALL_LINEAR
from ..core.errors import UserError
from .access import is_within

CHANGE_BASE = ("pissa", "lora-ga")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RunOptions(Protocol):
    """The options of a run's configuration that describe its adapters."""

    @property
    def rank(self) -> int: ...

    @property
    def lora_alpha(self) -> float: ...

    @property
    def lora_dropout(self) -> float: ...

    @property
    def init_lora_weights(self) -> str: ...

    @property
    def use_dora(self) -> bool: ...


@dataclass(frozen=True)
class AdapterSpec:
    """The shape of one LoRA adapter: W + (alpha / rank) * B @ A on every target.

    Raises:
        UserError: targets that are no names and no expression.
    """

    rank: int = 4  # inner size r of A (r, n) and B (m, r)
    alpha: float = 8  # numerator of the scale s = alpha / rank
    dropout: float = 0.0  # probability of dropping an input of A, in training mode
    # "default" (A kaiming-uniform, B zero), "gaussian" (A normal with deviation 1 / rank, B zero),
    # or one that `inits/` puts in the place of the default: "pissa", "lora-ga".
    init: str = "default"
    use_dora: bool = False  # learn the magnitude of each output separately
    # "all-linear" (every linear layer but the output head), a regular expression for full module
    # names, or a tuple of names or name endings such as ("to_q", "to_out.0").
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    # Modules that are trained whole beside the adapter and saved with it, such as a classifier's
    # new head; no adapter goes on them.
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def from_options(cls, cfg: RunOptions, **other_fields: Any) -> Self:
        """The shape that a run's configuration asks for, on the targets that the task names."""
        return cls(
            rank=cfg.rank,
            alpha=cfg.lora_alpha,
            dropout=cfg.lora_dropout,
            init=cfg.init_lora_weights,
            use_dora=cfg.use_dora,
            **other_fields,
        )

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise UserError(
                    f"target_modules {self.target_modules!r} is no regular expression ({error}); "
                    'use "all-linear", an expression, or a tuple of names.'
                ) from error
        if not self.target_modules:
            raise UserError(
                'target_modules is empty; use "all-linear" or the names of some layers.'
            )

    @property
    def changes_base(self) -> bool:
        """Test that the init takes the adapter's first values out of the base weights."""
        return self.init in CHANGE_BASE


def target_layers(model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Module]:
    """The layers that `spec.target_modules` names, by module path, in the order of the model.

    Raises:
        UserError: nothing matches, or a match is neither linear nor a plain convolution.
    """
    root = plain_model(model)
    modules = _modules_without_adapter_internals(root)
    if spec.target_modules == ALL_LINEAR:
        # PEFT's own "all-linear" would also take layers that `_unsupported` refuses.
        paths = adaptable(model)
    else:
        config = LoraConfig(target_modules=peft_targets(spec))
        paths = [path for path in modules if check_target_module_exists(config, path)]
    targets: dict[str, nn.Module] = {}
    for path in paths:
        if not is_within(path, spec.modules_to_save):
            targets[path] = modules[path]
    if not targets:
        linear = [key for key, module in modules.items() if _is_linear(module)]
        examples = ", ".join(linear[:5]) or "none"
        raise UserError(
            f"target_modules {spec.target_modules!r} matches no layer of {type(root).__name__}; "
            f"its linear layers are called, for example: {examples}."
        )
    for key, module in targets.items():
        if reason := _unsupported(root, key, module):
            raise UserError(f'The target "{key}" {reason}; take it out of target_modules.')
    return targets


def adaptable(model: nn.Module, convolutions: bool = False) -> list[str]:
    """Paths of the layers that can have an adapter: the linear ones but the output head, as in
    PEFT, or the convolutions.
    """
    root = plain_model(model)
    head = output_head(root)
    paths = []
    for path, module in _modules_without_adapter_internals(root).items():
        is_convolution = isinstance(base_of(module), _CONVOLUTIONS)
        is_wanted = is_convolution if convolutions else _is_linear(module)
        if is_wanted and module is not head and not _unsupported(root, path, module):
            paths.append(path)
    return paths


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, or the model itself."""
    if isinstance(model, PeftModel):
        return cast(nn.Module, model.base_model.model)
    return model


def peft_targets(spec: AdapterSpec) -> str | list[str]:
    """`spec.target_modules` as PEFT wants it."""
    if isinstance(spec.target_modules, str):
        return spec.target_modules
    return list(spec.target_modules)  # PEFT makes a set of a list, not of a tuple


def base_of(layer: Any) -> Any:
    """The layer that an adapter wraps, or the layer itself."""
    if isinstance(layer, LoraLayer):
        return layer.get_base_layer()
    return layer


def _is_linear(module: nn.Module) -> bool:
    return isinstance(base_of(module), nn.Linear | Conv1D)


def _modules_without_adapter_internals(root: nn.Module) -> dict[str, nn.Module]:
    # A LoRA layer stands for the layer that it wraps; its A and B are no targets.
    inside = tuple(
        f"{path}." for path, module in root.named_modules() if isinstance(module, LoraLayer)
    )
    modules: dict[str, nn.Module] = {}
    for path, module in root.named_modules():
        if path and not path.startswith(inside):
            modules[path] = module
    return modules


def output_head(root: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, which "all-linear" leaves out, as in PEFT."""
    getter = getattr(root, "get_output_embeddings", None)
    if not callable(getter):  # of transformers' models only
        return None
    return cast("nn.Module | None", getter())


def _unsupported(root: nn.Module, path: str, module: nn.Module) -> str:
    """Why a layer can't have an adapter, as the end of a sentence; "" where it can."""
    base = base_of(module)
    parent_path, _, _ = path.rpartition(".")
    if isinstance(root.get_submodule(parent_path), nn.MultiheadAttention):
        return "is read by nn.MultiheadAttention as a weight, which would bypass an adapter"
    if isinstance(base, _CONVOLUTIONS):
        # PEFT's A would pad with zeros and have no holes.
        if base.groups != 1 or set(base.dilation) != {1} or base.padding_mode != "zeros":
            return "is a convolution with groups, holes or a padding beside zeros"
        return ""
    if not _is_linear(module):
        return f"is a {type(base).__name__}, no linear layer"
    return ""
