"""The training form on a CPU: parts of the pixels at a time, in memory that is kept from one step for the next."""
import math
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function

from .batch_norm import Norm, add_scaled, batch_stats, join_stats, scale_and_shift, stats_terms, update_running_stats
from .memory_pool import MemoryPool
from .parts import row_parts
from .training_buffers import Buffers, as_maps, as_pixels, check_first_order, conv_args, empty_maps, let_go

__all__ = ['NewFeatures', 'Transition', 'new_features']


def _layer_parameters(layer: nn.Module) -> List[nn.Parameter]:
    norm_conv = [layer.norm1.weight, layer.norm1.bias, layer.conv1.weight, layer.norm2.weight, layer.norm2.bias]
    if isinstance(layer.conv2, nn.Conv2d):
        return [*norm_conv, layer.conv2.weight]
    hierarchy = [
        p for conv, norm in zip(layer.conv2.convs, layer.conv2.norms) for p in (conv.weight, norm.weight, norm.bias)]
    return [*norm_conv, *hierarchy, layer.conv3.weight]


class _LayerPass:
    """One pass through a dense layer up to its last convolution.

    Big tensors are left to autograd: ``forward`` returns what ``backward`` needs of them.

    Args:
        layer: The layer.
        buffers: Buffers of the block.
        parameters: What ``_layer_parameters`` returns.
        dtype: Dtype of the features.
    """

    def __init__(
            self, layer: nn.Module, buffers: Buffers, parameters: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        self.layer, self.buffers = layer, buffers
        self.in_chs = layer.conv1.in_channels
        self.has_hierarchy = not isinstance(layer.conv2, nn.Conv2d)
        self.splits = layer.conv2.scale if self.has_hierarchy else 1
        self.width = layer.conv1.out_channels // self.splits
        weight, bias, conv1, weight2, bias2, *rest = parameters
        self.norm1 = Norm.of_batch(*buffers.stats[:, :self.in_chs], weight, bias, layer.norm1.eps)
        self.conv1 = conv1.flatten(1).to(dtype)
        self.affine2 = (weight2, bias2)
        if self.has_hierarchy:
            self.conv3 = rest.pop().flatten(1).to(dtype)
        self.convs = [w.to(dtype, memory_format=torch.channels_last) for w in rest[::3]]
        self.affines = list(zip(rest[1::3], rest[2::3]))

    def forward(self, features: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Output (N, C, H, W) of the last convolution; outputs of conv1 and of the hierarchy's convolutions."""
        kept = self.forward_kept(features)
        ys = self._scratch('y', kept[0])
        return (self._conv3(ys) if self.has_hierarchy else self._conv(0, ys[0])), kept

    def forward_kept(self, features: torch.Tensor) -> List[torch.Tensor]:
        """Outputs of conv1 and of the hierarchy's convolutions; the hierarchy's own goes to the scratch buffer 'y'."""
        bottleneck, stats2 = self._bottleneck(features[:, :self.in_chs])
        self.norm2 = Norm.of_batch(*stats2, *self.affine2, self.layer.norm2.eps)
        self.norms2 = self.norm2.split(self.width)
        ys = self._scratch('y', bottleneck).unbind()
        for norm, x, y in zip(self.norms2, bottleneck, ys):
            norm.forward(x, y)
        outputs, self.norms = [], []
        for i, affine in enumerate(self.affines):
            z = self._conv(i, ys[i + 1].add_(ys[i])).permute(0, 2, 3, 1)
            z = self.buffers.pool.keep(z.contiguous())
            norm = Norm.of_batch(*batch_stats(as_maps(z)), *affine, self.layer.conv2.norms[i].eps)
            norm.forward(z, ys[i + 1])
            outputs.append(z)
            self.norms.append(norm)
        return [bottleneck, *outputs]

    def _scratch(self, name: str, like: torch.Tensor, splits: Optional[int] = None) -> torch.Tensor:
        return self.buffers.scratch(name, splits or self.splits, self.width, like)

    def _bottleneck(self, features: torch.Tensor) -> Tuple[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Output of conv1 (splits, N, H, W, width), its mean and variance (splits * width,)."""
        out = self.buffers.pool.empty((self.splits, len(features), self.width), features)
        stats, shares = [], []
        for part in row_parts(features, *features.shape):
            x = features[part]
            y = self.norm1.forward(x, x.new_empty(x.shape)) @ self.conv1.t()
            out[:, part] = self._split(y)
            stats.append(batch_stats(y[..., None, None]))
            shares.append(len(y) / len(features))
        out = out.view(self.splits, *self.buffers.size, self.width)
        if len(stats) == 1:
            return out, stats[0]
        means, variances = map(torch.stack, zip(*stats))
        return out, join_stats(means, variances, means.new_tensor(shares)[:, None])

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(splits, pixels, width) of (pixels, splits * width)."""
        return x.view(-1, self.splits, self.width).transpose(0, 1)

    def _conv_args(self, i: int) -> Tuple[Any, ...]:
        return conv_args(self.layer.conv2.convs[i] if self.has_hierarchy else self.layer.conv2)

    def _conv(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """3x3 convolution i, (N, C, H, W), of (N, H, W, width)."""
        return torch.convolution(as_maps(x), self.convs[i], None, *self._conv_args(i))

    def _conv_backward(self, i: int, dy: torch.Tensor, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the input (N, H, W, width) of 3x3 convolution i and of its weight."""
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            as_maps(dy), as_maps(x), self.convs[i], None, *self._conv_args(i), [True, True, False])
        return dx.permute(0, 2, 3, 1).contiguous(), dweight

    def _conv3(self, ys: torch.Tensor) -> torch.Tensor:
        """conv3 (N, C, H, W) of the hierarchy's output (splits, N, H, W, width)."""
        pixels = ys.flatten(1, 3)
        maps = empty_maps(self.buffers.size, len(self.conv3), ys)
        out = as_pixels(maps)
        for part in row_parts(out, len(out), self.splits * self.width):
            torch.mm(_merge(pixels[:, part]), self.conv3.t(), out=out[part])
        return maps

    def update_running_stats(self) -> None:
        layer, count = self.layer, math.prod(self.buffers.size)
        update_running_stats(layer.norm1, self.norm1.mean, self.norm1.var, count)
        update_running_stats(layer.norm2, self.norm2.mean, self.norm2.var, count)
        for module, norm in zip(getattr(layer.conv2, 'norms', []), self.norms):
            update_running_stats(module, norm.mean, norm.var, count)

    def backward(
            self,
            features: torch.Tensor,
            kept: Sequence[torch.Tensor],
            dnew: torch.Tensor,
            dfeatures: torch.Tensor,
            dstats: torch.Tensor,
    ) -> List[torch.Tensor]:
        """Add the gradients of features (pixels, C) and stats (2, C) to those given, return the parameters'."""
        bottleneck, *outputs = kept
        ys = self._scratch('y', bottleneck)
        for norm, x, y in zip([self.norms2[0], *self.norms], [bottleneck[0], *outputs], ys):
            norm.forward(x, y)
        dys, dlast = self._last_conv_backward(dnew.permute(0, 2, 3, 1), ys)
        dhierarchy, daffines2 = [], []
        for i in reversed(range(self.splits)):
            x, dx = ys[0], dys[i]
            if i > 0:
                x = self.norms2[i].forward(bottleneck[i], self._scratch('x', ys, splits=1)[0])
                total = torch.add(x, ys[i - 1], out=self._scratch('sum', ys, splits=1)[0])
                dz, *daffine = self.norms[i - 1].backward(dys[i], ys[i], outputs[i - 1])
                dx, dconv = self._conv_backward(i - 1, dz, total)
                dys[i - 1].add_(dx)
                dhierarchy = [dconv, *daffine, *dhierarchy]
            # The hierarchy's outputs are not read again from here on: their place takes the gradients of its input.
            pixels = (t.flatten(0, 2) for t in (dx, x, bottleneck[i], ys[i]))
            daffines2.insert(0, self.norms2[i].parameter_gradients(*pixels))
        dweight2, dbias2 = daffine2 = torch.cat(daffines2, 1)
        daffine1, dconv1 = self._bottleneck_backward(
            features[:, :self.in_chs], bottleneck, ys, daffine2, dfeatures[:, :self.in_chs])
        dstats[:, :self.in_chs] += self.norm1.stats_gradient(*daffine1)
        return [*daffine1, dconv1[..., None, None], dweight2, dbias2, *dhierarchy, dlast]

    def _last_conv_backward(self, dnew: torch.Tensor, ys: torch.Tensor) -> Tuple[Sequence[torch.Tensor], torch.Tensor]:
        """Gradients of the hierarchy's output splits (N, H, W, width) and of the last convolution's weight."""
        if not self.has_hierarchy:
            dy, dconv = self._conv_backward(0, dnew, ys[0])
            return [dy], dconv
        dys = self._scratch('dy', ys)
        dnew, dpixels, pixels = dnew.flatten(0, 2), dys.flatten(1, 3), ys.flatten(1, 3)
        dconv = torch.zeros_like(self.conv3, dtype=self.norm1.weight.dtype)
        for part in row_parts(dnew, len(dnew), self.splits * self.width):
            dconv += dnew[part].t() @ _merge(pixels[:, part])
            dpixels[:, part] = self._split(dnew[part] @ self.conv3)
        return dys, dconv[..., None, None]

    def _bottleneck_backward(
            self,
            features: torch.Tensor,
            bottleneck: torch.Tensor,
            dnormed: torch.Tensor,
            daffine2: torch.Tensor,
            dfeatures: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Gradients (2, C) of norm1's weight and bias, and of conv1's weight; adds to dfeatures.

        Those of norm2's output before its activation, and of its weight and bias, are given.
        """
        norm2 = self.norm2
        offset, slope = stats_terms(norm2.mean, norm2.stats_gradient(*daffine2), len(features))
        terms = [t.view(self.splits, self.width) for t in (offset, slope, norm2.scale)]
        daffine = torch.zeros_like(self.buffers.stats[:, :self.in_chs])
        dconv = torch.zeros_like(self.conv1, dtype=daffine.dtype)
        scale = self.norm1.scale.to(features.dtype)
        for part in row_parts(features, *features.shape):
            x, d = features[part].contiguous(), self._dbottleneck(bottleneck, dnormed, part, *terms)
            y = self.norm1.forward(x, torch.empty_like(x))
            dconv += d.t() @ y
            dy = d @ self.conv1
            daffine += self.norm1.parameter_gradients(dy, y, x, out=dy)
            dfeatures[part].addcmul_(dy, scale)
        return daffine, dconv

    def _dbottleneck(
            self,
            bottleneck: torch.Tensor,
            dnormed: torch.Tensor,
            part: slice,
            offset: torch.Tensor,
            slope: torch.Tensor,
            scale: torch.Tensor,
    ) -> torch.Tensor:
        """A part (rows, splits * width) of the gradient of conv1's output: offset + slope x + scale dnormed."""
        x, dnormed = (t.flatten(1, 3)[:, part].transpose(0, 1) for t in (bottleneck, dnormed))
        d = scale_and_shift(x, slope, offset)
        return add_scaled(d, dnormed, scale, out=d).flatten(1)


def _merge(splits: torch.Tensor) -> torch.Tensor:
    """(rows, splits * width) of (splits, rows, width)."""
    return splits.transpose(0, 1).flatten(1)


class NewFeatures(Function):
    """New features (N, C, H, W) of a layer before its attention; features and stats as in ``AddFeatures``."""

    @staticmethod
    def forward(
            ctx: Any,
            buffers: Buffers,
            layer: nn.Module,
            features: torch.Tensor,
            stats: torch.Tensor,
            *parameters: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.run = _LayerPass(layer, buffers, parameters, features.dtype)
        new, kept = ctx.run.forward(features)
        ctx.run.update_running_stats()
        ctx.parameters = len(parameters)
        ctx.save_for_backward(features, *parameters, *([] if layer.grad_checkpointing else kept))
        return new, features, stats

    @staticmethod
    def backward(ctx: Any, dnew: torch.Tensor, dfeatures: torch.Tensor, dstats: torch.Tensor):
        features, *saved = ctx.saved_tensors
        kept = saved[ctx.parameters:]
        run = ctx.run
        with torch.autocast(dnew.device.type, enabled=False):
            if not kept:
                kept = run.forward_kept(features)
            gradients = run.backward(features, kept, dnew, dfeatures, dstats)
        if run.in_chs == run.buffers.in_chs:
            run.buffers.free_scratch()
        let_go(ctx, 'run')
        return None, None, dfeatures, dstats, *gradients


def new_features(
        buffers: Buffers, layer: nn.Module, features: torch.Tensor, stats: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New features of a layer before its attention, and what stands for the buffers after it."""
    with torch.autocast(features.device.type, enabled=False):
        return NewFeatures.apply(buffers, layer, features, stats, *_layer_parameters(layer))


class Transition(Function):
    """Norm, ReLU, average pooling, 1x1 convolution, which gives what pooling after it gives.

    Of features (N * H * W, C) and their statistics (2, C); size is (N, H, W). The gradients of both are its own: what
    made the features adds to them in place.
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
        norm = ctx.norm = Norm.of_batch(*stats, weight, bias, transition.norm.eps)
        ctx.pool, ctx.size = pool, size
        ctx.save_for_backward(features, weight, bias, conv)
        update_running_stats(transition.norm, norm.mean, norm.var, len(features))
        x = features.view(*size, -1)
        matrix = conv.flatten(1).to(x.dtype)
        n, h, w = size
        maps = empty_maps((n, h // 2, w // 2), len(matrix), x)
        out = maps.permute(0, 2, 3, 1)
        for images in row_parts(x, n, x[0].numel()):
            y = norm.forward(x[images], torch.empty_like(x[images]))
            out[images] = F.avg_pool2d(as_maps(y), 2).permute(0, 2, 3, 1) @ matrix.t()
        return maps

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor):
        check_first_order(dout)
        features, _, _, conv = ctx.saved_tensors
        norm = ctx.norm
        x = features.view(*ctx.size, -1)
        matrix = conv.flatten(1).to(x.dtype)
        daffine = norm.mean.new_zeros((2, x.shape[-1]))
        dconv = torch.zeros_like(matrix, dtype=conv.dtype)
        dx = ctx.pool.empty(x.shape, x)
        with torch.autocast(x.device.type, enabled=False):
            for images in row_parts(x, len(x), x[0].numel()):
                y, d = norm.forward(x[images], torch.empty_like(x[images])), dout[images].permute(0, 2, 3, 1)
                dconv += d.flatten(0, 2).t() @ as_pixels(F.avg_pool2d(as_maps(y), 2))
                dy = torch.ops.aten.avg_pool2d_backward(
                    as_maps(d @ matrix), as_maps(y), [2, 2], [2, 2], [0, 0], False, True, None).permute(0, 2, 3, 1)
                daffine += norm.parameter_gradients(dy, y, x[images], out=dy)
                torch.mul(dy, norm.scale.to(x.dtype), out=dx[images])
        dstats = norm.stats_gradient(*daffine)
        let_go(ctx, 'norm', 'pool')
        return None, None, None, dx.view(features.shape), dstats, *daffine, dconv[..., None, None]
