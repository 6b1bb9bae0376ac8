"""`--compile` is refused where PyTorch would find no compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.config import resolve

COMPILED = ["--dataset", "mini", "--compile"]


@pytest.mark.parametrize(
    ("kind", "lacks", "pattern"),
    [
        ("cuda", {"missing": frozenset({"triton"})}, "--compile needs.*pip install triton"),
        ("cuda", {"compilers": ("g++",)}, "a C compiler.*no gcc.*apt-get install gcc"),
        ("cpu", {"compilers": ("gcc",)}, r"a C\+\+ compiler.*no g\+\+"),
        ("cpu", {"headers": False}, "Python's headers.*apt-get install python3-dev"),
    ],
)
def test_what_compiling_needs(
    kind: str, lacks: dict[str, Any], pattern: str, machine: Callable[..., None]
) -> None:
    machine(kind, **lacks)
    with pytest.raises(UserError, match=pattern):
        resolve(COMPILED)


@pytest.mark.parametrize(("kind", "compiler"), [("cuda", "clang"), ("cpu", "g++")])
def test_one_compiler_is_enough(kind: str, compiler: str, machine: Callable[..., None]) -> None:
    machine(kind, compilers=(compiler,))
    assert resolve(COMPILED).compile


def test_another_compiler_may_be_named(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "clang++-19")
    machine("cpu", compilers=("g++",))
    with pytest.raises(UserError, match=r"no clang\+\+-19 here"):
        resolve(COMPILED)
    machine("cpu", compilers=("clang++-19",))
    assert resolve(COMPILED).compile
