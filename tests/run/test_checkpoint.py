"""Checkpoints come back bit for bit, whatever the optimizer."""

from __future__ import annotations

import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prodigyopt import Prodigy
from torch import Tensor, nn

from bilora_diffusion.errors import UserError
from bilora_diffusion.run import checkpoint, digests
from bilora_diffusion.run.checkpoint import Checkpoint, load, resolve
from tests.run.checkpoints import same, save

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
)


@st.composite
def tensor(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    bits = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=bits).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=bits)
    return raw.view(dtype).reshape(shape)  # any bit pattern: NaN payloads, subnormals, -0


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["$", "tensor", float("inf"), -0.0, 5e-324])
    | tensor()
)
keys = st.integers() | st.text(max_size=4) | st.sampled_from(["$", "a/b", "a", "__metadata__"])
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=12,
)
states = st.dictionaries(st.text(max_size=5), values, max_size=4)
empty: dict[str, Any] = {"optimizer": {}, "scheduler": {}, "scaler": None, "extra": {}}
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.dictionaries(names.filter(lambda n: n != "__metadata__"), tensor(), max_size=3),
    optimizer=states,
    scheduler=states,
    scaler=st.none() | states,
    extra=states,
    step=st.integers(0, 10**9),
)
def test_whatever_is_saved_comes_back_exactly(step: int, **parts: Any) -> None:
    with TemporaryDirectory() as folder:
        found = load(checkpoint.save(Path(folder), step, **parts))
    assert found.step == step
    assert set(found.tensors) == set(parts["tensors"])
    assert all(same(found.tensors[name], value) for name, value in parts["tensors"].items())
    for name in ("optimizer", "scheduler", "scaler", "extra"):
        assert same(getattr(found, name), parts[name]), name


atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
kinds = st.sampled_from(["tensor", "tuple", "float", "dict", "OrderedDict", "Counter", "odd"])
anything = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.fixed_dictionaries({"$": st.tuples(kinds, inner) | inner})
    ),
    max_leaves=10,
)
PARTS = ("step", "optimizer", "scheduler", "scaler", "extra")
deep = st.integers(1, 3000).map(lambda depth: b"[" * depth + b"]" * depth)
written = (
    st.binary(max_size=50)
    | deep
    | anything.map(json.dumps).map(str.encode)
    | st.fixed_dictionaries({}, optional=dict.fromkeys(PARTS, anything))
    .map(lambda changes: json.dumps({**STATE, **changes}))
    .map(str.encode)
)
STATE = {"step": 3, "optimizer": {}, "scheduler": {}, "scaler": None, "extra": {}}


@settings(max_examples=300)
@given(written)
def test_whatever_the_state_file_holds_it_is_read_or_refused_in_a_sentence(data: bytes) -> None:
    """Sealed anew, so that it is not refused for its digest alone."""
    with TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), 3, tensors={}, **empty)
        (path / "state.json").write_bytes(data)
        digests.seal(path, checkpoint.FILES)
        try:
            found = load(path)
        except UserError:
            return
    assert type(found.step) is int
    assert all(isinstance(part, dict) for part in (found.optimizer, found.scheduler, found.extra))
    assert found.scaler is None or isinstance(found.scaler, dict)


@pytest.mark.parametrize(("part", "value"), [("step", "3"), ("optimizer", []), ("extra", None)])
def test_other_types_in_the_state_file_are_refused(tmp_path: Path, part: str, value: Any) -> None:
    path = checkpoint.save(tmp_path, 3, tensors={}, **empty)
    (path / "state.json").write_text(json.dumps({**STATE, part: value}))
    digests.seal(path, checkpoint.FILES)
    with pytest.raises(UserError, match="step-3 was altered: delete step-3"):
        load(path)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": parameters[:1], "name": "unet", "lr": 0.1 + 0.2},
        {"params": parameters[1:], "name": "auxiliary", "maximize": True, "weight_decay": 0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), amsgrad=True)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1 / 3, momentum=0.9, nesterov=True)


def prodigy(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Prodigy(parameters, lr=1.0, use_bias_correction=True, safeguard_warmup=True, slice_p=2)


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        noise = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = (
                torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype)
                + parameter.detach()
            )
        optimizer.step()


