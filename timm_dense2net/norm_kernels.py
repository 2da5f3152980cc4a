"""Batch norm with ReLU of given statistics on a GPU: one pass over a matrix forward, one backward.

torch's own operations take three passes and six: they do not know that the statistics are there already, and normalise,
activate and add up gradients one after another.
"""
from typing import Tuple

import torch
import triton
import triton.language as tl

__all__ = ['norm_relu', 'norm_relu_backward']

# Rows and channels that a program works on at a time.
BLOCK_ROWS = 64
BLOCK_CHANNELS = 64
# Programs that one column of blocks is shared by in the backward pass; each leaves a row of partial sums.
MAX_PROGRAMS = 512


@triton.jit
def _affine(mean, var, weight, bias, c, inside, eps):
    """Mean, scale and shift of channels c."""
    m = tl.load(mean + c, inside, 0.)
    scale = tl.load(weight + c, inside, 0.) / tl.sqrt(tl.load(var + c, inside, 1.) + eps)
    return m, scale, tl.load(bias + c, inside, 0.) - m * scale


@triton.jit
def _forward_kernel(
        x, out, mean, var, weight, bias, rows, channels, x_stride, eps: tl.constexpr,
        BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m, scale, shift = _affine(mean, var, weight, bias, c, c < channels, eps)
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    y = tl.load(x + r[:, None] * x_stride + c[None, :], inside, 0.).to(scale.dtype) * scale[None, :] + shift[None, :]
    # Written so that what is not a number stays so.
    tl.store(out + r[:, None] * channels + c[None, :], tl.where(y <= 0., 0., y).to(out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
        x, dy, dx, sums, mean, var, weight, bias, rows, channels, x_stride, dx_stride, eps: tl.constexpr,
        ADDS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m, scale, shift = _affine(mean, var, weight, bias, c, c < channels, eps)
    total = tl.zeros([BLOCK_CHANNELS], scale.dtype)
    centered = tl.zeros([BLOCK_CHANNELS], scale.dtype)
    for start in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (r < rows)[:, None] & (c < channels)[None, :]
        value = tl.load(x + r[:, None] * x_stride + c[None, :], inside, 0.).to(scale.dtype)
        d = tl.load(dy + r[:, None] * channels + c[None, :], inside, 0.).to(scale.dtype)
        d = tl.where(value * scale[None, :] + shift[None, :] <= 0., 0., d)
        total += tl.sum(d, 0)
        centered += tl.sum(d * (value - m[None, :]), 0)
        place = dx + r[:, None] * dx_stride + c[None, :]
        gradient = d * scale[None, :]
        if ADDS:
            gradient += tl.load(place, inside, 0.).to(scale.dtype)
        tl.store(place, gradient.to(dx.dtype.element_ty), inside)
    row = sums + program * 2 * channels + c
    tl.store(row, total, c < channels)
    tl.store(row + channels, centered, c < channels)


def norm_relu(
        x: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
) -> torch.Tensor:
    """relu(weight (x - mean) / sqrt(var + eps) + bias).

    Args:
        x: (rows, C), channels next to each other.
        mean: (C,), as all but x in float32, or float64 where x is.
        var: (C,).
        weight: (C,), contiguous like the others.
        bias: (C,).
        eps: Added to the variance.

    Returns:
        (rows, C), contiguous, with the dtype of x.
    """
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    grid = triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(channels, BLOCK_CHANNELS)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _forward_kernel[grid](
            x, out, mean, var, weight, bias, rows, channels, x.stride(0), eps, BLOCK_ROWS, BLOCK_CHANNELS)
    return out


def norm_relu_backward(
        dy: torch.Tensor,
        x: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        dx: torch.Tensor,
        adds: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and bias, (C,), and that of x, mean and variance taken as given, to dx.

    Args:
        dy: Gradient of ``norm_relu``'s output, (rows, C), contiguous.
        x: As of ``norm_relu``, like mean, var, weight, bias and eps.
        dx: (rows, C), channels next to each other.
        adds: Whether the gradient is added to dx, or written there.
    """
    rows, channels = x.shape
    columns = triton.cdiv(channels, BLOCK_CHANNELS)
    programs = min(triton.cdiv(rows, BLOCK_ROWS), MAX_PROGRAMS)
    sums = torch.empty((programs, 2, channels), dtype=mean.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[programs, columns](
            x, dy, dx, sums, mean, var, weight, bias, rows, channels, x.stride(0), dx.stride(0), eps,
            adds, BLOCK_ROWS, BLOCK_CHANNELS)
    dbias, dweight = sums.sum(0)
    return dweight * (var + eps).rsqrt(), dbias
