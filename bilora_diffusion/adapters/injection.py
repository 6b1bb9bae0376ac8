"""The shape of an adapter, its target layers, and putting it on a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import UserError
from ..core.lora_names import PRIMARY
from ..core.values import ALL_LINEAR
from .access import activate, active, head_parameters, is_within, layers, names
from .saving import PEFT_PREFIX

# Inits that take the adapter's first values out of the base weights (`inits`).
CHANGE_BASE = ("pissa", "lora-ga")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class AdapterSpec:
    """The shape of one LoRA adapter: W + (alpha / rank) * B @ A on every target.

    Attributes:
        rank: inner size r of A (r, n) and B (m, r).
        alpha: numerator of the scale s = alpha / rank.
        dropout: probability of dropping an input of A, in training mode.
        init: "default" (A kaiming-uniform, B zero), "gaussian" (A normal with deviation 1 / rank, B
            zero), or an init that replaces the default's values (`inits`): "pissa", "lora-ga".
        use_dora: learn the magnitude of each output separately.
        target_modules: "all-linear" (every linear layer but the output head), a regular expression
            for full module names, or a tuple of names or name endings such as ("to_q", "to_out.0").
        modules_to_save: modules that are trained whole with the adapter and saved with it, such
            as a classifier's new head; they get no adapter.

    Raises:
        UserError: `target_modules` is empty or no regular expression.
    """

    rank: int = 4
    alpha: float = 8
    dropout: float = 0.0
    init: str = "default"
    use_dora: bool = False
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def from_options(cls, cfg: Any, **other_fields: Any) -> Self:
        """The shape by a run's options.

        Args:
            cfg: a configuration, with the options of `methods.options.AdapterOptions`.
            other_fields: targets, and what else a task sets.
        """
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
                    f"target_modules {self.target_modules!r} is not a regular expression ({error});"
                    ' use "all-linear", an expression, or a tuple of names.'
                ) from error
        if not self.target_modules:
            raise UserError(
                'target_modules is empty; use "all-linear" or the names of some layers.'
            )

    @property
    def changes_base(self) -> bool:
        """Whether the init takes the adapter's first values out of the base weights."""
        return self.init in CHANGE_BASE


def target_layers(model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Module]:
    """The layers that `spec.target_modules` names, by module path, in the order of the model.

    Raises:
        UserError: nothing matches, or a match is neither linear nor a plain convolution.
    """
    root = plain_model(model)
    modules = _modules_of_model(root)
    if spec.target_modules == ALL_LINEAR:
        # PEFT's own "all-linear" would also take layers that `_unsupported_reason` names.
        paths = adaptable(model)
    else:
        config = LoraConfig(target_modules=peft_targets(spec))
        paths = [path for path in modules if check_target_module_exists(config, path)]
    targets: dict[str, nn.Module] = {}
    for path in paths:
        if not is_within(path, spec.modules_to_save):
            targets[path] = modules[path]
    if not targets:
        linear_paths = [path for path, module in modules.items() if _is_linear(module)]
        examples = ", ".join(linear_paths[:5]) or "none"
        raise UserError(
            f"target_modules {spec.target_modules!r} matches no layer of {type(root).__name__}; "
            f"its linear layers are called, for example: {examples}."
        )
    for path, module in targets.items():
        if reason := _unsupported_reason(root, path, module):
            raise UserError(f'The target "{path}" {reason}; take it out of target_modules.')
    return targets


def adaptable(model: nn.Module, convolutions: bool = False) -> list[str]:
    """Paths of the layers that can have an adapter.

    They are the linear layers but the output head, as in PEFT, or the convolutions.
    """
    root = plain_model(model)
    head = output_head(root)
    paths = []
    for path, module in _modules_of_model(root).items():
        if convolutions:
            is_of_kind = isinstance(base_of(module), _CONVOLUTIONS)
        else:
            is_of_kind = _is_linear(module)
        if is_of_kind and module is not head and not _unsupported_reason(root, path, module):
            paths.append(path)
    return paths


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, or the model itself."""
    if isinstance(model, PeftModel):
        return cast(nn.Module, model.base_model.model)
    return model


def peft_targets(spec: AdapterSpec) -> str | list[str]:
    """`spec.target_modules` in the form that PEFT takes."""
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


def _modules_of_model(root: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by path, without those inside LoRA layers.

    A LoRA layer counts as the layer that it wraps; its A and B are not targets.
    """
    lora_prefixes: tuple[str, ...] = ()
    modules: dict[str, nn.Module] = {}
    # A module comes before those that it holds.
    for path, module in root.named_modules():
        if path and not path.startswith(lora_prefixes):
            modules[path] = module
        if isinstance(module, LoraLayer):
            lora_prefixes += (f"{path}.",)
    return modules


def output_head(root: nn.Module) -> nn.Module | None:
    """The layer that computes the logits. "all-linear" skips it, as in PEFT."""
    getter = getattr(root, "get_output_embeddings", None)
    if not callable(getter):  # only Transformers' models have it
        return None
    return cast("nn.Module | None", getter())


def _unsupported_reason(root: nn.Module, path: str, module: nn.Module) -> str:
    """The reason why a layer can't have an adapter, as the end of a sentence; "" without one."""
    base = base_of(module)
    parent_path, _, _ = path.rpartition(".")
    if isinstance(root.get_submodule(parent_path), nn.MultiheadAttention):
        return "is read by nn.MultiheadAttention as a weight, which would bypass an adapter"
    if isinstance(base, _CONVOLUTIONS):
        # PEFT's A would pad with zeros, without dilation.
        if base.groups != 1 or set(base.dilation) != {1} or base.padding_mode != "zeros":
            return "is a convolution with groups, dilation or a padding other than zeros"
        return ""
    if not _is_linear(module):
        return f"is a {type(base).__name__}, no linear layer"
    return ""


