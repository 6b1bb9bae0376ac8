"""Numbers beyond all range end in a sentence at once, whatever the option and the script."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, cast, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilora_diffusion import BiLoRAConfig
from bilora_diffusion.config import DreamBoothConfig, TextConfig, parse, parse_text
from bilora_diffusion.config.limits import LIMITS, check_one
from bilora_diffusion.errors import UserError
from bilora_diffusion.train.stepping import Remaining

SCRIPTS: dict[Any, tuple[Callable[[Sequence[str]], Any], list[str]]] = {
    DreamBoothConfig: (parse, ["--dataset", "mini"]),
    TextConfig: (parse_text, ["--model_name_or_path", "gpt2", "--task", "sst2"]),
}


def numbers(config: Any) -> list[str]:
    """Options whose type has a number in it."""
    hints = get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    return [n for n in names if {"int", "float"} & set(re.findall(r"\w+", str(hints[n])))]


@pytest.mark.parametrize("config", SCRIPTS)
def test_every_number_has_a_bound(config: Any) -> None:
    assert len(numbers(config)) > 30
    assert set(numbers(config)) <= set(LIMITS)


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("rank", "999999999999", "smaller side"),
        ("lora_alpha", "1e300", "alpha / rank"),
        ("resolution", "1000000000000", "34 GB"),
        ("repeats", "1000000000", "at once"),
        ("train_batch_size", "2000000", "device"),
        ("gradient_accumulation_steps", "2000000", "forward passes"),
        ("learning_rate", "1e30", "any weight"),
        ("seed", "18446744073709551616", "64 bits"),
        ("max_train_steps", "1000000000000000000", "three years"),
        ("rank", "1" * 400, "a number of 400 digits"),
        ("rank", "1" * 10_000, "whole number"),
        ("rank", "-" + "1" * 400, "0 or more"),
        ("rho", "-inf", "finite"),
        ("learning_rate", "1e-300", "32-bit"),
    ],
)
def test_a_number_beyond_all_range_is_a_sentence(flag: str, value: str, reason: str) -> None:
    for read, needed in SCRIPTS.values():
        if flag in ("resolution", "repeats") and read is parse_text:
            continue
        with pytest.raises(UserError, match=reason) as refusal:
            read([*needed, f"--{flag}={value}"])
        assert f"--{flag} is" in str(refusal.value)
        assert len(str(refusal.value)) < 250


def test_a_step_is_bounded_as_a_whole() -> None:
    argv = ["--dataset", "mini", "--train_batch_size=60000", "--gradient_accumulation_steps=60000"]
    with pytest.raises(UserError, match="samples a step"):
        parse(argv)


def test_the_longest_run_is_planned_without_a_list() -> None:
    plan = Remaining(3, 10**9, [(0,), (1,)])
    assert len(plan) == 2 * (10**9 - 3)
    assert (plan[0], plan[3], plan[len(plan) - 1]) == ((3, (0,)), (4, (1,)), (10**9 - 1, (1,)))
    assert list(Remaining(1, 3, [(0,), (1,)])) == [(1, (0,)), (1, (1,)), (2, (0,)), (2, (1,))]


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 10**12), ("alpha", 1e300), ("rho", float("inf")), ("dropout", float("nan"))],
)
def test_the_api_has_the_same_bounds(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name} is "):
        BiLoRAConfig(**cast(Any, {name: value}))
    with pytest.raises(UserError, match="rank is 'four': give a number"):
        check_one("rank", "four", "rank")


TEXTS = st.one_of(
    st.integers().map(str),
    st.integers(0, 400).map(lambda zeros: "1" + "0" * zeros),
    st.floats().map(str),
    st.text("0123456789eE+-._xinfa", max_size=12),
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_any_number_is_a_configuration_or_a_sentence(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(list(SCRIPTS)))
    names = data.draw(st.lists(st.sampled_from(numbers(config)), min_size=1, max_size=3))
    read, needed = SCRIPTS[config]
    with contextlib.suppress(UserError):
        read([*needed, *(f"--{name}={data.draw(TEXTS)}" for name in names)])
