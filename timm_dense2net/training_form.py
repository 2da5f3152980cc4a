"""Training form of the dense blocks and transitions: same mathematics as the plain form, less memory and memory traffic.

A block's features lie in one (pixels, channels) matrix, channels last, where each is written once. What the plain form
keeps or passes over once more for every layer that reads a feature is done once or made again:

* The batch statistics of a concatenation are the concatenation of the statistics. A feature's mean and variance are
  computed when it is made, and all norms that read it share them; each updates its own running statistics from them.
* Of a layer only the bottleneck (conv1's output) and the outputs of the hierarchy's convolutions are kept, with gradient
  checkpointing not even these. Concatenations, norms and activations are computed again in backward, as in
  `Memory-Efficient Implementation of DenseNets` - https://arxiv.org/abs/1707.06990
* Norm, activation and 1x1 convolution run on so few pixels at a time, that what is between them stays in the caches.
* Average pooling after a 1x1 convolution is that convolution after the pooling, on a quarter of the pixels.

With the batch's mean m and variance v of a channel x, r = (v + eps)^-1/2 and y = relu(w r (x - m) + b), the gradient of
the loss is, where d is that of y where y > 0 and 0 elsewhere, s = sum(d) and t = sum(d (x - m)) over the N pixels:

    db = s,   dw = r t,   dm = -w r s,   dv = -w r^3 t / 2,   dx = w r d + dm / N + 2 (x - m) dv / N

The first term of dx is added up over all layers that read x in one matrix, and dm and dv in one vector each. The other
two follow once, when these sums are complete: in the backward pass of what made x.
"""
from typing import Any, Iterator, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from timm.layers import BatchNormAct2d

__all__ = ['block_in_training', 'has_training_form', 'transition_in_training']

# Bytes of one intermediate result that are worked on at a time on a CPU.
CACHE_BYTES = 1 << 20


