"""quantize: weights that are really held in 4 bits, and adapters on them that act as on floats."""

from __future__ import annotations

import copy
import importlib.util
import sys
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilora_diffusion import adapters
from bilora_diffusion.adapters import AUXILIARY, PRIMARY, AdapterSpec
from bilora_diffusion.adapters.access import is_quantized
from bilora_diffusion.adapters.fused import fuse, unfused
from bilora_diffusion.adapters.quantize import KEPT, dequantized, quantize
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.config import parse
from bilora_diffusion.methods import MethodOptions, Target, create
from bilora_diffusion.train.task import precision
from tests.adapters.test_fused import BOTH, TOLERANCE, assert_same, results
from tests.contract.models import tiny_t5, tiny_unet

INPUTS, OUTPUTS = 96, 80  # a row is one block of 64 and a half


def linear(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, OUTPUTS).to(dtype))


def four_bit(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = linear(dtype)
    quantize(model, "nf4", dtype)
    return model


def rounded(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The model as 4 bits make it, with ordinary weights."""
    model = linear(dtype)
    cast(Any, model[0]).weight.data = dequantized(four_bit(dtype)[0])
    return model


def adapt(model: nn.Module, dora: bool = False, filled: bool = True) -> nn.Module:
    """Both adapters on layer "0", the same values each time."""
    torch.manual_seed(1)
    for name in BOTH:
        spec = AdapterSpec(rank=3, target_modules=("0",), use_dora=dora and name == PRIMARY)
        adapters.inject(model, spec, name)
        for parameter in adapters.parameters(model, name) if filled else ():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3)
    adapters.activate(model, BOTH)
    return model


def held(weight: Any) -> int:
    """Bytes of a 4-bit weight with its two levels of scales, without the two code tables."""
    state = weight.quant_state
    parts = (weight, state.absmax, state.offset, state.state2.absmax)
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_takes_half_a_byte_and_is_9_percent_off(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 640), nn.LayerNorm(640), nn.Linear(640, 32)).to(dtype)
    nn.init.normal_(cast(Tensor, model[0].weight))
    original = copy.deepcopy(model)
    assert quantize(model, "nf4", dtype) == 2
    layer = cast(Any, model[0])
    assert isinstance(model[0], Linear4bit)
    assert is_quantized(layer)
    assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.uint8, False)
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.weight.quant_state.state2 is not None
    # 4 bits, 8 for each 64 weights, 32 for each 256 of these
    assert held(layer.weight) * 8 / (512 * 640) == pytest.approx(4.127, abs=2e-3)
    weight = cast(Any, original[0]).weight.detach()
    assert dequantized(layer).dtype == dtype
    error = (dequantized(layer) - weight).norm() / weight.norm()
    assert 0.085 < float(error) < 0.1  # of normally distributed weights
    assert torch.equal(layer.bias, cast(Any, original[0]).bias)
    assert type(model[1]) is nn.LayerNorm
    assert precision(model) == dtype


def test_float_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(cast(Any, layer).weight) for layer in model]
    alive: list[int] = []
    real = functional.quantize_4bit

    def counted(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(weight() is not None for weight in weights))
        return real(*args, **kwargs)

    monkeypatch.setattr(functional, "quantize_4bit", counted)
    quantize(model, "nf4", torch.float32)
    assert alive == [4, 3, 2, 1]


def test_what_is_left_alone() -> None:
    t5, unet = tiny_t5(), tiny_unet()
    head = cast(Any, t5).lm_head
    quantize(t5, "nf4", torch.float32)
    quantize(unet, "nf4", torch.float32)
    assert cast(Any, t5).lm_head is head
    for model, names in ((t5, ("wo", "lm_head")), (unet, KEPT)):
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                assert is_quantized(module) == (not set(names) & set(path.split("."))), path
    model = nn.ModuleDict({"a": linear(), "b": linear(), "c": nn.MultiheadAttention(8, 2)})
    assert quantize(model, "nf4", torch.float32, skip=("b.0",)) == 1
    assert [path for path, m in model.named_modules() if is_quantized(m)] == ["a.0"]


def test_a_layer_in_two_places_stays_one_and_copies_are_quantized_too() -> None:
    layer = linear()[0]
    model: Any = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    assert quantize(model, "nf4", torch.float32) == 1
    assert model["a"] is model["b"][0]
    assert is_quantized(model["a"])
    twin, x = copy.deepcopy(model["b"]), torch.randn(2, INPUTS)
    assert torch.equal(twin(x), model["b"](x))
    assert twin[0].weight.quant_state is not model["a"].weight.quant_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("active", [BOTH, BOTH[::-1], (PRIMARY,), (AUXILIARY,)], ids="-".join)
def test_adapters_act_as_on_the_rounded_weight_fused_or_not(
    active: tuple[str, ...], dora: bool, dtype: torch.dtype
) -> None:
    model, plain = (adapt(make(dtype), dora) for make in (four_bit, rounded))
    assert {p.dtype for p in adapters.parameters(model, PRIMARY)} == {torch.float32}
    for name, value in adapters.named_parameters(plain, PRIMARY).items():
        assert torch.equal(adapters.named_parameters(model, PRIMARY)[name], value)
    for each in (model, plain):
        adapters.activate(each, active)
    x = torch.randn(2, 5, INPUTS, dtype=dtype)
    expected = results(plain, x)
    assert_same(results(model, x), expected, TOLERANCE[dtype])
    assert fuse(model) == 1
    assert_same(results(model, x), expected, TOLERANCE[dtype])
    assert type(cast(Any, model)[0]).__name__ == "FusedLinear4bit"
    with unfused(model):
        assert type(cast(Any, model)[0]).__name__ == "Linear4bit"


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_is_pefts_forward_under_autocast(x_dtype: torch.dtype) -> None:
    model, x = adapt(four_bit(torch.bfloat16)), torch.randn(5, INPUTS, dtype=x_dtype)
    expected = results(model, x, torch.bfloat16)
    plain = results(adapt(rounded(torch.bfloat16)), x, torch.bfloat16)
    fuse(model)
    found = results(model, x, torch.bfloat16)
    assert_same(found, plain, TOLERANCE[torch.bfloat16])  # dtypes are those of a float layer
    expected["output"] = expected["output"].to(torch.bfloat16)
    assert_same(found, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_dora_starts_exactly_as_its_base(
    autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT asks for CUDA's autocast; here it is told of the CPU's.
    real = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": real(kind))
    model = adapt(four_bit(torch.bfloat16), dora=True, filled=False)
    fuse(model)
    x = torch.randn(5, INPUTS, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        assert torch.equal(model(x), cast(Any, model)[0].base_layer(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 64), nn.Linear(64, 8)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        inner: Callable[[Tensor], Tensor] = lambda x: torch.tanh(self.first(x))  # noqa: E731
        hidden = checkpoint(inner, x, use_reentrant=False) if self.checkpointing else inner(x)
        return self.last(cast(Tensor, hidden))


def train(
    checkpointing: bool, look: Callable[[nn.Module], Any] = lambda model: None
) -> list[float]:
    """The losses of three steps of Bi-LoRA on 4-bit weights; `look` is called after each."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, INPUTS)
    model.checkpointing = checkpointing
    quantize(model, "nf4", torch.float32)
    method = create("bilora", MethodOptions(rho=0.1))
    spec = AdapterSpec(rank=2, target_modules=("first", "last"))
    optimizer = torch.optim.AdamW(method.setup([Target("model", model, spec, lr=1e-2)]))
    method.bind(optimizer)

    def forward_backward() -> Tensor:
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss.detach()

    losses = []
    for _ in range(3):
        losses.append(float(method.step(forward_backward, optimizer)))
        with torch.no_grad(), method.evaluating():
            look(model)
    return losses


def test_checkpointing_and_evaluations_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = train(checkpointing=False)
    assert losses[2] < losses[1] < losses[0]
    assert train(checkpointing=True) == losses
    # as on a CPU with AVX512-BF16, where an evaluation repacks the weights unless it is told not
    # to; repacked, they would pass no gradient on
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)

    def evaluate(model: nn.Module) -> None:
        model.eval()
        model(torch.randn(2, INPUTS))
        model.train()

    assert train(checkpointing=False, look=evaluate) == losses


def test_what_can_not_be_done_is_refused() -> None:
    model = adapt(four_bit())
    with pytest.raises(UserError, match="weight of 0 is quantized"):
        adapters.merge_primary(model)
    assert adapters.names(model) == BOTH
    with pytest.raises(UserError, match="quantized and have no rows"):
        adapters.base_rows(adapters.layers(model, PRIMARY)[0][1])
    with pytest.raises(UserError, match="has the adapters default"):
        quantize(model, "nf4", torch.float32)
    with pytest.raises(UserError, match="no linear layer"):
        quantize(linear(), "nf4", torch.float32, skip=("0",))


def test_without_bitsandbytes_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    lacks = lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lacks)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for refuse in (
        lambda: parse(["--dataset", "mini", "--quantize", "nf4"]),
        lambda: quantize(linear(), "nf4", torch.float32),
    ):
        with pytest.raises(UserError, match=r"pip install.*bitsandbytes"):
            refuse()


