"""Batch norm with ReLU on maps that lie channels last, on a CPU: statistics, values and gradients, a part at a time.

With the batch's mean m and variance v of a channel x, r = (v + eps)^-1/2 and y = relu(w r (x - m) + b), the gradient of
the loss is, where d is that of y where y > 0 and 0 elsewhere, s = sum(d) and t = sum(d (x - m)) over the N pixels:

    db = s,   dw = r t,   dm = -w r s,   dv = -w r^3 t / 2,   dx = w r d + dm / N + 2 (x - m) dv / N

What is done to each channel of a split of few channels is done to several pixels as one row: vector instructions want
long rows, and threads that add up sums must not write to one cache line.
"""
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from timm.layers import BatchNormAct2d

from .parts import row_parts

__all__ = [
    'Norm', 'add_scaled', 'batch_stats', 'join_stats', 'scale_and_shift', 'stats_terms', 'update_running_stats']

# On a CPU up to this number of pixels make one row where they have fewer channels than NARROW, MANY values in all.
ROW_PIXELS = 16
NARROW = 64
MANY = 1 << 15


class Norm(NamedTuple):
    """Batch norm with ReLU of one batch; tensors are (C,)."""
    mean: torch.Tensor
    var: torch.Tensor  # biased
    weight: torch.Tensor
    bias: torch.Tensor
    invstd: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    eps: float

    @classmethod
    def of_batch(
            cls,
            mean: torch.Tensor,
            var: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            eps: float,
    ) -> 'Norm':
        """The norm with this weight and bias of a batch with this mean and biased variance."""
        invstd = (var + eps).rsqrt()
        scale = weight * invstd
        return cls(mean, var, weight, bias, invstd, scale, torch.addcmul(bias, mean, scale, value=-1), eps)

    def split(self, width: int) -> List['Norm']:
        """Norms of ``width`` channels each."""
        *values, eps = self
        return [Norm(*channels, eps) for channels in zip(*(value.split(width) for value in values))]

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """relu(norm(x)) of (..., C)."""
        x, rows = _as_rows(x, out)
        scale_and_shift(x, *_repeat((self.scale, self.shift), x), out=rows).clamp_min_(0)
        return out

    def backward(self, dy: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Gradients of x, weight and bias from that of y, all (..., C), which is overwritten. Statistics are of x."""
        x, dnormed = _as_rows(x, _relu_backward(dy, y, out=dy))
        if x.shape[1] == len(self.mean):
            dx, *daffine = self._backward(dnormed, x, [True, True, True])
            return dx.view(y.shape), *daffine
        daffine = self._affine_gradients(dnormed, x)
        terms = stats_terms(self.mean, self.stats_gradient(*daffine), y.numel() // y.shape[-1])
        offset, slope, scale = _repeat((*terms, self.scale), x)
        for part in row_parts(x, *x.shape):
            add_scaled(scale_and_shift(x[part], slope, offset), dnormed[part], scale, out=dnormed[part])
        return dy, *daffine

    def parameter_gradients(
            self, dy: torch.Tensor, y: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Gradients (2, C) of weight and bias from a part (..., C) of x; writes the gradient of norm(x) to out."""
        x, dnormed = _as_rows(x, _relu_backward(dy, y, out))
        return self._affine_gradients(dnormed, x)

    def _affine_gradients(self, dnormed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Gradients (2, C) of weight and bias from rows (rows, pixels * C)."""
        _, *gradients = self._backward(dnormed, x, [False, True, True])
        gradients = torch.stack(gradients)
        return gradients if x.shape[1] == len(self.mean) else gradients.view(2, -1, len(self.mean)).sum(1)

    def _backward(self, dnormed: torch.Tensor, x: torch.Tensor, mask: List[bool]) -> Tuple[torch.Tensor, ...]:
        weight, mean, invstd = _repeat((self.weight, self.mean, self.invstd), x)
        return torch.ops.aten.native_batch_norm_backward(
            dnormed, x, weight, None, None, mean, invstd, True, self.eps, mask)

    def stats_gradient(self, dweight: torch.Tensor, dbias: torch.Tensor) -> torch.Tensor:
        """Gradients (2, C) of mean and variance, from those of weight and bias."""
        return torch.stack([-self.scale * dbias, -0.5 * self.scale * self.invstd * dweight])


def _relu_backward(dy: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=out)


def _as_rows(*tensors: torch.Tensor) -> List[torch.Tensor]:
    """(rows, pixels * C) of (..., C), without a copy: several pixels as one row where that pays, else one."""
    channels, pixels = tensors[0].shape[-1], 1
    if channels < NARROW and tensors[0].numel() >= MANY and all(
            t.device.type == 'cpu' and t.is_contiguous() for t in tensors):
        pixels = math.gcd(tensors[0].numel() // channels, ROW_PIXELS)
    return [t.view(-1, pixels * channels) for t in tensors]


def _repeat(values: Sequence[torch.Tensor], rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Values (C,) of the channels for each pixel of rows (rows, pixels * C)."""
    pixels = rows.shape[1] // len(values[0])
    return values if pixels == 1 else [value.repeat(pixels) for value in values]


def scale_and_shift(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: Optional[torch.Tensor] = None,
        out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """shift + scale x of (rows, ...); scale and shift (...) have the dtype of the statistics, out is contiguous."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    shift = torch.zeros_like(scale) if shift is None else shift
    if _is_one_pass(x, scale):
        return torch.addcmul(shift, x, scale, out=out)
    # Batch norm knows bfloat16 maps with float32 statistics, here those of a channel of mean 0 and variance 1.
    scale, shift = scale.flatten(), shift.flatten()
    unused = scale.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x.contiguous().view(-1, len(scale)), scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.,
        0., out=out.view(-1, len(scale)), save_mean=unused, save_invstd=unused)
    return out


def add_scaled(total: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes total + scale x to out, which may be either; as in ``scale_and_shift``."""
    if _is_one_pass(x, scale):
        return torch.addcmul(total, x, scale, out=out)
    return torch.add(total, scale_and_shift(x, scale), out=out)


def _is_one_pass(x: torch.Tensor, scale: torch.Tensor) -> bool:
    # A CPU's operations on two dtypes convert both to one, in passes of their own.
    return x.dtype == scale.dtype or x.device.type != 'cpu'


def batch_stats(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) of (N, C, H, W), in float32 or float64."""
    channels = x.shape[1]
    if x.permute(0, 2, 3, 1).is_contiguous():
        x = _as_rows(x.permute(0, 2, 3, 1))[0][..., None, None]
    running = None
    if x.dtype.itemsize < 4 and x.device.type == 'cpu':  # the statistics have the dtype of the running ones
        running = x.new_zeros(x.shape[1], dtype=torch.float32)
    mean, var = torch.batch_norm_update_stats(x, running, running, 0.)
    if len(mean) == channels:
        return mean, var
    return join_stats(mean.view(-1, channels), var.view(-1, channels), channels / len(mean))


def join_stats(
        means: torch.Tensor, variances: torch.Tensor, share: Union[float, torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) of a whole from those (parts, C) of its parts and their share (parts, 1) in it."""
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def stats_terms(mean: torch.Tensor, gradient: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Offset and slope (C,): the gradients (2, C) of mean and variance of count pixels x add offset + slope x to dx."""
    dmean, dvar = gradient / count
    slope = 2. * dvar
    return torch.addcmul(dmean, mean, slope, value=-1), slope


def update_running_stats(norm: BatchNormAct2d, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    """As ``BatchNormAct2d`` does after a batch with ``count`` values a channel."""
    if not norm.track_running_stats:
        return
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    if norm.running_mean is None:
        return
    norm.running_mean.lerp_(mean, 0. if factor is None else factor)
    norm.running_var.lerp_(var * (count / (count - 1)), 0. if factor is None else factor)
