"""Run train_text_bilora.py under FSDP2 on CPU processes, once per command line; for torchrun.

    fsdp_on_cpu.py COMMAND_LINES.json    # [[flag, ...], ...]

accelerate 1.15 creates the FSDP plugin from ACCELERATE_USE_FSDP, but uses DDP on CPUs. This script
sets accelerate's state to FSDP, as on every other device. Everything else is the code of accelerate
and torch.
"""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

SHARES: list[float] = []
"""Share of the frozen weights that this process keeps, for each run."""
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def allow_fsdp_on_cpus() -> None:
    """Make accelerate use FSDP2 on CPUs too if it was launched with it."""
    from bilora_diffusion.config import machine

    launch = machine.launch
    machine.launch = lambda: {**launch(), "engine": "FSDP2"}
    original = AcceleratorState.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialise


def note_shares() -> None:
    """Record in `SHARES` the share of the frozen weights that this process keeps in each run."""
    from bilora_diffusion.train import engine

    original = engine.prepare

    def prepare(accelerator: Any, module: Any, *args: Any) -> Any:
        sharded_module = original(accelerator, module, *args)
        local_count = 0
        count = 0
        for parameter in module.parameters():
            if not parameter.requires_grad:
                # A sharded parameter is a DTensor, whose numel() counts all processes' values.
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                local_count += local.numel()
                count += parameter.numel()
        SHARES.append(local_count / count)
        return sharded_module

    engine.prepare = prepare


def run(argv: list[str]) -> None:
    """Train once with a new engine, in a process group that is kept for the next run."""
    from bilora_diffusion.text.script import train

    if AcceleratorState._shared_state:
        # The processes must start together: a late one would find the folder of the first one.
        PartialState().wait_for_everyone()
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    train(argv)


if __name__ == "__main__":
    allow_fsdp_on_cpus()
    note_shares()
    # The end of a run would destroy the process group, which the next run needs.
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None
    command_lines = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for command_line in command_lines:
        run(command_line)
    # Half of an untied model; more of T5, since its tied embedding is not sharded.
    assert len(SHARES) == len(command_lines), SHARES
    assert max(SHARES) < 0.62, SHARES
    assert abs(min(SHARES) - 0.5) < 0.02, SHARES
    end(Accelerator())
