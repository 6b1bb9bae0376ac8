"""First values of the primary that PEFT lacks or makes otherwise: PiSSA and LoRA-GA.

Both start from factors A0, B0 that are not zero, and take them out of the base weight, which is
then W - s B0 A0, so that the model starts as it came. A0 and B0 stay on the model as the adapter
`INITIAL`, which never acts and is never trained: checkpoints hold it, so that a resumed run makes
the same base weights, and `portable_state_dict` needs it to say what the primary adds to W.

`prepare` goes before training; then a fresh run calls `compute` and `start_from_initial`, a resumed
one `subtract_initial` on what its checkpoint holds.

Sources: Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
Language Models (https://arxiv.org/abs/2404.02948), Equations 2-4. Wang et al. 2024, LoRA-GA:
Low-Rank Adaptation with Gradient Approximation (https://arxiv.org/abs/2407.05000), Theorem 3.1,
Section 3.3 and Algorithm 1, as its authors run it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..core.errors import TrainingError, UserError
from ..core.lora_names import INITIAL, PRIMARY
from ..core.seeds import seed_of
from .access import base_rows, base_weight, from_rows, is_quantized, layers, rows, weights
from .injection import AdapterSpec, inject

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
    for path, layer in layers(model, PRIMARY):
        weight = base_weight(layer)
        quantized = is_quantized(layer)
        if quantized or uses[id(weight)] > 1:
            why = "is quantized" if quantized else "is shared with another layer"
            raise UserError(
                f'The weight of {path} {why}, so init "{spec.init}" can\'t change it alone; use '
                'init "default" or take the layer out of target_modules.'
            )
        m, n = rows(layer, weight).shape
        if min(m, n) < min_side:
            raise UserError(
                f'The layer {path} is {m} x {n}, and init "{spec.init}" at rank {spec.rank} needs '
                f"{min_side} on each side; lower the rank or take the layer out of target_modules."
            )
    keep_initial(model, spec)


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
    for path, layer in layers(model, INITIAL):
        weight, gradient = base_rows(layer), (gradients or {}).get(path)
        if gradient is not None:
            gradient = rows(layer, gradient)
        for quantity, values in (("weight", weight), ("gradient", gradient)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise TrainingError(
                    f'The {quantity} of {path} is not finite; init "{spec.init}" can\'t start from '
                    "it."
                )
        layer_seed = seed_of(seed, "init", path)
        if not needs_gradient(spec.init):
            factors = pissa(weight, spec.rank, float(layer.scaling[INITIAL]), layer_seed)
        elif gradient is None or not gradient.any():
            continue  # the loss does not reach the layer, so no direction is better than another
        else:
            factors = lora_ga(gradient, spec.rank, layer_seed)
        set_initial(layer, *factors)
        filled += 1
    if not filled:
        raise UserError(
            f'init "{spec.init}" needs the gradient of a loss, and no layer got one; run backward '
            "passes through the adapted layers."
        )


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


EXACT_UP_TO = 2048
"""Shorter side up to which the whole decomposition is computed.

On one CPU thread it takes 1.5 s at 1280 x 1280 (SDXL's most frequent layer) and 5 s at 2048; at
4096 it would be minutes for each of some 200 layers of a 7 B model, for r of 4096 components.
"""
PISSA_OVERSAMPLING, PISSA_ITERATIONS = 16, 16


def pissa(weight: Tensor, rank: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A0 = sqrt(S_r / s) V_r^T and B0 = U_r sqrt(S_r / s), where W = U S V^T (Eqs. 2 and 3).

    So s B0 A0 is the best rank-r approximation of W. Beyond `EXACT_UP_TO` the r components come
    from randomized subspace iteration (Halko et al. 2011), as the paper's fast SVD; the model's
    function is the same either way, since what A0 and B0 hold is what W loses.

    Args:
        weight: W, (m, n), fp32 or fp64.
        rank: r <= min(m, n).
        scale: s = alpha / r of the adapter.
        seed: of the randomized decomposition; torch's global generator is left alone.

    Returns:
        A0 (r, n) and B0 (m, r).
    """
    short = min(weight.shape)
    if short <= EXACT_UP_TO:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = seeded_svd(weight, min(rank + PISSA_OVERSAMPLING, short), PISSA_ITERATIONS, seed)
        Vh = V.T
    signed = signs(Vh[:rank].T) * (S[:rank] / scale).sqrt()
    return signed[:, None] * Vh[:rank], U[:, :rank] * signed


def signs(columns: Tensor) -> Tensor:
    """1 or -1 for each column, (r,), so that times it the column's largest entry is positive.

    A decomposition leaves the signs of singular vectors open, and which it takes depends on the
    last bit of its input: on how a batch was cut, for a gradient.
    """
    largest = columns.abs().argmax(0, keepdim=True)
    return columns.gather(0, largest)[0].sign()


def seeded_svd(
    matrix: Tensor, size: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.svd_lowrank` as a function of its arguments alone: U (m, size), S, V (n, size)."""
    on_cuda = matrix.device.type == "cuda"
    with torch.random.fork_rng(devices=[matrix.device] if on_cuda else []):
        generator = torch.cuda if on_cuda else torch.default_generator
        generator.manual_seed(seed)
        return torch.svd_lowrank(matrix, q=size, niter=iterations)


GAMMA = 16.0
LORA_GA_OVERSAMPLING, LORA_GA_ITERATIONS = 4, 4


def lora_ga(gradient: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A0 = c V[1..r]^T and B0 = c U[r+1..2r] with c = m^(1/4) / sqrt(GAMMA), where G = U S V^T.

    With A0 and B0 from different components, r for the rows and r for the columns, the first step
    of the adapter is the best approximation of rank 2r of the full gradient's step (Theorem 3.1);
    c keeps the size of the output independent of that of the layer (Section 3.3). The largest
    entry of each component is positive.

    Args:
        gradient: G = dL/dW, the mean over some samples, (m, n); its scale plays no part.
        rank: r <= min(m, n) / 2.
        seed: of the randomized decomposition.

    Returns:
        A0 (r, n) and B0 (m, r).
    """
    m = gradient.shape[0]
    size = min(LORA_GA_OVERSAMPLING * rank, *gradient.shape)
    U, _, V = seeded_svd(gradient, size, LORA_GA_ITERATIONS, seed)
    c = m**0.25 / GAMMA**0.5
    V, U = V[:, :rank], U[:, rank : 2 * rank]
    return c * (V * signs(V)).T, c * (U * signs(U))
