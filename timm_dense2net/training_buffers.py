"""What the training forms of a CPU and of a GPU share: the buffers of a block, and how they are part of a graph.

Features and their statistics are written to the buffers in place, outside of what autograd sees. Two tensors stand for
them in the graph: they go through all functions of a block, one after another.
"""
import logging
from functools import lru_cache
from typing import Any, Tuple

import torch
import torch.nn as nn
from torch.autograd import Function

from .batch_norm import batch_stats, scale_and_shift, stats_terms
from .errors import one_line
from .memory_pool import MemoryPool
from .parts import row_parts

__all__ = [
    'AddFeatures', 'Buffers', 'Output', 'Statistics', 'as_maps', 'as_pixels', 'check_first_order', 'conv_args',
    'empty_maps', 'let_go', 'runs_on_kernels']

_logger = logging.getLogger(__name__)


def runs_on_kernels(x: torch.Tensor) -> bool:
    """Whether x lies where the training form is that of `training_form_gpu.py`."""
    return x.device.type == 'cuda' and _has_triton(x.device)


@lru_cache
def _has_triton(device: torch.device) -> bool:
    # It comes with torch, but not on every system, and needs a compiler of C besides.
    try:
        from .norm_kernels import try_kernels
        try_kernels(device)
    except Exception as e:  # of many kinds, all of which mean the same
        _logger.warning(f'Training without the kernels of norm_kernels.py: {one_line(e)}')
        return False
    return True


def conv_args(conv: nn.Conv2d) -> Tuple[Any, ...]:
    """What a convolution and its gradient take after weight and bias."""
    return conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups


def check_first_order(gradient: torch.Tensor) -> None:
    """Refuses second derivatives and batched gradients, of which the training form knows nothing.

    Raises:
        RuntimeError: If the backward pass that brings the gradient was called for either.
    """
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient):
        given = 'create_graph' if torch.is_grad_enabled() else 'is_grads_batched'
        raise RuntimeError(
            'no second derivatives and no batched gradients in the training form, and backward was called with '
            f'{given}=True: call timm_dense2net.training_form.set_training_form(False) before training, or set '
            'TIMM_DENSE2NET_TRAINING_FORM=0')