@pytest.mark.slow
def test_the_layers_that_are_kept_are_worth_it() -> None:
    """What the comment on `KEPT` says about the miniature."""
    from bilora_diffusion.image.pipeline import load_pipeline
    from bilora_diffusion.image.prompts import embed

    pipeline: Any = load_pipeline("mini", dtype=torch.float32)
    text = embed(pipeline, ["a TOK icon, in the style of TOK", "a ToK icon of a rabbit", "", "sun"])
    unet = pipeline.unet
    torch.manual_seed(0)
    noisy, times = torch.randn(4, unet.config.in_channels, 8, 8), torch.tensor([100, 400, 700, 950])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4)
    conditions = {"text_embeds": text["pooled"], "time_ids": sizes}

    @torch.no_grad()
    def predict(model: Any) -> Tensor:
        return model(noisy, times, text["sequence"], added_cond_kwargs=conditions).sample

    exact, errors = predict(unet), []
    for skip in ((), KEPT):
        model = copy.deepcopy(unet)
        quantize(model, "nf4", torch.float32, skip=skip)
        errors.append(float((predict(model) - exact).norm() / exact.norm()))
    assert errors[1] < 0.7 * errors[0] < 0.03
    weights = {n: m.weight.numel() for n, m in unet.named_modules() if type(m) is nn.Linear}
    kept = sum(count for name, count in weights.items() if set(KEPT) & set(name.split(".")))
    assert kept / sum(weights.values()) < 0.13
