"""Specifications of adapters, their target layers, and their injection into a model."""

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

# Inits that subtract the adapter's initial values from the base weights (`inits`).
CHANGE_BASE = ("pissa", "lora-ga")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class AdapterSpec:
    """The shape of one LoRA adapter: W + (alpha / rank) * B @ A on every target.

    Attributes:
        rank: inner size r of A (r, n) and B (m, r).
        alpha: numerator of the scale s = alpha / rank.
        dropout: probability of dropping an input of A, in training mode.
        init: "default" (A kaiming-uniform, B zero), "gaussian" (A normal with standard deviation
            1 / rank, B zero), "pissa" or "lora-ga" (`inits` replaces the default values).
        use_dora: whether the magnitude of each output is trained separately (DoRA).
        target_modules: "all-linear" (every linear layer except the output head), a regular
            expression for full module names, or a tuple of names or name endings such as
            ("to_q", "to_out.0").
        modules_to_save: modules that are trained in full and saved with the adapter, such as a
            classifier's new head; they get no adapter.

    Raises:
        UserError: `target_modules` is empty or not a valid regular expression.
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
        """Create the specification from a run's options.

        Args:
            cfg: configuration with the options of `methods.options.AdapterOptions`.
            other_fields: fields that a task sets, such as `target_modules`.
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
                    f"target_modules {self.target_modules!r} is not a valid regular expression"
                    f' ({error}); use "all-linear", an expression, or a tuple of names.'
                ) from error
        if not self.target_modules:
            raise UserError(
                'target_modules is empty; use "all-linear" or the names of some layers.'
            )

    @property
    def changes_base(self) -> bool:
        """Whether the init subtracts the adapter's initial values from the base weights."""
        return self.init in CHANGE_BASE


def target_layers(model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Module]:
    """Return the layers that `spec.target_modules` selects, by module path, in model order.

    Raises:
        UserError: no layer matches, or a matching layer can't have an adapter.
    """
    root = plain_model(model)
    modules = _modules_of_model(root)
    if spec.target_modules == ALL_LINEAR:
        # PEFT's own "all-linear" would include layers that `_unsupported_reason` rejects.
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
            f"examples of its linear layers: {examples}."
        )
    for path, module in targets.items():
        if reason := _unsupported_reason(root, path, module):
            raise UserError(f'The target "{path}" {reason}; remove it from target_modules.')
    return targets


def adaptable(model: nn.Module, convolutions: bool = False) -> list[str]:
    """Return the paths of the layers that can have an adapter.

    These are the linear layers except the output head, as in PEFT. With `convolutions`, they are
    the convolutions instead.
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
    """Return the model inside a `PeftModel`, or the model itself."""
    if isinstance(model, PeftModel):
        return cast(nn.Module, model.base_model.model)
    return model


def peft_targets(spec: AdapterSpec) -> str | list[str]:
    """Return `spec.target_modules` in the form that PEFT expects."""
    if isinstance(spec.target_modules, str):
        return spec.target_modules
    return list(spec.target_modules)  # PEFT converts a list to a set, but not a tuple


def base_of(layer: Any) -> Any:
    """Return the layer that an adapter wraps, or the layer itself."""
    if isinstance(layer, LoraLayer):
        return layer.get_base_layer()
    return layer


def _is_linear(module: nn.Module) -> bool:
    return isinstance(base_of(module), nn.Linear | Conv1D)


def _modules_of_model(root: nn.Module) -> dict[str, nn.Module]:
    """Return a model's modules by path, without those inside LoRA layers.

    A LoRA layer counts as the layer that it wraps; its A and B are not targets.
    """
    lora_prefixes: tuple[str, ...] = ()
    modules: dict[str, nn.Module] = {}
    # A module comes before its children.
    for path, module in root.named_modules():
        if path and not path.startswith(lora_prefixes):
            modules[path] = module
        if isinstance(module, LoraLayer):
            lora_prefixes += (f"{path}.",)
    return modules


def output_head(root: nn.Module) -> nn.Module | None:
    """Return the layer that computes the logits, which "all-linear" skips as in PEFT, or None."""
    getter = getattr(root, "get_output_embeddings", None)
    if not callable(getter):  # only Transformers' models have this method
        return None
    return cast("nn.Module | None", getter())


def _unsupported_reason(root: nn.Module, path: str, module: nn.Module) -> str:
    """Return why a layer can't have an adapter, as the end of a sentence; "" if it can."""
    base = base_of(module)
    parent_path, _, _ = path.rpartition(".")
    if isinstance(root.get_submodule(parent_path), nn.MultiheadAttention):
        return "is used by nn.MultiheadAttention through its weight, which bypasses an adapter"
    if isinstance(base, _CONVOLUTIONS):
        # PEFT's A pads with zeros and has no dilation.
        if base.groups != 1 or set(base.dilation) != {1} or base.padding_mode != "zeros":
            return "is a convolution with groups, dilation or a padding mode other than zeros"
        return ""
    if not _is_linear(module):
        return f"is a {type(base).__name__}, not a linear layer"
    return ""