def as_maps(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) of (N, H, W, C)."""
    return x.permute(0, 3, 1, 2)


def empty_maps(size: Tuple[int, int, int], channels: int, like: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) for a size (N, H, W), channels last, and no view: a function's output may be changed in place."""
    n, h, w = size
    return torch.empty(
        (n, channels, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def as_pixels(x: torch.Tensor) -> torch.Tensor:
    """(N * H * W, C) of (N, C, H, W), without a copy if x is channels last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _add_stats_gradient(
        dx: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor) -> None:
    """Write to out dx and what the gradients (2, C) of mean and variance of x add to it; all (pixels, C)."""
    if runs_on_kernels(x):
        from .norm_kernels import add_stats_gradient
        add_stats_gradient(dx, x, mean, gradient, out)
        return
    offset, slope = stats_terms(mean, gradient, x.shape[0])
    for part in row_parts(x, *x.shape):
        torch.add(dx[part], scale_and_shift(x[part], slope, offset), out=out[part])


class Buffers:
    """Buffers of one pass through a block.

    Args:
        x: Input (N, C, H, W) of the block.
        channels: Features of the block's output.
        pool: What the large ones are made in.
    """

    def __init__(self, x: torch.Tensor, channels: int, pool: MemoryPool) -> None:
        self.size = (x.shape[0], *x.shape[2:])
        self.in_chs = x.shape[1]
        self.pool = pool
        self.features = pool.empty((x.numel() // x.shape[1], channels), x)
        self.stats = x.new_empty((2, channels), dtype=torch.promote_types(x.dtype, torch.float32))
        self._scratch = {}

    def write(self, channels: slice, maps: torch.Tensor) -> None:
        """Writes maps (N, C, H, W) and their statistics to some of the channels."""
        # Around autograd's count of writes: nothing in the graph has read these channels.
        place = self.features.data[:, channels]
        if runs_on_kernels(maps):
            from .norm_kernels import moments
            pixels = as_pixels(maps.to(place.dtype).contiguous(memory_format=torch.channels_last))
            moments(pixels, *self.stats.data[:, channels], copy=place)
            return
        place.copy_(as_pixels(maps))
        self.stats[0, channels], self.stats[1, channels] = batch_stats(maps)

    def scratch(self, name: str, splits: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer (splits, N, H, W, width) that one layer after another writes."""
        if name not in self._scratch:
            self._scratch[name] = self.pool.empty((splits, *self.size, width), like)
        return self._scratch[name]

    def free_scratch(self) -> None:
        """Lets go of the scratch buffers."""
        self._scratch.clear()

    def release(self) -> None:
        """Leave the features to the graph alone."""
        self.free_scratch()
        self.features = None


def let_go(ctx: Any, *names: str) -> None:
    """After a backward pass, lets go of what autograd does not know of, where it does so of the saved tensors.

    A loss that is kept keeps its graph, and so all that this still holds.
    """
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        for name in names:
            delattr(ctx, name)


class AddFeatures(Function):
    """Write maps (N, C, H, W) and their statistics into the buffers, from a channel on.

    ``features`` and ``stats`` stand for the buffers in the graph. They go through all functions of a block, one after
    another, and so do their gradients, to which each of these adds its part in place.
    """

    @staticmethod
    def forward(
            ctx: Any,
            buffers: Buffers,
            start: int,
            maps: torch.Tensor,
            features: torch.Tensor,
            stats: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        ctx.buffers, ctx.channels = buffers, slice(start, start + maps.shape[1])
        buffers.write(ctx.channels, maps)
        ctx.save_for_backward(features)
        return features, stats

    @staticmethod
    def backward(ctx: Any, dfeatures: torch.Tensor, dstats: torch.Tensor):
        features, = ctx.saved_tensors
        x, dx = features[:, ctx.channels], dfeatures[:, ctx.channels]
        buffers = ctx.buffers
        dmaps = buffers.pool.empty(dx.shape, dx)
        _add_stats_gradient(dx, x, buffers.stats[0, ctx.channels], dstats[:, ctx.channels], out=dmaps)
        let_go(ctx, 'buffers')
        return None, None, as_maps(dmaps.view(*buffers.size, -1)), dfeatures, dstats


class Output(Function):
    """Output (N, C, H, W) of a block; in backward, the buffers for the gradients of its features and statistics."""

    @staticmethod
    def forward(ctx: Any, buffers: Buffers, features: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
        ctx.buffers = buffers
        ctx.save_for_backward(stats)
        return as_maps(features.detach().view(*buffers.size, -1))

    @staticmethod
    def backward(ctx: Any, doutput: torch.Tensor):
        check_first_order(doutput)
        stats, = ctx.saved_tensors
        pixels = as_pixels(doutput)
        dfeatures = ctx.buffers.pool.empty(pixels.shape, pixels).copy_(pixels)
        let_go(ctx, 'buffers')
        return None, dfeatures, torch.zeros_like(stats)


class Statistics(Function):
    """Pixels (N * H * W, C) of maps (N, C, H, W), and their mean and variance (2, C)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.size = (x.shape[0], *x.shape[2:])
        features, stats = as_pixels(x.detach()), torch.stack(batch_stats(x))
        ctx.save_for_backward(features, stats)
        return features, stats

    @staticmethod
    def backward(ctx: Any, dfeatures: torch.Tensor, dstats: torch.Tensor) -> torch.Tensor:
        features, stats = ctx.saved_tensors
        _add_stats_gradient(dfeatures, features, stats[0], dstats, out=dfeatures)
        return as_maps(dfeatures.view(*ctx.size, -1))
