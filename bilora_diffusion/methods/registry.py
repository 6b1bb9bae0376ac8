"""The methods by name, what each of them reads, and the one that a run's configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from ..core.errors import UserError, did_you_mean
from ..core.values import AUTO
from .base import Method
from .options import MethodOptions

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: M) -> M:
        if name in _METHODS:
            raise ValueError(
                f'A method "{name}" is registered already: {_METHODS[name].__qualname__}.'
            )
        cls.name = name
        # Of the class itself: a subclass of another method would else have its title.
        cls.title = cls.__dict__.get("title") or name
        if cls.own_options is not None:
            cls.reads |= {field.name for field in fields(cls.own_options)}
        _METHODS[name] = cls
        return cls

    return add


def create(name: str, options: MethodOptions | None = None) -> Method:
    """A new method by name.

    Raises:
        UserError: no such method, or one that can't follow the radius.
    """
    method = get(name)
    check_rho(name, options and options.rho)
    return method(options)


def get(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UserError: no such method.
    """
    if name not in _METHODS:
        hint = did_you_mean(name, _METHODS)
        raise UserError(f'method is "{name}"{hint}; use one of {", ".join(names())}.')
    return _METHODS[name]


def names() -> tuple[str, ...]:
    """The names of all registered methods, in order of registration."""
    return tuple(_METHODS)


def reads(name: str) -> frozenset[str]:
    """The fields of `MethodOptions` that make a difference to a method."""
    return _METHODS[name].reads


def check_rho(name: str, rho: float | str | None) -> None:
    """Refuse a radius that is to set itself where the method can't.

    Raises:
        UserError: it names the method.
    """
    # A method whose radius can set itself also reads the rise of the loss that it aims at. One that
    # reads no radius leaves it alone, so that recipes can be shared.
    if rho == AUTO and reads(name) & {"rho", "loss_rise"} == {"rho"}:
        raise UserError(f"rho is {AUTO}, which only bilora can follow: give {name} a number.")


def default_rho(name: str, modality: str = "image") -> float | None:
    """A method's own radius, None for one without a radius or an unknown one."""
    method = _METHODS.get(name)
    if method is None or "rho" not in method.reads:
        return None
    if modality == "text" and method.default_text_rho is not None:
        return method.default_text_rho
    return method.default_rho


def default_options(method: type[Method]) -> dict[str, Any]:
    """The options that a method reads, with their defaults."""
    defaults: dict[str, Any] = {}
    groups: list[Any] = [MethodOptions]
    if method.own_options is not None:
        groups.append(method.own_options)
    for group in groups:
        for field in fields(group):
            defaults[field.name] = field.default
    return {name: defaults[name] for name in sorted(method.reads)}


def option_names() -> frozenset[str]:
    """The options that make a difference to some method."""
    names: set[str] = set()
    for method in _METHODS.values():
        names |= method.reads
    return frozenset(names)


def for_run(values: Mapping[str, Any], num_steps: int, sample_names: Sequence[str] = ()) -> Method:
    """The method that a run's configuration names, with its options.

    Args:
        values: of a `RunConfig`'s fields, by name.
        num_steps: optimizer steps of the whole run.
        sample_names: of the training samples.
    """
    method = get(values["method"])
    settings = None
    if method.own_options is not None:
        settings = method.own_options(**_values_of(method.own_options, values))
    options = _values_of(MethodOptions, values)
    options |= {"num_steps": num_steps, "sample_names": tuple(sample_names), "settings": settings}
    return method(MethodOptions(**options))


def _values_of(group: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are fields of a dataclass."""
    return {field.name: values[field.name] for field in fields(group) if field.name in values}
