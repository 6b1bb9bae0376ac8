"""Models whose weights have a shape, a dtype and a device, and take no memory.

Their weights are PyTorch's fake tensors, which all operations take and answer with fake tensors;
whatever else there is (images, token ids, masks, noise) stays real. So a model's own code runs as
it would, as far as memory goes, and where it asks for a value, `train.memory.Ledger` makes one up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PACKED = frozenset({"quant_state", "bnb_quantized", "compress_statistics", "quant_type"})
"""What a 4-bit weight has beside its numbers."""
Model = TypeVar("Model", bound=nn.Module)


@functools.cache
def _mode() -> FakeTensorMode:
    # What is real may meet what is not.
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_weightless(value: Any) -> bool:
    """Whether a tensor takes no memory."""
    return isinstance(value, FakeTensor)


def empty(
    shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor of that shape which takes no memory."""
    # Not by an operation of the mode: it keeps weak references to what its operations give, with
    # which a parameter can't be moved.
    bare = torch.empty(shape, dtype=dtype, device="meta")
    return FakeTensor(_mode(), bare, torch.device(device))


def weightless(build: Callable[[], Model], dtype: torch.dtype) -> Model:
    """``build()`` in evaluation mode with frozen weights of a dtype on the CPU, without memory.

    What is no parameter, such as the frequencies of positions, is real. What its class keeps in
    fp32 is in fp32 here too.
    """
    with init_empty_weights():
        model = build()
    if tie := getattr(model, "tie_weights", None):
        tie()  # each use of a shared matrix was made empty on its own
    kept = _kept_whole(model, dtype)
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in made:  # a tied one stays tied
                whole = any(part in kept for part in f"{path}.{name}".split("."))
                wide = torch.float32 if whole else dtype
                own = wide if weight.is_floating_point() else weight.dtype
                made[id(weight)] = nn.Parameter(empty(weight.shape, own), requires_grad=False)
            module._parameters[name] = made[id(weight)]
        let_move(module)
    return model.eval()


def hide(model: nn.Module) -> None:
    """Let the real parameters of a weightless model, those of a new adapter, take no memory either.

    A model with weights stays as it is.
    """
    if not any(map(is_weightless, model.parameters())):
        return
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not is_weightless(weight):
                bare = empty(weight.shape, weight.dtype, weight.device)
                module._parameters[name] = nn.Parameter(bare, weight.requires_grad)
        let_move(module)


def _kept_whole(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Names of the parts that stay in fp32 when a model is loaded in half precision."""
    if dtype not in (torch.float16, torch.bfloat16):
        return frozenset()
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    # Transformers keeps these for fp16 alone, diffusers for both.
    if dtype == torch.float16 or type(model).__module__.startswith("diffusers."):
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return frozenset(names)


def let_move(module: nn.Module) -> None:
    """Let ``Module.to`` replace parameters, since it can't write into ones that take no memory."""

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(fn)
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            with torch.no_grad():
                moved = fn(weight)
            if moved is not weight:
                bare = empty(moved.shape, moved.dtype, moved.device)
                new = nn.Parameter(bare, weight.requires_grad)
                vars(new).update({key: vars(weight)[key] for key in PACKED & vars(weight).keys()})
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
        return module

    module.__dict__["_apply"] = apply
