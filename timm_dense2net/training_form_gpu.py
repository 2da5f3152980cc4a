"""The training form on a GPU, by the kernels of `norm_kernels.py`.

The features, their statistics and the gradients of both lie in the buffers of `training_buffers.py`. A layer's norm and
activation take one pass over them forward, one to be made again and one backward. In the hierarchy a norm, its
activation and the sum with the next split are one pass, and the maps of a split stay apart, as convolutions want them
contiguous. What follows the bottleneck of a layer without hierarchy is autograd's own.
"""
from itertools import islice
from typing import Any, List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function

from timm.layers import BatchNormAct2d

from .batch_norm import update_running_stats
from .memory_pool import MemoryPool
from .norm_kernels import (
    KernelNorm,
    add_stats_gradient,
    join,
    join_backward,
    moments,
    new_sums,
    norm_gradients,
    norm_relu,
    norm_relu_backward,
)
from .training_buffers import Buffers, as_maps, as_pixels, check_first_order, conv_args, empty_maps, let_go

__all__ = ['Transition', 'new_features']


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
        y = norm_relu(features[:, :in_chs], KernelNorm(mean, var, weight, bias, norm.eps))
        update_running_stats(norm, mean, var, len(y))
        # y, as wide as all features so far, is made again in backward.
        ctx.save_for_backward(features, weight, bias, conv)
        maps = y @ conv.flatten(1).to(y.dtype).t()
        return as_maps(maps.view(*buffers.size, -1)), features, stats

    @staticmethod
    def backward(ctx: Any, dmaps: torch.Tensor, dfeatures: torch.Tensor, dstats: torch.Tensor):
        features, weight, bias, conv = ctx.saved_tensors
        in_chs = conv.shape[1]
        x, norm = features[:, :in_chs], KernelNorm(*ctx.buffers.stats[:, :in_chs], weight, bias, ctx.eps)
        sums = new_sums(x, norm)
        with torch.autocast(x.device.type, enabled=False):
            d = as_pixels(dmaps)
            dconv = (d.t() @ norm_relu(x, norm)).to(conv.dtype)
            dy = d @ conv.flatten(1).to(x.dtype)
            norm_relu_backward(dy, x, norm, dfeatures[:, :in_chs], sums, adds=True)
            gradients = norm_gradients(sums, norm)
            dstats[:, :in_chs] += gradients[2:]
        let_go(ctx, 'buffers')
        return None, None, dfeatures, dstats, gradients[0], gradients[1], dconv[..., None, None]


def _hierarchy_parameters(layer: nn.Module) -> List[nn.Parameter]:
    """Parameters of what follows the bottleneck of a layer with a hierarchy, as `Hierarchy` takes them."""
    norms = [layer.norm2, *layer.conv2.norms]
    return [
        *(p for norm in norms for p in (norm.weight, norm.bias)), *(conv.weight for conv in layer.conv2.convs),
        layer.conv3.weight]


class Hierarchy(Function):
    """Norm, ReLU, hierarchy and 1x1 convolution: (N, mid_chs, H, W) -> (N, growth_rate, H, W).

    Of a layer, its bottleneck's maps and `_hierarchy_parameters`.
    """

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, maps: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        hierarchy, (affines, convs, conv3) = layer.conv2, _divide(layer, parameters)
        x = as_pixels(maps)
        # Maps are channels last, and so weights have to be, or each convolution would make them so.
        convs = _cast([conv.to(memory_format=torch.channels_last) for conv in convs], x.dtype)
        conv3 = conv3.flatten(1).to(x.dtype)
        norms = [_norm_of_batch(x, layer.norm2, *affines[0])]
        splits = _splits(hierarchy)
        ys = torch.empty_like(x)
        zs, totals = [x[:, splits[0]]], []  # what is normalised to the hierarchy's outputs, what is convolved
        for i, (conv, norm) in enumerate(zip(hierarchy.convs, hierarchy.norms)):
            before = norms[0].part(splits[0]) if i == 0 else norms[i]
            totals.append(
                join(x[:, splits[i + 1]], norms[0].part(splits[i + 1]), zs[i], before, y=ys[:, splits[i]]))
            z = torch.convolution(_maps_like(maps, totals[i]), convs[i], None, *conv_args(conv))
            zs.append(_pixels(z))
            norms.append(_norm_of_batch(zs[-1], norm, *affines[i + 1]))
        norm_relu(zs[-1], norms[-1].part(splits[0]), out=ys[:, splits[-1]])
        ctx.save_for_backward(
            x, ys, *totals, *zs[1:], *convs, conv3, *(t for norm in norms for t in norm[:2]), *parameters)
        new = empty_maps((len(maps), *maps.shape[2:]), len(conv3), ys)
        torch.mm(ys, conv3.t(), out=as_pixels(new))
        return new

    @staticmethod
    def backward(ctx: Any, dnew: torch.Tensor):
        with torch.autocast(dnew.device.type, enabled=False):
            dx, gradients = _hierarchy_backward(ctx.layer, ctx.saved_tensors, dnew)
        let_go(ctx, 'layer')
        return None, dx, *gradients


