"""What memory tensors take: every storage from its first tensor to its last, by what it is for.

A `Ledger` sees each operation of a phase. It counts real tensors as well as those of
`adapters.weightless`, so that a run without weights can be held against a real one.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..adapters.weightless import is_weightless

TEMPORARY = "temporary values"
ACTIVATIONS = "activations kept for backward"
aten = torch.ops.aten


@dataclass(frozen=True)
class Moment:
    """Bytes on a device at one time, by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Phase:
    """A phase of a run: its highest moment by kind of device, and the most that activations took,
    at the end of a forward pass.
    """

    name: str
    peaks: dict[str, Moment]
    activations: int


@dataclass
class _Storage:
    reference: Any
    size: int
    device: str
    part: str


class Ledger(TorchDispatchMode):
    """Live storages and the peak of each phase.

    Within a phase an operation that needs the values of a tensor without any gets true or one.
    Memory that an operation takes and gives back within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[Phase] = []
        self._known: dict[int, _Storage] = {}
        self._live: dict[str, Counter[str]] = {}
        self._sums: Counter[str] = Counter()
        self._peaks: dict[str, Moment] = {}
        self._highest: Counter[str] = Counter()
        self._activations = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the context every operation is seen; a phase within it is no part of it."""
        outer = self._peaks, self._highest, self._activations
        self._peaks, self._highest, self._activations = {}, Counter(), 0
        for device in self._live:
            self._look(device)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)
        with self, hooks:
            yield
        self.phases.append(Phase(name, self._peaks, self._activations))
        self._peaks, self._highest, self._activations = outer

    def hold(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors are for; those that were not seen count from now on."""
        for tensor in tensors:
            self._see(tensor)
            if (known := self._known.get(_key(tensor))) is not None:
                self._move(known, part)

    def claim(self, part: str) -> None:
        """Say what all that is left of temporary values is for."""
        gc.collect()
        for known in self._known.values():
            if known.part == TEMPORARY:
                self._move(known, part)

    def live(self, device: str) -> Moment:
        """What a kind of device holds now."""
        return Moment(dict(+self._live.get(device, Counter())))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MADE_UP and any(is_weightless(arg) for arg in tree_leaves(args)):
            return _MADE_UP[func](*args)
        if func is aten.index.Tensor and is_weightless(args[0]):
            args = (args[0], [place for index in args[1] for place in _places(index)])
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if func is aten._to_copy.default and out.device != args[0].device:
            known = self._known.get(_key(args[0]))
            if known is not None and (new := self._known.get(_key(out))) is not None:
                self._move(new, known.part)  # a copy elsewhere is for what it was for
        return out

    def _see(self, tensor: Tensor) -> None:
        device, key = tensor.device.type, _key(tensor)
        if device == "meta" or key in self._known:
            return
        storage = tensor.untyped_storage()
        reference = weakref.ref(storage, self._forgetter(key))
        known = _Storage(reference, storage.nbytes(), device, TEMPORARY)
        self._known[key] = known
        self._count(known, 1)
        if self._sums[device] > self._highest[device]:
            self._look(device)

    def _forgetter(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            if (known := self._known.pop(key, None)) is not None:
                self._count(known, -1)

        return forget

    def _count(self, known: _Storage, sign: int) -> None:
        parts = self._live.setdefault(known.device, Counter())
        parts[known.part] += sign * known.size
        self._sums[known.device] += sign * known.size

    def _move(self, known: _Storage, part: str) -> None:
        self._count(known, -1)
        known.part = part
        self._count(known, 1)

    def _look(self, device: str) -> None:
        self._peaks[device], self._highest[device] = self.live(device), self._sums[device]

    def _saved(self, tensor: Tensor) -> Tensor:
        known = self._known.get(_key(tensor))
        if known is not None and known.part == TEMPORARY:
            self._move(known, ACTIVATIONS)
            self._activations = max(self._activations, self._live[known.device][ACTIVATIONS])
        return tensor


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Everything that a model holds: weights, buffers, and the scales of 4-bit weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        state = getattr(tensor, "quant_state", None)
        for scales in filter(None, (state, getattr(state, "state2", None))):
            yield from (value for value in vars(scales).values() if isinstance(value, Tensor))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _places(index: Any) -> Sequence[Any]:
    """A mask as the numbers of its places along each dimension, of which there are as many as can
    be known; any other index as it is.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.bool:
        return (index,)
    mask = torch.ones(index.shape, dtype=torch.bool) if is_weightless(index) else index
    return mask.nonzero(as_tuple=True)


def _number(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


_MADE_UP: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _number,
    aten.equal.default: lambda *_: True,
    aten.nonzero.default: lambda mask: torch.ones(mask.shape, dtype=torch.bool).nonzero(),
}
