"""Train every method in two processes on the CPU.

torchrun --nproc_per_node 2 tests/contract/two_processes.py FOLDER
"""

import sys
from pathlib import Path

import torch

from tests.contract.harness import rotation, sgd_run


def main(folder: Path) -> None:
    """Train each case of the rotation and write its tensors to `METHOD-FORM-KIND.pt`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for name, adapter_form, kind in rotation():
        run = sgd_run(name, adapter_form, kind).share()
        run.train()
        if torch.distributed.get_rank() == 0:
            torch.save(run.tensors(), folder / f"{name}-{adapter_form}-{kind}.pt")
        del run
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