def _hierarchy_backward(
        layer: nn.Module, saved: Sequence[torch.Tensor], dnew: torch.Tensor,
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Gradients of the maps of a layer's bottleneck and of the parameters of what follows."""
    hierarchy, splits = layer.conv2, _splits(layer.conv2)
    count, tensors = len(hierarchy.convs), iter(saved)

    def take(number: int) -> List[torch.Tensor]:
        return list(islice(tensors, number))

    x, ys = take(2)
    totals, zs, convs = take(count), take(count), take(count)
    conv3, = take(1)
    stats, parameters = take(2 * (count + 1)), list(tensors)
    affines, _, _ = _divide(layer, parameters)
    modules = [layer.norm2, *hierarchy.norms]
    norms = [
        KernelNorm(*stats[2 * i:2 * i + 2], *affine, module.eps)
        for i, (affine, module) in enumerate(zip(affines, modules))]
    zs = [x[:, splits[0]], *zs]
    d = _pixels(dnew)
    dconv3 = (d.t() @ ys).to(parameters[-1].dtype)
    dys = d @ conv3
    dx, sums2 = torch.empty_like(x), new_sums(x, norms[0])

    def place(i: int) -> Tuple[torch.Tensor, torch.Tensor]:
        # Of the gradient of what is normalised to output i, without what its statistics add, and of its sums.
        if i == 0:
            return dx[:, splits[0]], sums2[..., splits[0]]
        return torch.empty_like(zs[i]), new_sums(zs[i], norms[i])

    before = [norms[0].part(splits[0]), *norms[1:]]
    dz, sums = place(count)
    norm_relu_backward(dys[:, splits[-1]], zs[-1], before[-1], dz, sums)
    daffines, dconvs = [], []
    for i in reversed(range(count)):
        gradients = norm_gradients(sums, norms[i + 1])
        add_stats_gradient(dz, zs[i + 1], norms[i + 1].mean, gradients[2:], out=dz)
        dtotal, dconv, _ = torch.ops.aten.convolution_backward(
            _maps_like(dnew, dz), _maps_like(dnew, totals[i]), convs[i], None, *conv_args(hierarchy.convs[i]),
            [True, True, False])
        split, (dz, sums) = splits[i + 1], place(i)
        join_backward(
            _pixels(dtotal), x[:, split], norms[0].part(split), dx[:, split], sums2[..., split],
            zs[i], before[i], dys[:, splits[i]], dz, sums)
        daffines, dconvs = [*gradients[:2], *daffines], [dconv, *dconvs]
    gradients = norm_gradients(sums2, norms[0])
    add_stats_gradient(dx, x, norms[0].mean, gradients[2:], out=dx)
    return _maps_like(dnew, dx), [
        *gradients[:2], *daffines, *_cast(dconvs, parameters[-1].dtype), dconv3[..., None, None]]


def _divide(
        layer: nn.Module, parameters: Sequence[torch.Tensor],
) -> Tuple[List[Sequence[torch.Tensor]], Sequence[torch.Tensor], torch.Tensor]:
    """Weight and bias of each norm, weights of the 3x3 convolutions and of the 1x1 convolution."""
    count = len(layer.conv2.convs)
    affines = [parameters[i:i + 2] for i in range(0, 2 * count + 2, 2)]
    return affines, parameters[2 * count + 2:-1], parameters[-1]


def _splits(hierarchy: nn.Module) -> List[slice]:
    return [slice(start, start + hierarchy.width) for start in range(0, hierarchy.channels, hierarchy.width)]


def _cast(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> List[torch.Tensor]:
    """Weights of convolutions in another dtype, all of them in one kernel."""
    if not weights or weights[0].dtype == dtype:
        return list(weights)
    cast = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    torch._foreach_copy_(cast, list(weights))
    return cast


def _norm_of_batch(
        x: torch.Tensor, module: BatchNormAct2d, weight: torch.Tensor, bias: torch.Tensor) -> KernelNorm:
    """The norm of x (pixels, C), its statistics taken and its running statistics updated."""
    mean, var = (torch.empty_like(weight) for _ in range(2))
    # Without a momentum a mean of all batches is kept, whose share depends on their number.
    running = module.running_mean, module.running_var, module.num_batches_tracked
    if module.track_running_stats and module.momentum is not None and all(t is not None for t in running):
        moments(x, mean, var, running, module.momentum)
    else:
        moments(x, mean, var)
        update_running_stats(module, mean, var, len(x))
    return KernelNorm(mean, var, weight, bias, module.eps)


def _maps_like(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) of (N * H * W, C), where ``like`` is (N, ..., H, W)."""
    return as_maps(x.view(like.shape[0], *like.shape[2:], -1))


def _pixels(maps: torch.Tensor) -> torch.Tensor:
    """(N * H * W, C), contiguous, of (N, C, H, W), without a copy if that is channels last."""
    return as_pixels(maps).contiguous()


def new_features(
        buffers: Buffers, layer: nn.Module, features: torch.Tensor, stats: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New features of a layer before its attention, and what stands for the buffers after it."""
    norm, conv = layer.norm1, layer.conv1
    with torch.autocast(features.device.type, enabled=False):
        maps, features, stats = Bottleneck.apply(buffers, norm, features, stats, norm.weight, norm.bias, conv.weight)
        if not isinstance(layer.conv2, nn.Conv2d):
            return Hierarchy.apply(layer, maps, *_hierarchy_parameters(layer)), features, stats
    return layer.after_bottleneck(maps), features, stats


class Transition(Function):
    """Norm, ReLU, average pooling, 1x1 convolution, of features (N * H * W, C) and their statistics (2, C).

    Size is (N, H, W); the pool is of no use here, as torch keeps a GPU's memory itself. The gradients of both are its
    own: what made the features adds to them in place.
    """

    @staticmethod
    def forward(
            ctx: Any,
            transition: nn.Sequential,
            pool: MemoryPool,
            size: Tuple[int, int, int],
            features: torch.Tensor,
            stats: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            conv: torch.Tensor,
    ) -> torch.Tensor:
        norm = transition.norm
        ctx.size, ctx.eps = size, norm.eps
        y = norm_relu(features, KernelNorm(*stats, weight, bias, norm.eps))
        update_running_stats(norm, *stats, len(features))
        pooled = F.avg_pool2d(as_maps(y.view(*size, -1)), 2)
        maps = empty_maps((len(pooled), *pooled.shape[2:]), len(conv), y)
        pooled = as_pixels(pooled)
        # The buffer of the statistics is not written any more.
        ctx.save_for_backward(features, stats, pooled, weight, bias, conv)
        torch.mm(pooled, conv.flatten(1).to(y.dtype).t(), out=as_pixels(maps))
        return maps

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor):
        check_first_order(dout)
        features, stats, pooled, weight, bias, conv = ctx.saved_tensors
        norm = KernelNorm(*stats, weight, bias, ctx.eps)
        with torch.autocast(dout.device.type, enabled=False):
            d = dout.permute(0, 2, 3, 1)
            dconv = (d.flatten(0, 2).t() @ pooled).to(conv.dtype)
            dy = _unpool(d @ (0.25 * conv.flatten(1)).to(d.dtype), ctx.size)
            dx, sums = torch.empty_like(features), new_sums(features, norm)
            norm_relu_backward(dy, features, norm, dx, sums)
            gradients = norm_gradients(sums, norm)
        return None, None, None, dx, gradients[2:], gradients[0], gradients[1], dconv[..., None, None]


def _unpool(x: torch.Tensor, size: Tuple[int, int, int]) -> torch.Tensor:
    """(N * H * W, C) with each pixel of (N, H // 2, W // 2, C) at four places, and 0 where none of them went.

    torch's own gradient of average pooling takes ten times as long as its memory traffic would.
    """
    n, h, w, channels = x.shape
    shape = (*size, channels)
    out = x.new_empty(shape) if size[1:] == (2 * h, 2 * w) else x.new_zeros(shape)
    out[:, :2 * h, :2 * w].unflatten(2, (w, 2)).unflatten(1, (h, 2)).copy_(x[:, :, None, :, None])
    return out.flatten(0, 2)
