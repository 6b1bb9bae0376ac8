"""A primary whose first values were taken out of the base weights.

PiSSA and LoRA-GA start the primary at factors A0, B0 that are not zero, and the base weight at
W - s B0 A0, so that the model starts as it came. A0 and B0 stay on the model as the adapter
`INITIAL`, which never acts and is never trained: checkpoints hold it, so that a resumed run makes
the same base weights, and `portable_state_dict` needs it to say what the primary adds to W.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..core.lora_names import INITIAL, PRIMARY
from .access import base_weight, from_rows, layers, weights
from .injection import inject
from .targets import AdapterSpec


def keep_initial(model: nn.Module, spec: AdapterSpec) -> None:
    """Add the adapter `INITIAL`, with B0 = 0, beside a primary of shape `spec`, in place.

    No random number is taken from torch's global generator.

    Raises:
        UserError: the model has an adapter of that name.
    """
    plain = replace(spec, init="default", dropout=0.0, use_dora=False)
    with torch.random.fork_rng(devices=[]):
        inject(model, plain, INITIAL)


@torch.no_grad()
def set_initial(layer: LoraLayer, A: Tensor, B: Tensor) -> None:
    """Write A0 (r, n) and B0 (m, r) into the layer's adapter `INITIAL`, of whatever shape it is."""
    for parameter, value in zip(weights(layer, INITIAL), (A, B), strict=True):
        parameter.copy_(value.reshape(parameter.shape))


@torch.no_grad()
def start_from_initial(model: nn.Module) -> None:
    """Start the primary from A0, B0, and take these out of the base weights; once, in place.

    A layer whose B0 is zero keeps the primary that it has, which then becomes its A0, B0.
    """
    for _, layer in layers(model, INITIAL):
        primary, initial = weights(layer, PRIMARY), weights(layer, INITIAL)
        target, source = (primary, initial) if initial[1].any() else (initial, primary)
        for parameter, values in zip(target, source, strict=True):
            parameter.copy_(values)
    subtract_initial(model)


@torch.no_grad()
def subtract_initial(model: nn.Module) -> None:
    """W <- W - s B0 A0 for every layer, in place; to be called once on the weights as they came.

    The product is formed in fp64 (TF32, which a matrix product in fp32 may use, would move W by
    1e-3 of it) and the difference rounded once to the weight's dtype. In bf16 that moves a weight
    by up to 0.4 %: those of the miniature's UNet by 0.15 % of their norm and its output by 0.03 %,
    where bf16 arithmetic moves the output by 0.4 %. An exported file knows nothing of it.
    """
    for _, layer in layers(model, INITIAL):
        weight = base_weight(layer)
        A, B = weights(layer, INITIAL)
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        change = B.flatten(1).to(wide) @ A.flatten(1).to(wide) * layer.scaling[INITIAL]
        weight.copy_(weight.to(wide) - from_rows(layer, change))
