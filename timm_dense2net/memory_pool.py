"""Memory of large tensors on a CPU, kept from one training step for the next.

What a process gives back to the system comes again page by page, each cleared first, which for what a dense block keeps
for its backward pass is a good part of a step. On other devices torch keeps memory by itself.
"""
import math
import weakref
from collections import defaultdict
from typing import Sequence

import torch
import torch.nn as nn

__all__ = ['MemoryPool', 'PoolOwner', 'pool_of']

# Smaller tensors are left to the C library, which does not give their memory back at once.
LARGE_BYTES = 1 << 20


class MemoryPool:
    """Makes tensors whose memory, once nothing refers to them any more, goes to the next ones of their size."""

    def __init__(self) -> None:
        self._free = defaultdict(list)

    def empty(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialized tensor of a shape, with the dtype and device of ``like``."""
        num_bytes = math.prod(shape) * like.element_size()
        if not self._is_for(like, num_bytes):
            return like.new_empty(shape)
        free = self._free[num_bytes]
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device='cpu')  # whatever the default device
        # The storage made from this array holds it for as long as any tensor, or autograd, holds the storage.
        array = memory.numpy()
        weakref.finalize(array, free.append, memory).atexit = False
        return torch.from_numpy(array).view(like.dtype).view(shape)

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """The same values, where x is large in memory of the pool."""
        return self.empty(x.shape, x).copy_(x) if self._is_for(x, x.numel() * x.element_size()) else x

    @staticmethod
    def _is_for(like: torch.Tensor, num_bytes: int) -> bool:
        return type(like) in (torch.Tensor, nn.Parameter) and like.device.type == 'cpu' and num_bytes >= LARGE_BYTES


_pools = weakref.WeakKeyDictionary()


def pool_of(module: nn.Module, x: torch.Tensor) -> MemoryPool:
    """The module's pool, a new one when its input x has another shape, dtype or device than the last time."""
    key = (x.shape, x.dtype, x.device)
    last_key, pool = _pools.get(module, (None, None))
    if last_key != key:
        pool = MemoryPool()
        _pools[module] = (key, pool)
    return pool


class PoolOwner(nn.Module):
    """A module that has a pool in training mode; in eval mode its memory is given back, but for what is referred to."""

    def train(self, mode: bool = True) -> 'PoolOwner':
        """As of every module."""
        if not mode:
            _pools.pop(self, None)
        return super().train(mode)
