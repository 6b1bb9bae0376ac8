"""A denoiser whose linear weights are rounded to few bits, or have noise on them, in samples.

A minimum is flat if the loss hardly changes with the weights. So weights in a flat one should lose
less when they are rounded (Lee et al. 2025, https://arxiv.org/abs/2503.11078, for full training):

    perturbation = Perturbation(pipeline, "int8")  # of the base model, without an adapter
    with applied(pipeline, subject), perturbation.acting(pipeline):
        images = generate(pipeline, ...)

Each adapter is merged into the base weights first, since this is what a user does who merges and
quantizes: the rounding also hits what was learned, and whole models are treated alike. The layers
are those that ``--quantize nf4`` rounds. Other layers, biases and text encoders stay as they are,
and so do adapters of other layers. The rounded values are stored in the weights' dtype, so all
products are those of an ordinary model on any device; only the values are those of few bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bilora_diffusion.adapters import LoraLayer, wide_dtype
from bilora_diffusion.adapters.quantize import find_layers, round_to_nf4
from bilora_diffusion.core.seeds import generator
from bilora_diffusion.core.values import NF4
from bilora_diffusion.image.families import family_of
from bilora_diffusion.methods.perturb import restored


class Perturbation:
    """Rounding of linear weights and noise on them, the same for every subject.

    Args:
        pipeline: the base model's, without adapters.
        precision: "int8" to "int2" (see :func:`round_rows`), or "nf4"; None for no rounding.
        noise: standard deviation of Gaussian noise, in units of the standard deviation of each base
            weight's entries; 0 for none. It is added before the rounding.
    """

    def __init__(self, pipeline: Any, precision: str | None = None, noise: float = 0.0) -> None:
        self.precision = precision
        self.noise = noise
        # Standard deviation of the noise, by the layer's path
        self._deviations: dict[str, float] = {}
        if precision is None and noise == 0:
            return
        denoiser = family_of(pipeline).model(pipeline)
        for layer, paths in find_layers(denoiser).items():
            weight = layer.weight.detach()
            self._deviations[paths[0]] = noise * float(weight.to(wide_dtype([weight])).std())

    @contextmanager
    def acting(self, pipeline: Any) -> Iterator[None]:
        """Context manager: perturbs the denoiser's weights, then restores them exactly.

        Active adapters of the perturbed layers are merged in the context, which takes a copy of
        these layers' weights.

        Args:
            pipeline: the base model's, perhaps with adapters or with a whole model in its place.
        """
        denoiser = family_of(pipeline).model(pipeline)
        layers: dict[str, nn.Module] = {}
        parameters: list[nn.Parameter] = []
        for path in self._deviations:
            layers[path] = denoiser.get_submodule(path)
            parameters += _linear(layers[path]).parameters()
        with restored(parameters):
            try:
                for path, layer in layers.items():
                    self._perturb(path, layer)
                yield
            finally:
                for layer in layers.values():
                    if isinstance(layer, LoraLayer):
                        # Not PEFT's `unmerge`, which subtracts the change from the rounded weights.
                        layer.merged_adapters.clear()

    @torch.no_grad()
    def _perturb(self, path: str, layer: nn.Module) -> None:
        """Merge the adapters of a layer; then add noise to its weight and round it, in place."""
        if isinstance(layer, LoraLayer):
            cast(Any, layer).merge()
        weight = _linear(layer).weight
        values = weight.to(wide_dtype([weight]))
        if self.noise:
            # Made on the CPU, so that all devices get the same entries.
            random = torch.randn(weight.shape, generator=generator("weight noise", path))
            values = values + self._deviations[path] * random.to(values)
        if self.precision == NF4:
            values = round_to_nf4(values)
        elif self.precision is not None:
            values = round_rows(values, bits=int(self.precision.removeprefix("int")))
        weight.copy_(values)


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """A weight (m, n) rounded to 2^bits - 1 evenly spaced values in each row, symmetric around 0.

    w_ij <- s_i round(w_ij / s_i) with s_i = max_j |w_ij| / (2^(bits - 1) - 1), one scale for each
    output.
    """
    largest = weight.abs().amax(dim=1, keepdim=True)  # (m, 1)
    scales = largest / (2 ** (bits - 1) - 1)
    scales[scales == 0] = 1  # a row of zeros stays as it is
    return scales * (weight / scales).round()


def _linear(layer: nn.Module) -> nn.Linear:
    """The linear layer, which may be under adapters."""
    if isinstance(layer, LoraLayer):
        return cast(Any, layer).get_base_layer()
    return cast(nn.Linear, layer)