@torch.jit.ignore
def has_training_form(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a block or transition can run on x (N, C, H, W) in the training form: eagerly, on what that covers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
        return False
    if not module.training or x.device.type not in ('cpu', 'cuda') or x.numel() <= x.shape[1]:
        return False
    if torch._C._are_functorch_transforms_active():  # autograd functions with buffers do not go under torch.func
        return False
    params_dtype = torch.promote_types(x.dtype, torch.float32)
    autocasts = torch.is_autocast_enabled(x.device.type)
    if x.dtype != (torch.get_autocast_dtype(x.device.type) if autocasts else params_dtype):
        return False
    return all(_is_covered(m, params_dtype) for m in module.modules())


def _is_covered(module: nn.Module, dtype: torch.dtype) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return (
            type(module) is BatchNormAct2d and module.training and module.affine and module.weight.dtype == dtype
            and isinstance(module.act, nn.ReLU) and isinstance(module.drop, nn.Identity))
    if isinstance(module, nn.Conv2d):
        return module.weight.dtype == dtype
    return True


class _Norm(NamedTuple):
    """Batch norm with ReLU: statistics of a batch, and parameters (C,)."""
    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @property
    def invstd(self) -> torch.Tensor:
        return (self.var + self.eps).rsqrt()

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """relu(norm(x)) of (..., C)."""
        scale = self.weight * self.invstd
        return torch.addcmul(self.bias - self.mean * scale, x, scale, out=out).clamp_min_(0)

    def backward(self, dy: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Gradients of x, weight and bias from that of y, whose memory is used; x is dense, the statistics are its own."""
        dy = _relu_backward_(dy, y)
        return torch.ops.aten.native_batch_norm_backward(
            _as_maps(dy), _as_maps(x), self.weight, None, None, self.mean, self.invstd, True, self.eps, [True] * 3)


class _SharedNorm:
    """Backward of a norm with ReLU whose statistics other norms share, over parts of its input."""

    def __init__(self, norm: _Norm) -> None:
        self.norm = norm
        self.scale = norm.weight * norm.invstd
        self.sums = norm.mean.new_zeros((2, len(norm.mean)))

    def add_part(self, dy: torch.Tensor, y: torch.Tensor, x: torch.Tensor, dx: torch.Tensor) -> None:
        """Add the gradient of a part of x that does not go through the statistics to dx, all (pixels, C)."""
        _relu_backward_(dy, y)
        self.sums[0] += dy.sum(0, dtype=self.sums.dtype)
        self.sums[1] += torch.sub(x, self.norm.mean).mul_(dy).sum(0)
        dx.addcmul_(dy, self.scale.to(dx.dtype))

    def parameter_gradients(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Gradients of weight and bias, after the last part."""
        return self.sums[1] * self.norm.invstd, self.sums[0]

    def stats_gradient(self) -> torch.Tensor:
        """Gradients (2, C) of mean and variance, after the last part."""
        return torch.stack([-self.scale * self.sums[0], -0.5 * self.scale * self.norm.invstd ** 2 * self.sums[1]])


def _relu_backward_(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)


def _as_maps(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) of (N, H, W, C)."""
    return x.permute(0, 3, 1, 2)


def _as_pixels(x: torch.Tensor) -> torch.Tensor:
    """(N * H * W, C) of (N, C, H, W), without a copy if x is channels last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _batch_stats(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) of (N, C, H, W), in float32 or float64."""
    running = x.new_zeros((2, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.batch_norm_update_stats(x, running[0], running[1], 0.)


def _add_stats_gradient_(
        dx: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Add to dx (pixels, C) what the gradients (2, C) of mean and variance of x bring."""
    dmean, dvar = gradient / x.shape[0]
    return dx.add_(torch.addcmul(dmean, x - mean, 2. * dvar))


def _update_running_stats(norm: BatchNormAct2d, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    """As ``BatchNormAct2d`` does after a batch with ``count`` values a channel."""
    if not norm.track_running_stats:
        return
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean, 0. if factor is None else factor)
    norm.running_var.lerp_(var * (count / (count - 1)), 0. if factor is None else factor)


def _parts(x: torch.Tensor, length: int, row: int) -> Iterator[slice]:
    """Parts of ``length`` rows of ``row`` elements each, to be worked on one after another."""
    step = max(1, CACHE_BYTES // (row * x.element_size()) if x.device.type == 'cpu' else length)
    return (slice(start, start + step) for start in range(0, length, step))


class _Buffers:
    """Buffers of one pass through a block.

    Args:
        x: Input (N, C, H, W) of the block.
        channels: Features of the block's output.
    """

    def __init__(self, x: torch.Tensor, channels: int) -> None:
        self.size = (x.shape[0], *x.shape[2:])
        self.pixels = x.numel() // x.shape[1]
        self.features = x.new_empty((self.pixels, channels))
        self.stats = x.new_empty((2, channels), dtype=torch.promote_types(x.dtype, torch.float32))
        self._scratch = {}

    def scratch(self, name: str, splits: int, width: int) -> torch.Tensor:
        """A buffer (splits, N, H, W, width) that one layer after another writes."""
        if name not in self._scratch:
            self._scratch[name] = self.features.new_empty((splits, *self.size, width))
        return self._scratch[name]

    def free_scratch(self) -> None:
        self._scratch.clear()


class _AddFeatures(Function):
    """Write maps (N, C, H, W) and their statistics into the buffers, from a channel on.

    ``features`` and ``stats`` stand for the buffers in the graph. They go through all functions of a block, one after
    another, and so do their gradients, to which each of these adds its part in place.
    """

    @staticmethod
    def forward(ctx: Any, buffers: _Buffers, start: int, maps: torch.Tensor, features: torch.Tensor, stats: torch.Tensor):
        ctx.buffers, ctx.channels = buffers, slice(start, start + maps.shape[1])
        buffers.features[:, ctx.channels] = _as_pixels(maps)
        buffers.stats[0, ctx.channels], buffers.stats[1, ctx.channels] = _batch_stats(maps)
        return buffers.features.detach(), buffers.stats.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfeatures: torch.Tensor, dstats: torch.Tensor):
        x = ctx.buffers.features[:, ctx.channels]
        dmaps = _add_stats_gradient_(
            dfeatures[:, ctx.channels].clone(), x, ctx.buffers.stats[0, ctx.channels], dstats[:, ctx.channels])
        if ctx.channels.start == 0:
            ctx.buffers.free_scratch()
        return None, None, _as_maps(dmaps.view(*ctx.buffers.size, -1)), dfeatures, dstats


class _Output(Function):
    """Output (N, C, H, W) of a block; in backward, the buffers for the gradients of its features and statistics."""

    @staticmethod
    def forward(ctx: Any, buffers: _Buffers, features: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
        buffers.free_scratch()
        output = _as_maps(buffers.features.view(*buffers.size, -1))
        ctx.buffers = buffers
        ctx.save_for_backward(output)  # so that autograd raises if the features were changed in place
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: torch.Tensor):
        ctx.saved_tensors
        dfeatures = torch.empty_like(ctx.buffers.features)
        dfeatures.view(*ctx.buffers.size, -1).copy_(doutput.permute(0, 2, 3, 1))
        return None, dfeatures, torch.zeros_like(ctx.buffers.stats)


def _layer_parameters(layer: nn.Module) -> List[nn.Parameter]:
    norm_conv = [layer.norm1.weight, layer.norm1.bias, layer.conv1.weight, layer.norm2.weight, layer.norm2.bias]
    if isinstance(layer.conv2, nn.Conv2d):
        return [*norm_conv, layer.conv2.weight]
    hierarchy = [
        p for conv, norm in zip(layer.conv2.convs, layer.conv2.norms) for p in (conv.weight, norm.weight, norm.bias)]
    return [*norm_conv, *hierarchy, layer.conv3.weight]


class _LayerPass:
    """One dense layer up to its last convolution, on a block's buffers.

    Args:
        layer: The layer.
        buffers: Buffers whose first channels are its input.
        parameters: What ``_layer_parameters`` returns.
    """

    def __init__(self, layer: nn.Module, buffers: _Buffers, parameters: Sequence[torch.Tensor]) -> None:
        self.layer, self.buffers = layer, buffers
        self.x = buffers.features[:, :layer.conv1.in_channels]
        self.has_hierarchy = not isinstance(layer.conv2, nn.Conv2d)
        self.splits = layer.conv2.scale if self.has_hierarchy else 1
        self.width = layer.conv1.out_channels // self.splits
        weight, bias, conv1, weight2, bias2, *rest = parameters
        self.norm1 = _Norm(*buffers.stats[:, :layer.conv1.in_channels], weight, bias, layer.norm1.eps)
        self.conv1 = conv1.flatten(1).to(self.x.dtype)
        self.affine2 = list(zip(weight2.split(self.width), bias2.split(self.width)))
        if self.has_hierarchy:
            self.conv3 = rest.pop().flatten(1).to(self.x.dtype)
        self.convs = [w.to(self.x.dtype, memory_format=torch.channels_last) for w in rest[::3]]
        self.affines = list(zip(rest[1::3], rest[2::3]))

    def _scratch(self, name: str) -> torch.Tensor:
        return self.buffers.scratch(name, self.splits, self.width)

    def _conv_args(self, i: int) -> Tuple[Any, ...]:
        conv = self.layer.conv2.convs[i] if self.has_hierarchy else self.layer.conv2
        return [1, 1], conv.padding, conv.dilation, False, [0, 0], conv.groups

    def forward(self) -> torch.Tensor:
        """Output (N, C, H, W) of the last convolution. Keeps what ``backward`` needs."""
        self.maps = self._bottleneck()
        self.norms2 = [
            _Norm(*_batch_stats(_as_maps(x)), *affine, self.layer.norm2.eps)
            for x, affine in zip(self.maps, self.affine2)]
        self.outputs, self.norms = [], []
        y = self._scratch('y')
        for norm, x, out in zip(self.norms2, self.maps, y):
            norm.forward(x, out)
        for i, affine in enumerate(self.affines):
            z = torch.convolution(_as_maps(y[i + 1].add_(y[i])), self.convs[i], None, *self._conv_args(i))
            z = z.permute(0, 2, 3, 1).contiguous()
            norm = _Norm(*_batch_stats(_as_maps(z)), *affine, self.layer.conv2.norms[i].eps)
            norm.forward(z, y[i + 1])
            self.outputs.append(z)
            self.norms.append(norm)
        if not self.has_hierarchy:
            return torch.convolution(_as_maps(y[0]), self.convs[0], None, *self._conv_args(0))
        y = y.flatten(1, 3)
        new = self.x.new_empty((self.buffers.pixels, len(self.conv3)))
        for part in _parts(new, len(new), self.splits * self.width):
            torch.mm(_merge(y, part), self.conv3.t(), out=new[part])
        return _as_maps(new.view(*self.buffers.size, -1))

    def _bottleneck(self) -> torch.Tensor:
        """Output of conv1 (splits, N, H, W, width)."""
        maps = self.x.new_empty((self.splits, self.buffers.pixels, self.width))
        for part in _parts(self.x, *self.x.shape):
            x = self.x[part]
            y = self.norm1.forward(x, torch.empty_like(x, memory_format=torch.contiguous_format))
            maps[:, part] = (y @ self.conv1.t()).view(len(y), self.splits, self.width).transpose(0, 1)
        return maps.view(self.splits, *self.buffers.size, self.width)

    def update_running_stats(self) -> None:
        layer, count = self.layer, self.buffers.pixels
        _update_running_stats(layer.norm1, self.norm1.mean, self.norm1.var, count)
        _update_running_stats(
            layer.norm2, torch.cat([n.mean for n in self.norms2]), torch.cat([n.var for n in self.norms2]), count)
        for module, norm in zip(getattr(layer.conv2, 'norms', []), self.norms):
            _update_running_stats(module, norm.mean, norm.var, count)

    def backward(self, dnew: torch.Tensor, dfeatures: torch.Tensor, dstats: torch.Tensor) -> List[torch.Tensor]:
        """Add the gradients of features (pixels, C) and stats (2, C) to those given, return the parameters'."""
        sums, ys = self._activations()
        dy, dlast = self._last_conv_backward(dnew, sums, ys)
        dmaps: List[torch.Tensor] = [None] * self.splits
        daffine2: List[Tuple[torch.Tensor, ...]] = [None] * self.splits
        dhierarchy: List[torch.Tensor] = []
        dx = dy[0]
        for i in reversed(range(len(self.affines))):
            dz, dweight, dbias = self.norms[i].backward(dy[i + 1], ys[i + 1], self.outputs[i])
            dx, dconv, _ = torch.ops.aten.convolution_backward(
                dz, _as_maps(sums[i + 1]), self.convs[i], None, *self._conv_args(i), [True, True, False])
            dx = dx.permute(0, 2, 3, 1).contiguous()
            dy[i].add_(dx)
            x = self.norms2[i + 1].forward(self.maps[i + 1], ys[i + 1])
            dmaps[i + 1], *daffine2[i + 1] = self.norms2[i + 1].backward(dx, x, self.maps[i + 1])
            dhierarchy = [dconv, dweight, dbias, *dhierarchy]
        dmaps[0], *daffine2[0] = self.norms2[0].backward(dy[0], ys[0], self.maps[0])
        dweight1, dbias1, dconv1 = self._bottleneck_backward(dmaps, dfeatures, dstats)
        dweight2, dbias2 = (torch.cat(parts) for parts in zip(*daffine2))
        return [dweight1, dbias1, dconv1[..., None, None], dweight2, dbias2, *dhierarchy, dlast]

    def _activations(self) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Inputs of the hierarchy's convolutions and the outputs y_1 ... y_s, both from 0 on, of (N, H, W, width)."""
        sums, outputs = self._scratch('sums'), self._scratch('y')
        for norm, x, out in zip(self.norms2, self.maps, sums):
            norm.forward(x, out)
        ys = [sums[0]]
        for norm, z, u, out in zip(self.norms, self.outputs, sums[1:], outputs[1:]):
            u.add_(ys[-1])
            ys.append(norm.forward(z, out))
        return sums, ys

    def _last_conv_backward(
            self,
            dnew: torch.Tensor,
            sums: torch.Tensor,
            ys: List[torch.Tensor],
    ) -> Tuple[Sequence[torch.Tensor], torch.Tensor]:
        """Gradients of the hierarchy's output (splits, N, H, W, width) and of the last convolution's weight."""
        if not self.has_hierarchy:
            dx, dconv, _ = torch.ops.aten.convolution_backward(
                dnew, _as_maps(ys[0]), self.convs[0], None, *self._conv_args(0), [True, True, False])
            return [dx.permute(0, 2, 3, 1).contiguous()], dconv
        dnew = _as_pixels(dnew)
        dy = self._scratch('dy')
        dy_pixels = dy.flatten(1, 3)
        y = [y.flatten(0, 2) for y in ys]
        dconv = torch.zeros_like(self.conv3, dtype=self.norm1.weight.dtype)
        for part in _parts(dnew, len(dnew), self.splits * self.width):
            dconv += dnew[part].t() @ _merge(y, part)
            dy_pixels[:, part] = (dnew[part] @ self.conv3).view(-1, self.splits, self.width).transpose(0, 1)
        return dy, dconv[..., None, None]

    def _bottleneck_backward(
            self,
            dmaps: List[torch.Tensor],
            dfeatures: torch.Tensor,
            dstats: torch.Tensor,
    ) -> Tuple[torch.Tensor, ...]:
        """Gradients of norm1's weight and bias and of conv1's weight, from those of the splits (N, width, H, W)."""
        shared = _SharedNorm(self.norm1)
        dconv = torch.zeros_like(self.conv1, dtype=self.norm1.weight.dtype)
        dmaps = [_as_pixels(d) for d in dmaps]
        dx = dfeatures[:, :self.x.shape[1]]
        for part in _parts(self.x, *self.x.shape):
            x, d = self.x[part], _merge(dmaps, part)
            y = self.norm1.forward(x, torch.empty_like(x, memory_format=torch.contiguous_format))
            dconv += d.t() @ y
            shared.add_part(d @ self.conv1, y, x, dx[part])
        dstats[:, :self.x.shape[1]] += shared.stats_gradient()
        return *shared.parameter_gradients(), dconv


def _merge(splits: Sequence[torch.Tensor], part: slice) -> torch.Tensor:
    """Rows (rows, splits * width) of the splits (pixels, width)."""
    return splits[0][part] if len(splits) == 1 else torch.cat([split[part] for split in splits], 1)


class _NewFeatures(Function):
    """New features (N, C, H, W) of a layer before its attention."""

    @staticmethod
    def forward(
            ctx: Any,
            buffers: _Buffers,
            layer: nn.Module,
            features: torch.Tensor,
            stats: torch.Tensor,
            *parameters: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        run = _LayerPass(layer, buffers, parameters)
        new = run.forward()
        run.update_running_stats()
        ctx.buffers, ctx.layer, ctx.kept = buffers, layer, not layer.grad_checkpointing
        kept = (run.maps, *run.outputs) if ctx.kept else ()
        ctx.save_for_backward(*parameters, *kept)
        ctx.norms2, ctx.norms = run.norms2, run.norms
        return new, features, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnew: torch.Tensor, dfeatures: torch.Tensor, dstats: torch.Tensor):
        count = len(ctx.needs_input_grad) - 4
        parameters, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        with torch.autocast(dnew.device.type, enabled=False):
            run = _LayerPass(ctx.layer, ctx.buffers, parameters)
            if ctx.kept:
                run.maps, *run.outputs = kept
                run.norms2, run.norms = ctx.norms2, ctx.norms
            else:
                run.forward()
            gradients = run.backward(dnew, dfeatures, dstats)
        return None, None, dfeatures, dstats, *gradients


@torch.jit.ignore
def block_in_training(block: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    """Features (N, in_chs + num_layers * growth_rate, H, W), channels last in memory, of x (N, in_chs, H, W)."""
    layers = list(block.values())
    buffers = _Buffers(x, layers[-1].conv1.in_channels + layers[-1].growth_rate)
    features, stats = buffers.features.detach(), buffers.stats.detach()
    features, stats = _AddFeatures.apply(buffers, 0, x, features, stats)
    for layer in layers:
        with torch.autocast(x.device.type, enabled=False):
            new, features, stats = _NewFeatures.apply(buffers, layer, features, stats, *_layer_parameters(layer))
        new = layer.drop_path(layer.attn(new))
        features, stats = _AddFeatures.apply(buffers, layer.conv1.in_channels, new, features, stats)
    return _Output.apply(buffers, features, stats)


class _Transition(Function):
    """Norm, ReLU, average pooling, 1x1 convolution of (N, C, H, W), which gives what pooling after it gives."""

    @staticmethod
    def forward(
            ctx: Any,
            transition: nn.Sequential,
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            conv: torch.Tensor,
    ) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.pool = transition.pool
        ctx.norm = _Norm(*_batch_stats(x), weight, bias, transition.norm.eps)
        ctx.save_for_backward(x, weight, bias, conv)
        _update_running_stats(transition.norm, ctx.norm.mean, ctx.norm.var, x.numel() // x.shape[1])
        matrix = conv.flatten(1).to(x.dtype)
        parts = []
        for images in _parts(x, len(x), x[0].numel()):
            pooled = _pool(_normalized(ctx.norm, x[images]))
            parts.append(pooled.permute(0, 2, 3, 1) @ matrix.t())
        return _as_maps(torch.cat(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor):
        x, _, _, conv = ctx.saved_tensors
        matrix = conv.flatten(1).to(x.dtype)
        shared = _SharedNorm(ctx.norm)
        dconv = torch.zeros_like(matrix, dtype=conv.dtype)
        dx = torch.zeros_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for images in _parts(x, len(x), x[0].numel()):
                y, d = _normalized(ctx.norm, x[images]), dout[images].permute(0, 2, 3, 1)
                dconv += d.flatten(0, 2).t() @ _as_pixels(_pool(y))
                dy = torch.ops.aten.avg_pool2d_backward(
                    _as_maps(d @ matrix), y, [2, 2], [2, 2], [0, 0], False, True, None)
                shared.add_part(_as_pixels(dy), _as_pixels(y), _as_pixels(x[images]), _as_pixels(dx[images]))
            _add_stats_gradient_(_as_pixels(dx), _as_pixels(x), ctx.norm.mean, shared.stats_gradient())
        return None, dx, *shared.parameter_gradients(), dconv[..., None, None]


def _pool(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 2)


def _normalized(norm: _Norm, x: torch.Tensor) -> torch.Tensor:
    """relu(norm(x)) of maps (N, C, H, W), channels last in memory."""
    x = x.permute(0, 2, 3, 1)
    return _as_maps(norm.forward(x, torch.empty_like(x)))


@torch.jit.ignore
def transition_in_training(transition: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Output (N, out_chs, H // 2, W // 2), channels last in memory, of x (N, in_chs, H, W)."""
    norm, conv = transition.norm, transition.conv
    with torch.autocast(x.device.type, enabled=False):
        return _Transition.apply(transition, x, norm.weight, norm.bias, conv.weight)
