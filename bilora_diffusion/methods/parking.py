"""Parameters that wait in the CPU's memory, with their optimizer's state, for steps that see them.

On CUDA copies run beside the computation: they are made on a stream of their own, from pinned
memory, and whoever uses a parameter waits for its own copy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self._here: dict[nn.Parameter, Any] = {}  # on the device, with their copies' events

    def expect(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin to bring these to the device."""
        with torch.cuda.stream(self._stream):
            for parameter in parameters if self.parks else ():
                if parameter not in self._here:
                    parameter.data = self._brought(parameter.data)
                    self._here[parameter] = self._stream and self._stream.record_event()

    def fetch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have these on the device for what is computed next."""
        self.expect(parameters)
        for parameter in parameters if self._stream and self.parks else ():
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._here[parameter])
            parameter.data.record_stream(stream)

    def fetch_state(self, optimizer: Optimizer) -> None:
        """Have all that were expected on the device, and the optimizer's state of them too."""
        self.fetch([*self._here])
        self._move_state(optimizer, self._brought)

    def park(self, optimizer: Optimizer) -> None:
        """Let all go home that are on the device; they have no gradients any more."""
        for parameter in self._here:
            parameter.data = self._home(parameter.data)
        self._move_state(optimizer, self._home)
        if self._stream and self._here:  # what is read at home, by a checkpoint, has arrived
            torch.cuda.current_stream(self.device).synchronize()
        self._here.clear()

    def _move_state(self, optimizer: Optimizer, to: Callable[[Tensor], Tensor]) -> None:
        for parameter in self._here:
            state = optimizer.state.get(parameter, {})
            state.update({name: to(v) for name, v in state.items() if isinstance(v, Tensor)})

    def _brought(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=self._cuda, copy=True)

    def _home(self, value: Tensor) -> Tensor:
        pinned = torch.empty_like(value, device="cpu", pin_memory=self._cuda)
        return pinned.copy_(value, non_blocking=self._cuda)
