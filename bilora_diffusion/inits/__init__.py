"""First values of the primary that PEFT lacks or makes otherwise: PiSSA and LoRA-GA.

Both start from factors that are not zero and take them out of the base weight in memory, so that
the model starts as it came. `prepare` goes before training; then a fresh run calls `compute` and
`adapters.start_from_initial`, a resumed one `adapters.subtract_initial` on what its checkpoint
holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import INITIAL, PRIMARY, AdapterSpec
from ..core.errors import TrainingError, UserError
from ..core.seeds import seed_of
from . import lora_ga, pissa

COMPONENTS = {"pissa": 1, "lora-ga": 2}
"""Multiple of the rank that the shorter side of a weight must have."""


def needs_gradient(name: str) -> bool:
    """Test that `compute` needs gradients for the init of this name."""
    return name == "lora-ga"


def prepare(model: nn.Module, spec: AdapterSpec) -> None:
    """Make room for the first values beside the primary; nothing where `spec.init` needs none.

    Raises:
        UserError: a layer is too small, quantized or tied.
    """
    if not spec.changes_base:
        return
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    min_side = COMPONENTS[spec.init] * spec.rank
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
        if min(m, n) < min_side:
            raise UserError(
                f'The layer {path} is {m} x {n}, and init "{spec.init}" at rank {spec.rank} needs '
                f"{min_side} on each side; lower the rank or take the layer out of target_modules."
            )
    adapters.keep_initial(model, spec)


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
            (`train.initialisation.collecting`); a layer that the loss does not reach may be missing
            and keeps the default init.
        seed: of what is random in the init.

    Raises:
        UserError: the loss reaches no layer.
        TrainingError: a weight or a gradient is not finite.
    """
    filled = 0
    for path, layer in adapters.layers(model, INITIAL):
        weight, gradient = adapters.base_rows(layer), (gradients or {}).get(path)
        if gradient is not None:
            gradient = adapters.rows(layer, gradient)
        for quantity, values in (("weight", weight), ("gradient", gradient)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise TrainingError(
                    f'The {quantity} of {path} is not finite; init "{spec.init}" can\'t start from '
                    "it."
                )
        layer_seed = seed_of(seed, "init", path)
        if not needs_gradient(spec.init):
            factors = pissa.pissa(weight, spec.rank, float(layer.scaling[INITIAL]), layer_seed)
        elif gradient is None or not gradient.any():
            continue  # the loss does not reach the layer, so no direction is better than another
        else:
            factors = lora_ga.lora_ga(gradient, spec.rank, layer_seed)
        adapters.set_initial(layer, *factors)
        filled += 1
    if not filled:
        raise UserError(
            f'init "{spec.init}" needs the gradient of a loss, and no layer got one; run backward '
            "passes through the adapted layers."
        )
