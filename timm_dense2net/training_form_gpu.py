"""The training form on a GPU: what reads a block's features, by the kernels of `norm_kernels.py`.

The features, their statistics and the gradients of both lie in the buffers of `training_form.py`. A layer's norm and
activation take one pass over them forward, one to be made again and one backward. What follows a layer's bottleneck is
autograd's own: its maps are narrow, and there `torch.compile` finds what can be done in one pass.
"""
from typing import Any, Tuple

import torch
import torch.nn.functional as F
from torch.autograd import Function

from timm.layers import BatchNormAct2d

from .norm_kernels import norm_relu, norm_relu_backward
from .training_form import Buffers, Norm, as_maps, as_pixels, check_first_order, let_go, update_running_stats

__all__ = ['Bottleneck', 'PooledTransition']


class Bottleneck(Function):
    """Norm, ReLU and 1x1 convolution: maps (N, mid_chs, H, W) of the first features.

    Features (pixels, C) and statistics (2, C) stand for the block's buffers, and go through it with their gradients.
    """

    @staticmethod
    def forward(
            ctx: Any,
            buffers: Buffers,
            norm: BatchNormAct2d,
            features: torch.Tensor,
            stats: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            conv: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.buffers, ctx.eps = buffers, norm.eps
        in_chs = conv.shape[1]
        mean, var = buffers.stats[:, :in_chs]
        y = norm_relu(features[:, :in_chs], mean, var, weight, bias, norm.eps)
        update_running_stats(norm, mean, var, len(y))
        # y, as wide as all features so far, is made again in backward.
        ctx.save_for_backward(features, weight, bias, conv)
        maps = y @ conv.flatten(1).to(y.dtype).t()
        return as_maps(maps.view(*buffers.size, -1)), features, stats

    @staticmethod
    def backward(ctx: Any, dmaps: torch.Tensor, dfeatures: torch.Tensor, dstats: torch.Tensor):
        features, weight, bias, conv = ctx.saved_tensors
        in_chs = conv.shape[1]
        x, norm = features[:, :in_chs], (*ctx.buffers.stats[:, :in_chs], weight, bias, ctx.eps)
        with torch.autocast(x.device.type, enabled=False):
            d = as_pixels(dmaps)
            dconv = (d.t() @ norm_relu(x, *norm)).to(conv.dtype)
            daffine = norm_relu_backward(
                d @ conv.flatten(1).to(x.dtype), x, *norm, dfeatures[:, :in_chs], adds=True)
            dstats[:, :in_chs] += Norm.of_batch(*norm).stats_gradient(*daffine)
        let_go(ctx, 'buffers')
        return None, None, dfeatures, dstats, *daffine, dconv[..., None, None]


class PooledTransition(Function):
    """Norm, ReLU, average pooling, 1x1 convolution, of features (N * H * W, C) and their statistics (2, C).

    Size is (N, H, W). The gradients of both are its own: what made the features adds to them in place.
    """

    @staticmethod
    def forward(
            ctx: Any,
            norm: BatchNormAct2d,
            size: Tuple[int, int, int],
            features: torch.Tensor,
            stats: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            conv: torch.Tensor,
    ) -> torch.Tensor:
        ctx.size, ctx.eps = size, norm.eps
        y = norm_relu(features, *stats, weight, bias, norm.eps)
        update_running_stats(norm, *stats, len(features))
        pooled = F.avg_pool2d(as_maps(y.view(*size, -1)), 2).permute(0, 2, 3, 1)
        # The buffer of the statistics is not written any more.
        ctx.save_for_backward(features, stats, pooled, weight, bias, conv)
        return as_maps(pooled @ conv.flatten(1).to(y.dtype).t())

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor):
        check_first_order(dout)
        features, stats, pooled, weight, bias, conv = ctx.saved_tensors
        with torch.autocast(dout.device.type, enabled=False):
            d = dout.permute(0, 2, 3, 1)
            dconv = (d.flatten(0, 2).t() @ pooled.flatten(0, 2)).to(conv.dtype)
            maps = as_maps(features.view(*ctx.size, -1))  # of which the shape alone is asked
            dy = torch.ops.aten.avg_pool2d_backward(
                as_maps(d @ conv.flatten(1).to(d.dtype)), maps, [2, 2], [2, 2], [0, 0], False, True, None)
            dx = torch.empty_like(features)
            norm = (*stats, weight, bias, ctx.eps)
            daffine = norm_relu_backward(as_pixels(dy), features, *norm, dx, adds=False)
            dstats = Norm.of_batch(*norm).stats_gradient(*daffine)
        return None, None, dx, dstats, *daffine, dconv[..., None, None]
