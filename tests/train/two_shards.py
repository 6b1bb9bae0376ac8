"""The ball over factors that FSDP2 has split over two processes, for torchrun: THIS_FILE FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bilora_diffusion.adapters import Factors
from bilora_diffusion.methods import ball


def main(folder: Path) -> None:
    """Write what this process sees as ``RANK.pt``."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    A, B = torch.randn(5, 6), torch.randn(7, 5)  # by row: 3 and 2, 4 and 3
    split_A, split_B = (distribute_tensor(t, mesh, [Shard(0)]) for t in (A, B))
    split = Factors("layer", split_A, split_B, 2.0)
    whole = Factors("layer", A.clone(), B.clone(), 2.0)
    norm = ball.frobenius_norm([split])
    projection = ball.project_([split], rho=0.05)
    expected = ball.project_([whole], rho=0.05)
    seen: dict[str, Tensor] = {
        "norm": norm,
        "whole_norm": expected.before,
        "before": projection.before,
        "after": ball.frobenius_norm([split]),
        "A": _gathered(split.A),
        "B": _gathered(split.B),
        "whole_A": whole.A,
        "whole_B": whole.B,
        "shares": _shares(split),
    }
    torch.save(seen, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def _gathered(tensor: Any) -> Tensor:
    return tensor.full_tensor()


def _shares(factors: Any) -> Tensor:
    """Rows of A and of B on each process, (2 factors, 2 processes)."""
    mine = torch.tensor([len(factors.A.to_local()), len(factors.B.to_local())])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    return torch.stack(both, dim=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
