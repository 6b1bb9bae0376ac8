"""Checkpoints come back bit for bit, whatever is in them."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilora_diffusion.errors import UserError
from bilora_diffusion.run import checkpoint, digests
from bilora_diffusion.run.checkpoint import load
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
        found = load(save(Path(folder), step, **parts))
    assert found.step == step
    assert set(found.tensors) == set(parts["tensors"])
    assert all(same(found.tensors[name], value) for name, value in parts["tensors"].items())
    for name in ("optimizer", "scheduler", "scaler", "extra"):
        assert same(getattr(found, name), parts[name]), name


@pytest.mark.parametrize(
    "altered", ["[[", '{"step": 3}', '{"step": -1, "optimizer": {"$": ["tensor", "gone"]}}']
)
def test_a_state_that_no_version_wrote_is_refused_in_a_sentence(
    tmp_path: Path, altered: str
) -> None:
    path = save(tmp_path, 3)
    (path / "state.json").write_text(altered)
    digests.seal(path, checkpoint.FILES)  # so that it is not refused for its digest alone
    with pytest.raises(UserError, match="step-3 was altered: delete step-3"):
        load(path)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "row": base[1], "across": base.t(), "empty": base[:0]}
    shared = {"state": {0: {"x": base[1], "y": base[1:], "z": base.expand(2, 3, 4)}}}
    found = load(save(tmp_path, tensors=tensors, optimizer=shared))
    assert all(same(found.tensors[name], value) for name, value in tensors.items())
    assert same(found.optimizer, shared)
    found.tensors["a"].zero_()
    assert same(found.tensors["b"], base)
    qmap = torch.linspace(-1, 1, 256)  # one map for all parameters, as bitsandbytes has it
    state = load(save(tmp_path, optimizer={"state": [{"qmap": qmap}, {"qmap": qmap}]})).optimizer
    assert state["state"][0]["qmap"] is state["state"][1]["qmap"]


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


def test_same_content_gives_same_bytes_readable_by_others(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    files = sorted(path.name for path in first.iterdir())
    assert files == ["adapters.safetensors", "digests.json", "optimizer.safetensors", "state.json"]
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert len({path.stat().st_mode for path in first.iterdir()}) == 1
