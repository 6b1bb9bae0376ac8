"""Initialize the primary adapter from a file, with PiSSA or with LoRA-GA.

`start_from_file` copies the values of a file. PiSSA and LoRA-GA start from nonzero factors A0, B0
and subtract them from the base weight, which becomes W - s B0 A0, so the model's output is
unchanged at the start. A0 and B0 stay on the model as the adapter `INITIAL`, which is never active
and never trained. Checkpoints contain it, so a resumed run can restore the same base weights.
`portable_state_dict` uses it to compute the primary's change relative to W.

Call `prepare` before training. A new run then calls `compute` and `start_from_initial`. A resumed
run loads the factors from its checkpoint and calls `subtract_initial`.

Sources: Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
Language Models (https://arxiv.org/abs/2404.02948), Equations 2-4. Wang et al. 2024, LoRA-GA:
Low-Rank Adaptation with Gradient Approximation (https://arxiv.org/abs/2407.05000), Theorem 3.1,
Section 3.3 and Algorithm 1, as in its authors' code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import TrainingError, UserError
from ..core.lora_names import INITIAL, PRIMARY
from ..core.seeds import seed_of
from .access import (
    base_rows,
    base_weight,
    from_rows,
    head_parameters,
    is_quantized,
    layers,
    rows,
    weights,
)
from .injection import AdapterSpec, inject
from .precision import exact_dtype
from .saving import load_values, peft_parameters

# Number of singular components that each init uses, as a multiple of the rank. No side of a weight
# may be shorter than this number.
COMPONENTS = {"pissa": 1, "lora-ga": 2}
# PiSSA computes the full SVD of a weight whose shorter side has at most this length.
#
# On one CPU thread it takes 1.5 s at 1280 x 1280 (SDXL's most frequent layer) and 5 s at 2048 x
# 2048. The time grows with the third power of the side, and a 7B model has about 200 layers with a
# side of 4096.
EXACT_UP_TO = 2048
# Settings of the randomized decompositions: number of components and of subspace iterations.
PISSA_OVERSAMPLING = 16  # components in addition to the r that are used
PISSA_ITERATIONS = 16
LORA_GA_OVERSAMPLING = 4  # components, as a multiple of the rank
LORA_GA_ITERATIONS = 4
# LoRA-GA's gamma, which divides the product B0 A0 (Section 3.3).
GAMMA = 16.0


def needs_gradient(name: str) -> bool:
    """Return whether `compute` needs gradients for the init of this name."""
    return name == "lora-ga"


def prepare(model: nn.Module, spec: AdapterSpec) -> None:
    """Add the adapter `INITIAL` to the primary's layers if `spec.init` changes the base weights.

    Raises:
        UserError: a layer is too small or quantized, or shares its weight with another layer.
    """
    if not spec.changes_base:
        return
    # A weight that several layers share is listed once for each of them.
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    min_side = COMPONENTS[spec.init] * spec.rank
    for path, layer in layers(model, PRIMARY):
        weight = base_weight(layer)
        problem = ""
        if is_quantized(layer):
            problem = "is quantized"
        elif uses[id(weight)] > 1:
            problem = "is shared with another layer"
        if problem:
            raise UserError(
                f'The weight of {path} {problem}, so init "{spec.init}" can\'t change it; use init '
                '"default" or remove the layer from target_modules.'
            )
        m, n = rows(layer, weight).shape
        if min(m, n) < min_side:
            raise UserError(
                f'The layer {path} is {m} x {n}, but init "{spec.init}" at rank {spec.rank} needs '
                f"at least {min_side} on each side; lower the rank or remove the layer from "
                "target_modules."
            )
    plain = replace(spec, init="default", dropout=0.0, use_dora=False)
    # The random A of `INITIAL` is always overwritten, by `compute`, by `start_from_initial` or from
    # a checkpoint, so creating it must not advance torch's global generator.
    with torch.random.fork_rng(devices=[]):
        inject(model, plain, INITIAL)


@torch.no_grad()
def compute(
    model: nn.Module,
    spec: AdapterSpec,
    gradients: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Fill the adapter `INITIAL`, which `prepare` has added, and change nothing else.

    Args:
        model: model with its original base weights.
        spec: the primary's settings; `spec.init` is the init to compute.
        gradients: for LoRA-GA, gradients of the base weights by module path, in the weights' shapes
            (`train.initialisation.collecting`). A layer that the loss does not depend on may be
            missing and keeps the default init.
        seed: seed of the randomized decompositions.

    Raises:
        UserError: the loss depends on no layer.
        TrainingError: a weight or a gradient is not finite.
    """
    filled_layers = 0
    for path, layer in layers(model, INITIAL):
        weight = base_rows(layer)
        gradient = None if gradients is None else gradients.get(path)
        if gradient is not None:
            gradient = rows(layer, gradient)
        for quantity, values in (("weight", weight), ("gradient", gradient)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise TrainingError(
                    f'The {quantity} of {path} is not finite, so init "{spec.init}" can\'t use it.'
                )
        layer_seed = seed_of(seed, "init", path)
        if not needs_gradient(spec.init):
            A, B = pissa(weight, spec.rank, float(layer.scaling[INITIAL]), layer_seed)
        elif gradient is None or not gradient.any():
            continue  # the loss does not use the layer, so no direction is better than another
        else:
            A, B = lora_ga(gradient, spec.rank, layer_seed)
        for parameter, value in zip(weights(layer, INITIAL), (A, B), strict=True):
            # A convolution's A is (r, in_channels, height, width), its B (m, r, 1, 1).
            parameter.copy_(value.reshape(parameter.shape))
        filled_layers += 1
    if not filled_layers:
        raise UserError(
            f'init "{spec.init}" needs the gradient of a loss, but no layer got one; run backward '
            "passes through the adapted layers."
        )


def start_from_file(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the primary, and modules that are trained in full with it, to the values of a file.

    Args:
        tensors: A, B (without the scale alpha / rank), DoRA's magnitudes and fully trained modules,
            by PEFT key.

    Raises:
        UserError: the file's layers or shapes differ from the primary's.
    """
    parameters = {**peft_parameters(model, PRIMARY), **head_parameters(model, PRIMARY)}
    load_values(parameters, tensors, "the LoRA file to start from")


@torch.no_grad()
def start_from_initial(model: nn.Module) -> None:
    """Set the primary to A0, B0 and subtract them from the base weights, in place. Call it once.

    If a layer's B0 is zero, its primary stays unchanged and is copied to A0 and B0.
    """
    for _, layer in layers(model, INITIAL):
        A, B = weights(layer, PRIMARY)
        A0, B0 = weights(layer, INITIAL)
        if B0.any():
            A.copy_(A0)
            B.copy_(B0)
        else:
            A0.copy_(A)
            B0.copy_(B)
    subtract_initial(model)


@torch.no_grad()
def subtract_initial(model: nn.Module) -> None:
    """Subtract A0, B0 from the base weights in place, W <- W - s B0 A0. Call it once.

    The product is computed in `exact_dtype`, since an fp32 matrix product may use TF32, whose
    relative error of 1e-3 would change W. The difference is rounded once, to the weight's dtype. In
    bf16 this rounding changes a weight by up to 0.4 %. It changes the weights of the miniature's
    UNet by 0.15 % of their norm and the UNet's output by 0.03 %, while bf16 arithmetic changes the
    output by 0.4 %. An exported file does not correct this rounding.
    """
    for _, layer in layers(model, INITIAL):
        weight = base_weight(layer)
        A, B = weights(layer, INITIAL)
        exact = exact_dtype(weight.device)
        change = B.flatten(1).to(exact) @ A.flatten(1).to(exact) * layer.scaling[INITIAL]
        weight.copy_(weight.to(exact) - from_rows(layer, change))


def pissa(weight: Tensor, rank: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Compute PiSSA's A0 = sqrt(S_r / s) V_r^T and B0 = U_r sqrt(S_r / s) (Eqs. 2 and 3).

    With W = U S V^T, s B0 A0 is the best rank-r approximation of W. If the shorter side exceeds
    `EXACT_UP_TO`, the r components come from randomized subspace iteration (Halko et al. 2011), as
    in the paper's fast SVD. The model computes the same function in both cases, since exactly
    s B0 A0 is subtracted from W.

    Args:
        weight: W, (m, n), fp32 or fp64.
        rank: r <= min(m, n).
        scale: s = alpha / r of the adapter.
        seed: seed of the randomized decomposition; torch's global generator is not changed.

    Returns:
        A0 (r, n) and B0 (m, r).
    """
    short_side = min(weight.shape)
    if short_side <= EXACT_UP_TO:
        U, S, V_transposed = torch.linalg.svd(weight, full_matrices=False)
        V = V_transposed.T
    else:
        size = min(rank + PISSA_OVERSAMPLING, short_side)
        U, S, V = seeded_svd(weight, size, PISSA_ITERATIONS, seed)
    U, S, V = U[:, :rank], S[:rank], V[:, :rank]
    signed_roots = signs(V) * (S / scale).sqrt()  # (r,)
    return signed_roots[:, None] * V.T, U * signed_roots


def signs(columns: Tensor) -> Tensor:
    """Return the signs, (r,), that make each column's entry with the largest magnitude positive.

    A decomposition does not define the signs of singular vectors. They depend on the last bits of
    its input and, for a gradient, on how the batch was split.
    """
    largest = columns.abs().argmax(0, keepdim=True)
    return columns.gather(0, largest)[0].sign()


def seeded_svd(
    matrix: Tensor, size: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `torch.svd_lowrank` with a seed, since it takes no generator.

    Returns:
        U (m, size), S (size,) and V (n, size).
    """
    devices: list[torch.device] = []
    generator: Any = torch.default_generator
    if matrix.device.type == "cuda":
        devices = [matrix.device]
        generator = torch.cuda
    with torch.random.fork_rng(devices=devices):
        generator.manual_seed(seed)
        return torch.svd_lowrank(matrix, q=size, niter=iterations)


def lora_ga(gradient: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Compute LoRA-GA's A0 = c V[1..r]^T and B0 = c U[r+1..2r] for the gradient G = U S V^T.

    A0 and B0 come from different components, so the adapter's first step is the best rank-2r
    approximation of the full gradient's step (Theorem 3.1). c = m^(1/4) / sqrt(GAMMA) makes the
    scale of the output independent of the layer's size (Section 3.3). The largest entry of each
    component is positive.

    Args:
        gradient: G = dL/dW, the mean over some samples, (m, n); its scale has no effect.
        rank: r <= min(m, n) / 2.
        seed: seed of the randomized decomposition.

    Returns:
        A0 (r, n) and B0 (m, r).
    """
    m, n = gradient.shape
    size = min(LORA_GA_OVERSAMPLING * rank, m, n)
    U, _, V = seeded_svd(gradient, size, LORA_GA_ITERATIONS, seed)
    c = m**0.25 / GAMMA**0.5
    V = V[:, :rank]
    U = U[:, rank : 2 * rank]
    return c * (V * signs(V)).T, c * (U * signs(U))
