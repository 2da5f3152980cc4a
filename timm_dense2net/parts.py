"""Parts of a batch that are worked on one after another, so that what arises stays in a CPU's caches."""
from typing import Iterator, Sequence

import torch

__all__ = ['image_parts', 'row_parts']

# Bytes of features that a block works on at a time on a CPU, for each of torch's threads.
IMAGE_CACHE_BYTES = 4 << 20
# Bytes of rows that a pass of the training form works on at a time on a CPU, for each of torch's threads.
ROW_CACHE_BYTES = 2 << 20


def image_parts(x: torch.Tensor, channels: int) -> Sequence[torch.Tensor]:
    """Images x (N, C, H, W) in parts to work on one after another, where ``channels`` channels of that size arise."""
    if x.device.type != 'cpu':
        return [x]
    cache_bytes = IMAGE_CACHE_BYTES * torch.get_num_threads()
    return x.split(max(1, cache_bytes // (channels * x.shape[2] * x.shape[3] * x.element_size())))


def row_parts(x: torch.Tensor, length: int, row: int) -> Iterator[slice]:
    """Parts of ``length`` rows of ``row`` elements each, to be worked on one after another."""
    cache_bytes = ROW_CACHE_BYTES * torch.get_num_threads()
    step = max(1, cache_bytes // (row * x.element_size()) if x.device.type == 'cpu' else length)
    return (slice(start, start + step) for start in range(0, length, step))
