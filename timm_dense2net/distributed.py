"""The processes of a run: one, or those that torchrun started."""
from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import distributed as dist

from .errors import one_line

__all__ = ['Processes', 'find_device', 'start_processes']


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

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A block of process 0 alone: where it raises, the others exit without a word, as process 0 tells why.

        Raises:
            SystemExit: On the other processes, if the block failed on process 0.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.broadcast(failed) and not self.primary:
                raise SystemExit(1)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on every process."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor."""
        if not self.distributed:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total


def _agree_on_prefix(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that the processes of this start share and no earlier start of them has used.

    torchrun keeps one store over its restarts, and in it new processes would find the addresses of lost ones
    (https://github.com/pytorch/pytorch/issues/135712). So each process asks under a name of its own, and process 0
    answers until all have the answer; a question that a lost process left is answered in vain.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f'ask/{rank}', own)
        prefix = store.get(f'answer/{own}').decode()
        store.set(f'{prefix}/heard/{rank}', '')
        return prefix
    waiting = set(range(1, world_size))
    while waiting:
        for other in waiting:
            if store.check([f'ask/{other}']):
                store.set(f'answer/{store.get(f"ask/{other}").decode()}', own)
        waiting = {other for other in waiting if not store.check([f'{own}/heard/{other}'])}
        time.sleep(0.02)
    return own


def _restartable_rendezvous(url: str, **kwargs: Any) -> Iterator[tuple[dist.Store, int, int]]:
    store, rank, world_size = next(dist.rendezvous('env://', **kwargs))
    yield dist.PrefixStore(_agree_on_prefix(store, rank, world_size), store), rank, world_size


if dist.is_available():
    dist.register_rendezvous_handler('restartable', _restartable_rendezvous)


def find_device(device: str | None = None) -> torch.device:
    """The device of a name, CUDA where there is one if None.

    Raises:
        ValueError: If the device is not there.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.zeros(1, device=device).item()  # some are missed only when they are used
    except (AssertionError, RuntimeError) as e:
        raise ValueError(f'--device {device}: {one_line(e)}') from e
    return torch.device(device)


def start_processes(device: str | None = None) -> Processes:
    """Joins the processes that torchrun (or Slurm) started: nccl between GPUs, gloo between CPUs.

    Args:
        device: Kind of device; CUDA where there is one if None.

    Raises:
        ValueError: If the device is not there.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        info = init_distributed_device_so(
            device, dist_url='restartable://' if is_distributed_env() and dist.is_torchelastic_launched() else None)
    except (AssertionError, RuntimeError) as e:
        raise ValueError(f'--device {device}: {one_line(e)}') from e
    return Processes(find_device(info['device']), info['global_rank'], info['world_size'])
