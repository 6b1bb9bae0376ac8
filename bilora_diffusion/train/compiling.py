"""``--compile``: a model's repeated blocks, compiled in place with the adapters inside.

Only training steps run compiled. What is measured, drawn and exported goes through the blocks as
they are, so that it is to the bit what the same weights give without ``--compile``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from ..core.errors import TrainingError, reason
from ..core.files import counted, duration

BACKEND = "inductor"
MAX_GRAPHS = 64
"""So many graphs at most; blocks that need more run as they are, of which PyTorch warns."""
logger = logging.getLogger(__name__)


class Blocks:
    """The repeated blocks of some models, compiled in place.

    Names, weights and adapters stay where they are. A graph is made for each size of block and of
    input and for each state of the adapters when it is first met, never one for many sizes: so it
    does not depend on what came before, and a resumed run computes as the whole one does.

    Args:
        models: of which those of diffusers are compiled; none where nothing is to be.

    Attributes:
        count: how many blocks are compiled.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.count = 0
        if not models:
            return
        import torch._dynamo as dynamo  # takes a second, which only those who compile wait for

        # Beyond this limit, 8 by default, dynamo runs a block uncompiled. Each bucket's size and
        # each state of the adapters is a graph.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MAX_GRAPHS)
        # DDP's gradients travel between blocks anyway, so that no graph need be cut for them.
        dynamo.config.optimize_ddp = False
        settings: dict[str, Any] = {"backend": BACKEND}
        if BACKEND == "inductor":
            # Dropout is to see the random numbers that it sees without compilation.
            settings = {"options": {"fallback_random": True}}
        for model in cast(Any, models):
            if hasattr(model, "compile_repeated_blocks"):
                # Some classes of diffusers name no repeated blocks. Those that may not be split
                # over devices are the same ones.
                if not model._repeated_blocks:
                    model._repeated_blocks = model._no_split_modules
                model.compile_repeated_blocks(dynamic=False, **settings)
            for module in model.modules():
                self.count += module._compiled_call_impl is not None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a training step, which may compile: says how long that took.

        Raises:
            TrainingError: PyTorch could not compile.
        """
        if not self.count:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import CppCompileError

        # The counters are the process's: what a step adds to them is its own.
        graphs_before, seconds_before = _compiled()
        try:
            yield
        except (TorchDynamoException, CppCompileError) as error:
            raise TrainingError(
                f"--compile failed at step {number}, leave it out: {reason(error)}"
            ) from error
        graphs, seconds = _compiled()
        if graphs > graphs_before:
            logger.info(
                "step %d: compiled %d blocks in %s, to %s",
                number,
                self.count,
                duration(seconds - seconds_before),
                counted(graphs - graphs_before, "graph"),
            )


def _compiled() -> tuple[int, float]:
    """Graphs that this process has compiled so far, and the seconds that it took."""
    from torch._dynamo.utils import calculate_time_spent, counters

    return counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]
