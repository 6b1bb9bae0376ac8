"""What rounding leaves of the auxiliary: the change that it makes to outputs, and the one wanted.

A bf16 number has 8 significant bits. A change of an output that is far smaller than its last bit
leaves most outputs as they are and moves a few by a whole bit. Two figures say what comes of it:

    kept    <made, wanted> / ||wanted||^2            the share of the effect that survives
    cosine  <made, wanted> / (||made|| ||wanted||)   1: nothing but the effect, 0: rounding alone

A low cosine with much kept is an effect that is right on average and noisy in each output. In fp32
both are 1 for every radius that is used, so nothing is measured there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..adapters import AUXILIARY, LoraLayer
from ..errors import is_main_process

LAYERS = 8
"""How many layers are looked at, evenly spaced."""
EVERY = 50
"""Steps from one look to the next; within the first ones, after 1, 2, 4, 8, ... steps too."""
ROWS = 1024
"""Rows of a layer's input that are looked at, where the first dimension is not the batch."""
NARROW = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOW = 0.5
logger = logging.getLogger(__name__)


class Effect(NamedTuple):
    """How an auxiliary changes a layer's output: both of the output's shape, fp32 or wider."""

    made: Tensor
    wanted: Tensor
    dtype: torch.dtype  # of the output

    def cosine(self) -> Tensor:
        """<made, wanted> / (||made|| ||wanted||), 0-d: 0 if nothing was made, nan if nothing was
        wanted.
        """
        made, wanted = self.made.flatten(), self.wanted.flatten()
        whole = torch.linalg.vector_norm(wanted)
        length = torch.linalg.vector_norm(made) * whole
        return torch.where((length == 0) & (whole > 0), 0.0, (made @ wanted) / length)

    def products(self) -> Tensor:
        """<made, wanted> and ||wanted||^2, (2,); what is kept is the ratio of their sums."""
        wanted = self.wanted.flatten()
        return torch.stack([self.made.flatten() @ wanted, wanted @ wanted])


@torch.no_grad()
def effect(layer: Any, x: Tensor) -> Effect:
    """What the auxiliary of one layer does to its output, in the precision that surrounds the call,
    and what it would do exactly: s2 B2 A2 x in the factors' own precision.

    Nothing of the layer is changed, no random number is drawn; the primary's dropout is off.

    Args:
        layer: a LoRA layer in which primary and auxiliary act.
        x: its input.
    """
    kind, scale = x.device.type, layer.scaling[AUXILIARY]
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    # Without autocast's cache, which would keep weights cast here, where no gradients are taken.
    with _without_dropout(layer), torch.autocast(kind, dtype, enabled=on, cache_enabled=False):
        whole = layer.forward(x)
        try:
            layer.scaling[AUXILIARY] = 0.0  # the same product, with nothing in half of it
            without = layer.forward(x)
        finally:
            layer.scaling[AUXILIARY] = scale
    down, up = layer.lora_A[AUXILIARY], layer.lora_B[AUXILIARY]
    with torch.autocast(kind, enabled=False):
        wanted = up(down(x.to(down.weight.dtype))) * scale
    return Effect(whole.to(wanted.dtype) - without.to(wanted.dtype), wanted, whole.dtype)


class Probe:
    """Looks at the auxiliary's effect on a few layers, now and then, in a training pass."""

    def __init__(self) -> None:
        self._hooks: dict[int, RemovableHandle] = {}
        self._seen: list[Tensor] = []
        self._precision = ""
        self._warned = False

    def arm(self, layers: Sequence[tuple[str, LoraLayer]], taken: int) -> None:
        """Look at the next pass through some of these layers, if it is due after `taken` steps."""
        if not _due(taken):
            return
        for hook in self._hooks.values():
            hook.remove()
        count = min(LAYERS, len(layers))
        chosen: list[Any] = [layers[i * len(layers) // count][1] for i in range(count)]
        self._hooks = {id(layer): layer.register_forward_pre_hook(self._look) for layer in chosen}

    def read(self, rho: float) -> dict[str, float]:
        """For the log: what is kept of the effect over the layers seen since the last call, and the
        mean of their cosines; {} without any. Waits for the device. The first low cosine is warned
        of.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return {}
        figures = torch.stack([figure.double().cpu() for figure in seen])
        figures = figures[~figures[:, 0].isnan()]  # layers on which nothing is wanted
        if not len(figures):
            return {}
        cosine, (made, wanted) = float(figures[:, 0].mean()), figures[:, 1:].sum(0).tolist()
        kept = made / wanted
        if cosine < LOW and not self._warned and is_main_process():
            self._warned = True
            logger.warning(
                "in %s rounding hides what the auxiliary does to a layer's outputs: %.0f %% of the "
                "change that rho %g should make is kept, with a cosine of %.2f; use a larger --rho,"
                " or --mixed_precision no, for more of it",
                self._precision,
                100 * kept,
                rho,
                cosine,
            )
        return {"auxiliary_effect": kept, "auxiliary_cosine": cosine}

    def _look(self, layer: Any, args: tuple[Any, ...]) -> None:
        inactive = layer.disable_adapters or AUXILIARY not in layer.active_adapters
        if inactive or not layer.training or not args[0].numel():
            return  # an evaluation, or an expert that has no rows
        if (hook := self._hooks.pop(id(layer), None)) is None:
            return  # a copy of the model, or what a checkpoint of activations computes again
        hook.remove()
        x = args[0].detach()
        seen = effect(layer, x[:1] if x.dim() > 2 else x[:ROWS])
        if seen.dtype in NARROW:
            self._seen.append(torch.cat([seen.cosine()[None], seen.products()]))
            self._precision = NARROW[seen.dtype]


def _due(taken: int) -> bool:
    """Whether to look after so many steps; before the first the auxiliary is zero."""
    return taken > 0 and (taken % EVERY == 0 or taken & (taken - 1) == 0)


@contextmanager
def _without_dropout(layer: Any) -> Iterator[None]:
    parts = (layer, *layer.lora_dropout.modules())
    modes = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