def inject(model: nn.Module, spec: AdapterSpec, name: str = PRIMARY) -> None:
    """Add the adapter `name` to every target layer of `model`, in place.

    The base is frozen. The first adapter of a model becomes active; later ones become so by
    `activate`. Random values come from torch's global generator.

    Raises:
        UserError: no layer matches, a matched layer is of a kind that is not supported, or `name`
            exists.
    """
    if name in names(model):
        raise UserError(
            f'The model already has an adapter "{name}"; give the model without adapters.'
        )
    active_names = active(model) or (name,)
    targets = target_layers(model, spec)
    target_modules = peft_targets(spec)
    # Only paths leave out the layers that PEFT's own rules would also take.
    if spec.target_modules == ALL_LINEAR or spec.modules_to_save:
        target_modules = list(targets)
    alpha = spec.alpha
    if alpha == int(alpha):
        alpha = int(alpha)  # 8 and not 8.0 in adapter_config.json
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=spec.dropout,
        # The values of an init of `inits` replace the default's later.
        init_lora_weights="gaussian" if spec.init == "gaussian" else True,
        use_dora=spec.use_dora,
        target_modules=target_modules,
        base_model_name_or_path=getattr(model, "name_or_path", None),
        fan_in_fan_out=any(isinstance(base_of(layer), Conv1D) for layer in targets.values()),
    )
    put_adapter(model, config, name)
    _reset_magnitudes(model, name)
    if spec.modules_to_save:
        # PEFT would add a copy of each of these modules. Here a module such as a classifier's
        # head is trained in its place, in fp32, and saved under the keys that PEFT reads.
        cast(Any, model).peft_config[name].modules_to_save = list(spec.modules_to_save)
        for parameter in head_parameters(model, name).values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    activate(model, active_names)


def put_adapter(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Add an adapter of PEFT's configuration, in fp32 or wider; which adapters act is undefined."""
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, name)
        # As `add_adapter` of diffusers and Transformers does.
        if hasattr(model, "_hf_peft_config_loaded"):
            cast(Any, model)._hf_peft_config_loaded = True
    cast_adapter_dtype(model, name)  # to fp32 where they are narrower, by new parameters


def adopt(model: nn.Module, spec: AdapterSpec, name: str = PRIMARY) -> bool:
    """Use an adapter that the model came with as the adapter `name` of shape `spec`.

    Returns:
        Whether the model has an adapter of that name.

    Raises:
        UserError: the adapter has another shape or other layers, or the init of `spec` would
            replace its values.
    """
    adapted = dict(layers(model, name))
    if not adapted:
        return False
    if spec.changes_base:
        raise UserError(
            f'The model\'s adapter "{name}" has its own values, which init "{spec.init}" would '
            'replace; use init "default" or give the model without adapters.'
        )
    config = cast(Any, model).peft_config[name]
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    targets = sorted(prefix + path for path in target_layers(model, spec))
    # Of each property the adapter's value and the expected one.
    pairs: dict[str, tuple[Any, Any]] = {
        "rank": (config.r, spec.rank),
        "alpha": (config.lora_alpha, spec.alpha),
        "dropout": (config.lora_dropout, spec.dropout),
        "use_dora": (config.use_dora, spec.use_dora),
        "bias": (config.bias, "none"),
        "modules_to_save": (config.modules_to_save or [], []),
        "target_modules": (sorted(adapted), targets),
    }
    for key, (value, expected) in pairs.items():
        if value != expected:
            raise UserError(
                f'The model\'s adapter "{name}" has {key} {value} where {expected} was asked for; '
                "ask for the same or give the model without adapters."
            )
    cast_adapter_dtype(model, name)
    return True


@contextmanager
def restored(model: nn.Module, spec: AdapterSpec) -> Iterator[None]:
    """Restore a model to the bit, after adapters of shape `spec` were trained on it in the context.

    Other weights that `spec` trains or changes are restored too.
    """
    changed: list[nn.Parameter] = []
    for path, parameter in model.named_parameters():
        if is_within(path, spec.modules_to_save):
            changed.append(parameter)
    if spec.changes_base:
        for layer in target_layers(model, spec).values():
            changed.append(cast(Any, layer).weight)
    originals = []
    for parameter in changed:
        originals.append((parameter, parameter.data.to("cpu", copy=True), parameter.device))
    try:
        yield
    finally:
        for path, layer in layers(model):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())
        cast(Any, model).__dict__.pop("peft_config", None)
        if hasattr(model, "_hf_peft_config_loaded"):
            cast(Any, model)._hf_peft_config_loaded = False
        for parameter, values, device in originals:
            parameter.data = values.to(device)
            parameter.grad = None
            parameter.requires_grad_(False)


def _reset_magnitudes(model: nn.Module, name: str) -> None:
    """Compute DoRA's first magnitudes in fp32.

    PEFT computes them in the precision of the base's arithmetic, but divides by norms in fp32: a
    bf16 model would start up to 0.4 % away from its base.
    """
    for _, layer in layers(model, name):
        base = base_of(layer)
        is_narrow = base.weight.dtype not in (torch.float32, torch.float64)
        if is_narrow and name in layer.lora_magnitude_vector:
            cast(Any, layer.lora_magnitude_vector[name]).update_layer(
                base_layer=base,
                lora_A=layer.lora_A[name].weight,
                lora_B=layer.lora_B[name].weight,
                scaling=layer.scaling[name],
            )