def inject(model: nn.Module, spec: AdapterSpec, name: str = PRIMARY) -> None:
    """Add the adapter `name` to every target layer of `model`, in place.

    The base is frozen. The new adapter becomes active only if the model has no active adapter;
    otherwise activate it with `activate`. Random values come from torch's global generator.

    Raises:
        UserError: no layer matches, a matching layer can't have an adapter, or the model already
            has an adapter `name`.
    """
    if name in names(model):
        raise UserError(
            f'The model already has an adapter "{name}"; pass a model without adapters.'
        )
    active_names = active(model) or (name,)
    targets = target_layers(model, spec)
    target_modules = peft_targets(spec)
    # Use full paths, since PEFT's own rules would match further layers.
    if spec.target_modules == ALL_LINEAR or spec.modules_to_save:
        target_modules = list(targets)
    alpha = spec.alpha
    if alpha == int(alpha):
        alpha = int(alpha)  # adapter_config.json gets 8 instead of 8.0
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=spec.dropout,
        # For "pissa" and "lora-ga", `inits` replaces the default values later.
        init_lora_weights="gaussian" if spec.init == "gaussian" else True,
        use_dora=spec.use_dora,
        target_modules=target_modules,
        base_model_name_or_path=getattr(model, "name_or_path", None),
        fan_in_fan_out=any(isinstance(base_of(layer), Conv1D) for layer in targets.values()),
    )
    put_adapter(model, config, name)
    _reset_magnitudes(model, name)
    if spec.modules_to_save:
        # PEFT would train a copy of each of these modules. Here the module itself, such as a
        # classifier's head, is trained in fp32 and saved under the keys that PEFT reads.
        cast(Any, model).peft_config[name].modules_to_save = list(spec.modules_to_save)
        for parameter in head_parameters(model, name).values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    activate(model, active_names)


def put_adapter(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Add an adapter with a PEFT configuration, in fp32 or wider.

    Call `activate` afterwards, since it is undefined which adapters are active.
    """
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, name)
        # `add_adapter` of diffusers and Transformers also sets this attribute.
        if hasattr(model, "_hf_peft_config_loaded"):
            cast(Any, model)._hf_peft_config_loaded = True
    cast_adapter_dtype(model, name)  # replaces narrower parameters with new ones in fp32


def adopt(model: nn.Module, spec: AdapterSpec, name: str = PRIMARY) -> bool:
    """Use an adapter that the model already has as the adapter `name` of shape `spec`.

    Returns:
        Whether the model has an adapter with this name.

    Raises:
        UserError: the adapter's shape or layers differ from `spec`, or the init of `spec` would
            replace its values.
    """
    adapted = dict(layers(model, name))
    if not adapted:
        return False
    if spec.changes_base:
        raise UserError(
            f'The model\'s adapter "{name}" has its own values, which init "{spec.init}" would '
            'replace; use init "default" or pass a model without adapters.'
        )
    config = cast(Any, model).peft_config[name]
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    targets = sorted(prefix + path for path in target_layers(model, spec))
    # The adapter's value and the expected value of each property.
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
                f'The model\'s adapter "{name}" has {key} {value} instead of the requested '
                f"{expected}; request the same value or pass a model without adapters."
            )
    cast_adapter_dtype(model, name)
    return True


@contextmanager
def restored(model: nn.Module, spec: AdapterSpec) -> Iterator[None]:
    """Remove all adapters on exit and restore the model bit for bit.

    The weights that adapters of shape `spec` train or change are restored from copies on the CPU.
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
    """Compute DoRA's initial magnitudes again in fp32 for a narrower base.

    PEFT computes them in the precision of the base layer's arithmetic but divides by fp32 norms, so
    a bf16 model would start up to 0.4 % away from its base.
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
