"""Registry of the methods by name, with the options that each method reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from ..core import removed
from ..core.errors import UserError, did_you_mean
from .base import Method
from .options import MethodOptions

# Classes by name, in order of registration.
_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Create a class decorator that registers a method under `name`.

    Raises:
        ValueError: the name is already taken.
    """

    def add(cls: M) -> M:
        if name in _METHODS:
            raise ValueError(
                f'A method "{name}" is already registered: {_METHODS[name].__qualname__}.'
            )
        cls.name = name
        # Use only the class's own title, since a base class may be another method.
        cls.title = cls.__dict__.get("title") or name
        _METHODS[name] = cls
        return cls

    return add


def create(name: str, options: MethodOptions | None = None) -> Method:
    """Create a method by name.

    Raises:
        UserError: there is no such method.
    """
    return get(name)(options)


def get(name: str) -> type[Method]:
    """Return the class of the method with this name.

    Raises:
        UserError: there is no such method.
    """
    removed.refuse_method(name)
    if name not in _METHODS:
        hint = did_you_mean(name, _METHODS)
        raise UserError(f'there is no method "{name}"{hint}: use one of {", ".join(names())}.')
    return _METHODS[name]


def names() -> tuple[str, ...]:
    """Return the names of all registered methods, in order of registration."""
    return tuple(_METHODS)


def reads(name: str) -> frozenset[str]:
    """Return the names of the options in `MethodFlags` that affect a method."""
    return _METHODS[name].reads


def default_options(method: type[Method]) -> dict[str, Any]:
    """Return the defaults of the options that a method reads, sorted by name."""
    defaults = {field.name: field.default for field in fields(MethodOptions)}
    return {name: defaults[name] for name in sorted(method.reads)}


def option_names() -> frozenset[str]:
    """Return the names of the options in `MethodFlags` that affect at least one method."""
    names: set[str] = set()
    for method in _METHODS.values():
        names |= method.reads
    return frozenset(names)


def for_run(values: Mapping[str, Any], num_steps: int) -> Method:
    """Create the method that a run's configuration names, with its options.

    Args:
        values: values of the fields of a `RunConfig`, by name.
        num_steps: optimizer steps of the whole run.
    """
    options: dict[str, Any] = {"num_steps": num_steps}
    for field in fields(MethodOptions):
        if field.name in values:
            options[field.name] = values[field.name]
    return create(values["method"], MethodOptions(**options))
