"""Perturbed denoisers: linear weights are rounded to a few bits, or get noise, during sampling.

A minimum is flat if the loss changes little with the weights. Weights in a flat minimum should
therefore lose less quality when they are rounded (Lee et al. 2025,
https://arxiv.org/abs/2503.11078, for full training):

    perturbation = Perturbation(pipeline, "int8")  # of the base model, without an adapter
    with applied(pipeline, subject), perturbation.acting(pipeline):
        images = generate(pipeline, ...)

Each adapter is first merged into the base weights, as a user does who merges and then quantizes. So
the adapter's update is also rounded, and fully trained models are treated the same way. The
perturbed layers are those that ``--quantize nf4`` rounds. Other layers and their adapters, biases
and text encoders do not change. The rounded values are stored in the weights' dtype, so the model
runs like any other on every device; this simulates low precision and does not save memory.
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
        pipeline: pipeline of the base model, without adapters.
        precision: "int8" to "int2" (see :func:`round_rows`), or "nf4"; None to round nothing.
        noise: standard deviation of Gaussian noise, in units of the standard deviation of each base
            weight's entries; 0 for no noise. The noise is added before the rounding.
    """

    def __init__(self, pipeline: Any, precision: str | None = None, noise: float = 0.0) -> None:
        self.precision = precision
        self.noise = noise
        # Path of a layer -> standard deviation of its noise
        self._deviations: dict[str, float] = {}
        if precision is None and noise == 0:
            return
        denoiser = family_of(pipeline).model(pipeline)
        for layer, paths in find_layers(denoiser).items():
            weight = layer.weight.detach()
            self._deviations[paths[0]] = noise * float(weight.to(wide_dtype([weight])).std())

    @contextmanager
    def acting(self, pipeline: Any) -> Iterator[None]:
        """Perturb the denoiser's weights within the context, then restore them exactly.

        Within the context, active adapters of the perturbed layers are merged. A copy of these
        layers' weights is kept in memory.

        Args:
            pipeline: pipeline of the base model, with adapters or a fully trained denoiser if the
                subject has them.
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
                        # `restored` resets the weights, so PEFT's `unmerge` is not needed.
                        layer.merged_adapters.clear()

    @torch.no_grad()
    def _perturb(self, path: str, layer: nn.Module) -> None:
        """Merge a layer's adapters, then add noise to its weight and round it, in place."""
        if isinstance(layer, LoraLayer):
            cast(Any, layer).merge()
        weight = _linear(layer).weight
        values = weight.to(wide_dtype([weight]))
        if self.noise:
            # Generate the noise on the CPU, so that it is the same on all devices.
            random = torch.randn(weight.shape, generator=generator("weight noise", path))
            values = values + self._deviations[path] * random.to(values)
        if self.precision == NF4:
            values = round_to_nf4(values)
        elif self.precision is not None:
            values = round_rows(values, bits=int(self.precision.removeprefix("int")))
        weight.copy_(values)


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """Round a weight (m, n) to 2^bits - 1 evenly spaced values in each row, symmetric around 0.

    w_ij <- s_i round(w_ij / s_i) with s_i = max_j |w_ij| / (2^(bits - 1) - 1): one scale for each
    output.
    """
    largest = weight.abs().amax(dim=1, keepdim=True)  # (m, 1)
    scales = largest / (2 ** (bits - 1) - 1)
    scales[scales == 0] = 1  # avoids 0 / 0 for a row of zeros
    return scales * (weight / scales).round()


def _linear(layer: nn.Module) -> nn.Linear:
    """Return the linear layer, unwrapped from its adapters if there are any."""
    if isinstance(layer, LoraLayer):
        return cast(Any, layer).get_base_layer()
    return cast(nn.Linear, layer)
