"""The processes of a run: one, or those that torchrun started."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.distributed import init_distributed_device_so
from torch import distributed as dist

__all__ = ['Processes', 'start_processes']


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Args:
        device: Device of this process.
        rank: Number of this process; process 0 writes the run's files.
        world_size: Number of processes.
    """
    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def primary(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_) -> None:
        if self.distributed:
            dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """Process 0's value, on every process."""
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on every process."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up every process's tensor in place."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """The largest of every process's whole numbers."""
        if not self.distributed:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)


def start_processes(device: str | None = None) -> Processes:
    """Joins the processes that torchrun (or Slurm) started: nccl between GPUs, gloo between CPUs.

    Args:
        device: Kind of device; CUDA where there is one if None.

    Raises:
        ValueError: If the device is not there.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        info = init_distributed_device_so(device)
        return Processes(torch.device(info['device']), info['global_rank'], info['world_size'])
    except (AssertionError, RuntimeError) as e:
        raise ValueError(f'--device {device}: {" ".join(str(e).split())}') from e
