"""narrow: weights in 8 bits, and adapters on them that act as on the same weights in floats."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bilora_diffusion import adapters, inits
from bilora_diffusion.adapters import PRIMARY, AdapterSpec
from bilora_diffusion.adapters.access import is_quantized
from bilora_diffusion.adapters.fused import fuse
from bilora_diffusion.adapters.narrow import KINDS
from bilora_diffusion.adapters.quantize import dequantized, held_bytes, quantize
from bilora_diffusion.errors import UserError
from bilora_diffusion.train.empty import empty
from tests.adapters.test_fused import TOLERANCE, assert_same, results
from tests.adapters.test_quantize import adapt, linear

each_kind = pytest.mark.parametrize("kind", KINDS)
LARGEST_ERROR = {"int8": 0.5 / 127, "fp8": 2**-4}
"""Of a number, as a share of its row's largest (int8) or of itself (fp8: three bits behind the
point)."""


def pair(kind: str, dtype: torch.dtype = torch.float64, dora: bool = False) -> list[nn.Module]:
    """A layer with both adapters over a weight in 8 bits, and over the same numbers in floats."""
    narrow, plain = linear(dtype), linear(dtype)
    assert quantize(narrow, kind, dtype) == 1
    cast(Any, plain[0]).weight.data = dequantized(narrow[0])
    return [adapt(model, dora) for model in (narrow, plain)]


@each_kind
def test_a_weight_takes_a_byte_and_is_rounded_by_rows(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 40)
    layer.weight.data[3] *= 1000
    layer.weight.data[5] = 0
    weight, model = layer.weight.detach().clone(), nn.Sequential(layer)
    quantize(model, kind, torch.float32)
    assert is_quantized(model[0])
    assert held_bytes(model, "none") - layer.bias.nbytes == 300 * 40 + 4 * 40
    error = (dequantized(model[0]) - weight).abs()
    size = weight.abs().amax(1, keepdim=True) if kind == "int8" else weight.abs()
    floor = 0 if kind == "int8" else weight.abs().amax(1, keepdim=True) / 448 * 2**-10
    assert bool((error <= LARGEST_ERROR[kind] * size + floor + 1e-9).all())
    assert 1e-3 < float(error.norm() / weight.norm()) < 0.03
    assert not [p for p in model.parameters() if p.dim() == 2]


@each_kind
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_act_as_on_the_dequantized_weight(kind: str, dora: bool) -> None:
    narrow, plain = pair(kind, dora=dora)
    x = torch.randn(2, 5, 96, dtype=torch.float64)
    expected = results(plain, x)
    assert_same(results(narrow, x), expected, TOLERANCE[torch.float64])
    fuse(narrow)
    assert_same(results(narrow, x), expected, TOLERANCE[torch.float64])


@each_kind
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_a_plain_layer(kind: str, own: torch.dtype) -> None:
    narrow, plain = pair(kind, torch.float32)
    x = torch.randn(5, 96, dtype=own)
    for model in (narrow, plain):
        fuse(model)
    expected = results(plain, x, torch.bfloat16)
    assert_same(results(narrow, x, torch.bfloat16), expected, TOLERANCE[torch.bfloat16])


@each_kind
def test_no_wide_weight_waits_for_backward(kind: str) -> None:
    (narrow, _), kept = pair(kind, torch.float32), []
    fuse(narrow)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        narrow(torch.randn(3, 96, requires_grad=True))
    assert [t.dtype for t in kept if t.shape == (80, 96)] == [KINDS[kind][0]]


@each_kind
def test_what_can_not_be_done_is_refused(kind: str) -> None:
    model = pair(kind, torch.float32)[0]
    with pytest.raises(UserError, match="weight of 0 is quantized"):
        adapters.merge_primary(model)
    with pytest.raises(UserError, match="quantized and have no rows"):
        adapters.base_rows(adapters.layers(model, PRIMARY)[0][1])
    fresh, spec = linear(), AdapterSpec(rank=2, target_modules=("0",), init="pissa")
    quantize(fresh, kind, torch.float32)
    adapters.inject(fresh, spec)
    with pytest.raises(UserError, match='weight of 0 is quantized, so init "pissa"'):
        inits.prepare(fresh, spec)


@each_kind
def test_its_bytes_are_known_before(kind: str) -> None:
    real, bare = linear(torch.bfloat16), empty(linear, torch.bfloat16)
    expected = held_bytes(bare, kind)
    quantize(real, kind, torch.bfloat16)
    assert expected == held_bytes(real, "none")
