"""Parameters that wait in the CPU's memory, with their optimizer's state, for steps that see them.

On CUDA copies run beside the computation: they are made on a stream of their own, from pinned
memory, and whoever uses a parameter waits for its own copy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Parking:
    """The places of some parameters, all of which begin in the CPU's memory.

    Args:
        device: where they are computed with.
        parks: False where they are there all along, and nothing is to be done.
    """

    def __init__(self, device: torch.device, parks: bool) -> None:
        self.device, self.parks = device, parks
        self._cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        self._homes: dict[tuple[nn.Parameter, str], Tensor] = {}
        self._away: dict[nn.Parameter, Any] = {}  # those on the device, with when they are there

    def expect(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to bring these to the device."""
        for parameter in parameters if self.parks else ():
            if parameter not in self._away:
                self._homes.setdefault((parameter, ""), parameter.data)
                parameter.data, self._away[parameter] = self._brought(parameter.data)

    def fetch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have these on the device for what is computed next."""
        self.expect(parameters)
        for parameter in parameters if self.parks else ():
            self._await(parameter.data, self._away[parameter])

    def fetch_state(self, optimizer: Optimizer) -> None:
        """Have the optimizer's state of all that are on the device there too."""
        for parameter, name, value in self._state(optimizer):
            copy, arrival = self._brought(value)
            self._await(copy, arrival)
            optimizer.state[parameter][name] = copy

    def park(self, optimizer: Optimizer) -> None:
        """Let all go home that are on the device, without gradients."""
        for parameter in self._away:
            parameter.grad = None
            parameter.data = self._home((parameter, ""), parameter.data)
        for parameter, name, value in self._state(optimizer):
            optimizer.state[parameter][name] = self._home((parameter, name), value)
        if self._cuda and self._away:  # what is read at home, by a checkpoint, has arrived
            torch.cuda.current_stream(self.device).synchronize()
        self._away.clear()

    def _state(self, optimizer: Optimizer) -> list[tuple[nn.Parameter, str, Tensor]]:
        pairs = [(p, optimizer.state[p]) for p in self._away if p in optimizer.state]
        return [(p, n, v) for p, own in pairs for n, v in own.items() if isinstance(v, Tensor)]

    def _brought(self, value: Tensor) -> tuple[Tensor, Any]:
        if not self._cuda:
            return value.to(self.device, copy=True), None
        with torch.cuda.stream(self._stream):
            copy = value.to(self.device, non_blocking=True)
            return copy, self._stream.record_event()

    def _await(self, value: Tensor, arrival: Any) -> None:
        if arrival is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrival)
            value.record_stream(stream)

    def _home(self, key: tuple[nn.Parameter, str], value: Tensor) -> Tensor:
        home = self._homes.get(key)
        if home is None or (self._cuda and not home.is_pinned()):
            home = torch.empty_like(value, device="cpu", pin_memory=self._cuda)
            self._homes[key] = home
        return home.copy_(value, non_blocking=True)