@pytest.mark.parametrize("make", [adamw, sgd, prodigy])
@settings(max_examples=6, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=2), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    before=st.integers(0, 3),
    zero=st.booleans(),
)
def test_optimizers_go_on_bit_for_bit(
    make: Callable[..., torch.optim.Optimizer],
    shapes: list[list[int]],
    dtype: torch.dtype,
    before: int,
    zero: bool,
) -> None:
    def start() -> list[nn.Parameter]:
        torch.manual_seed(0)
        fresh = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
        if zero:  # like B at the start: Prodigy then keeps a 0-d p0
            fresh[0].data.zero_()
        return fresh

    parameters = start()
    optimizer = make(parameters)
    train(parameters, optimizer, range(before))
    state = optimizer.state_dict()
    with TemporaryDirectory() as folder:
        tensors = {str(i): parameter for i, parameter in enumerate(parameters)}
        path = save(Path(folder), before, tensors=tensors, optimizer=state)
        found = load(path)
    assert same(found.optimizer, state)

    resumed = start()
    again = make(resumed)
    for i, parameter in enumerate(resumed):
        parameter.data.copy_(found.tensors[str(i)])
    again.load_state_dict(found.optimizer)
    train(parameters, optimizer, range(before, before + 4))
    train(resumed, again, range(before, before + 4))
    assert all(same(a.data, b.data) for a, b in zip(parameters, resumed, strict=True))
    assert same(again.state_dict(), optimizer.state_dict())


def test_state_of_an_8bit_optimizer(tmp_path: Path) -> None:
    qmap = torch.linspace(-1, 1, 256)  # one map for all parameters, as bitsandbytes has it
    state = {
        index: {
            "step": 7,
            "state1": torch.randint(0, 256, (64, 4), dtype=torch.uint8),
            "quantization": {
                "qmap": qmap,
                "absmax": torch.rand(4),
                "blocksize": 256,
                "offset": None,
            },
        }
        for index in range(2)
    }
    group = {"lr": 2e-4, "betas": (0.9, 0.999), "alpha": 0.0, "t_alpha": None, "params": [0, 1]}
    optimizer = {"state": state, "param_groups": [group]}
    found = load(save(tmp_path, optimizer=optimizer)).optimizer
    assert same(found, optimizer)
    maps = [found["state"][index]["quantization"]["qmap"] for index in range(2)]
    assert maps[0] is maps[1]


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "row": base[1], "across": base.t(), "empty": base[:0]}
    shared = {"state": {0: {"x": base[1], "y": base[1:], "z": base.expand(2, 3, 4)}}}
    found = load(save(tmp_path, tensors=tensors, optimizer=shared))
    assert all(same(found.tensors[name], value) for name, value in tensors.items())
    assert same(found.optimizer, shared)
    found.tensors["a"].zero_()
    assert same(found.tensors["b"], base)


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, value=3.0)
    found = load(path)
    with (path / checkpoint.ADAPTERS).open("r+b") as file:
        file.write(b"\0" * 200)
    assert torch.equal(found.tensors["unet.default.a"], torch.full((3, 2), 3.0))


@pytest.mark.parametrize(
    "value", [np.float64(1.0), {1}, object(), torch.float32, torch.eye(2).to_sparse()]
)
def test_what_cannot_come_back_exactly_is_refused(tmp_path: Path, value: Any) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError, match="extra/x"):
        save(tmp_path, 2, extra={"x": value})
    assert os.listdir(tmp_path / checkpoint.CHECKPOINTS) == ["step-1"]


class Run:
    """A tiny training run with an optimizer and a schedule."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
        self.optimizer = adamw(list(self.model.parameters()))
        schedule = torch.optim.lr_scheduler
        warmup = schedule.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 3))
        decay = schedule.MultiStepLR(self.optimizer, [2, 4], gamma=0.3)
        self.scheduler = schedule.SequentialLR(self.optimizer, [warmup, decay], [3])

    def go(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def save(self, folder: Path, step: int) -> Path:
        return save(
            folder,
            step,
            tensors=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
        )

    def restore(self, found: Checkpoint) -> None:
        self.model.load_state_dict(found.tensors)
        self.optimizer.load_state_dict(found.optimizer)
        self.scheduler.load_state_dict(found.scheduler)


@pytest.mark.parametrize("stop", [0, 2, 3, 6])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    whole = Run()
    whole.go(range(10))
    first = Run()
    first.go(range(stop))
    first.save(tmp_path, stop)
    second = Run()
    path = resolve(tmp_path, "latest")
    assert path is not None
    second.restore(load(path))
    second.go(range(stop, 10))
    assert same(dict(whole.model.state_dict()), dict(second.model.state_dict()))
    assert same(whole.optimizer.state_dict(), second.optimizer.state_dict())
    assert same(whole.scheduler.state_dict(), second.scheduler.state_dict())


def test_same_content_gives_same_bytes_readable_by_others(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    files = sorted(path.name for path in first.iterdir())
    assert files == ["adapters.safetensors", "digests.json", "optimizer.safetensors", "state.json"]
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert len({path.stat().st_mode for path in first.iterdir()}) == 1
