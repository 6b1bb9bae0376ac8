"""First values of the primary that PEFT lacks or makes otherwise: PiSSA and LoRA-GA.

Both start from factors that are not zero and take them out of the base weight in memory, so that
the model starts as it came. `prepare` goes before training; then a fresh run calls `compute` and
`adapters.start_from_initial`, a resumed one `adapters.subtract_initial` on what its checkpoint
holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import INITIAL, PRIMARY, AdapterSpec
from ..errors import TrainingError, UserError
from ..seeds import seed_of
from . import lora_ga, pissa


class Layer(NamedTuple):
    """What an init may look at; matrices are (m outputs, n inputs) in fp32 or wider."""

    weight: Tensor
    gradient: Tensor | None
    rank: int
    scale: float
    seed: int


class Init(NamedTuple):
    """How A0 (r, n) and B0 (m, r) are made.

    Attributes:
        factors: makes them, or None for a layer that is to start as by default.
        components: multiple of the rank that the shorter side of a weight must have.
        needs_gradient: whether `Layer.gradient` is looked at.
    """

    factors: Callable[[Layer], tuple[Tensor, Tensor] | None]
    components: int
    needs_gradient: bool = False


def _pissa(layer: Layer) -> tuple[Tensor, Tensor]:
    return pissa.pissa(layer.weight, layer.rank, layer.scale, layer.seed)


def _lora_ga(layer: Layer) -> tuple[Tensor, Tensor] | None:
    if layer.gradient is None or not layer.gradient.any():
        return None  # the loss does not reach the layer, so no direction is better than another
    return lora_ga.lora_ga(layer.gradient, layer.rank, layer.seed)


INITS = {
    "pissa": Init(_pissa, components=1),
    "lora-ga": Init(_lora_ga, components=2, needs_gradient=True),
}


def needs_gradient(name: str) -> bool:
    """Whether `compute` needs gradients for the init of this name."""
    return name in INITS and INITS[name].needs_gradient


def prepare(model: nn.Module, spec: AdapterSpec) -> None:
    """Make room for the first values beside the primary; nothing where `spec.init` needs none.

    Raises:
        UserError: a layer is too small, quantized or tied; the model brings an adapter "initial".
    """
    adapters.refuse_foreign_initial(model)
    if spec.changes_base:
        _check_weights(model, spec)
        adapters.keep_initial(model, spec)


def _check_weights(model: nn.Module, spec: AdapterSpec) -> None:
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    least = INITS[spec.init].components * spec.rank
    for path, layer in adapters.layers(model, PRIMARY):
        weight = adapters.base_weight(layer)
        quantized = adapters.is_quantized(layer)
        if quantized or uses[id(weight)] > 1:
            why = "is quantized" if quantized else "is shared with another layer"
            raise UserError(
                f'The weight of {path} {why}, so init "{spec.init}" can\'t change it alone; use '
                'init "default" or take the layer out of target_modules.'
            )
        m, n = adapters.rows(layer, weight).shape
        if min(m, n) < least:
            raise UserError(
                f'The layer {path} is {m} x {n}, and init "{spec.init}" at rank {spec.rank} needs '
                f"{least} on each side; lower the rank or take the layer out of target_modules."
            )


def compute(
    model: nn.Module,
    spec: AdapterSpec,
    gradients: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Fill the adapter `INITIAL` of a model that `prepare` has seen; nothing else is changed.

    Args:
        model: with its base weights as they came.
        spec: the primary's shape, with the init to use.
        gradients: of the base weights, in their shapes, by module path
            (`train.gradients.collecting`); a layer that the loss does not reach may be missing and
            keeps the default init.
        seed: of what is random in the init.

    Raises:
        UserError: the loss reaches no layer.
        TrainingError: a weight or a gradient is not finite.
    """
    init, filled = INITS[spec.init], 0
    for path, layer in adapters.layers(model, INITIAL):
        weight, gradient = adapters.base_rows(layer), (gradients or {}).get(path)
        if gradient is not None:
            gradient = adapters.rows(layer, gradient)
        for what, values in (("weight", weight), ("gradient", gradient)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise TrainingError(
                    f'The {what} of {path} is not finite; init "{spec.init}" can\'t start from it.'
                )
        scale = float(layer.scaling[INITIAL])
        made = init.factors(Layer(weight, gradient, spec.rank, scale, seed_of(seed, "init", path)))
        if made is not None:
            adapters.set_initial(layer, *made)
            filled += 1
    if not filled:
        raise UserError(
            f'init "{spec.init}" needs the gradient of a loss, and no layer got one; run backward '
            "passes through the adapted layers."
        )
