"""Batch norm with ReLU on a GPU in few passes over its maps: statistics, output, and gradients.

torch's own operations take more passes and more kernels: they do not share statistics, and normalise, activate, add and
add up one after another. Maps are matrices (rows, C) here, of a row for each pixel and channels next to each other;
statistics and what they are used with have float32, or float64 where the maps have.
"""
from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

__all__ = [
    'KernelNorm', 'add_stats_gradient', 'join', 'join_backward', 'moments', 'new_sums', 'norm_gradients', 'norm_relu',
    'norm_relu_backward', 'try_kernels']

# Rows that a program works on at a time, and at most so many channels.
BLOCK_ROWS = 64
MAX_BLOCK_CHANNELS = 64
# Programs that one column of blocks is shared by where sums are taken; each leaves a row of partial sums.
MAX_PROGRAMS = 512
# Of these rows so many are added up at a time, and so many channels.
BLOCK_SUMS = 512
BLOCK_SUM_CHANNELS = 4


class KernelNorm(NamedTuple):
    """Batch norm of given statistics; tensors are contiguous, (C,)."""
    mean: torch.Tensor
    var: torch.Tensor  # biased
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def part(self, channels: slice) -> 'KernelNorm':
        """The norm of some of the channels."""
        return KernelNorm(*(values[channels] for values in self[:4]), self.eps)


@triton.jit
def _affine(mean, var, weight, bias, c, inside, eps):
    """Mean, scale and shift of channels c."""
    m = tl.load(mean + c, inside, 0.)
    scale = tl.load(weight + c, inside, 0.) / tl.sqrt(tl.load(var + c, inside, 1.) + eps)
    return m, scale, tl.load(bias + c, inside, 0.) - m * scale


@triton.jit
def _normed(x, scale, shift):
    """scale x + shift, with a row of scale and shift for each of x."""
    return x.to(scale.dtype) * scale[None, :] + shift[None, :]


@triton.jit
def _relu(x):
    # Written so that what is not a number stays so.
    return tl.where(x <= 0., 0., x)


@triton.jit
def _moments_kernel(
        x, out, partial, rows, channels, x_stride, out_stride, COPIES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    dtype = partial.dtype.element_ty
    # Sums of squares of what is left of a value of the channel keep their digits where the mean is far from 0.
    pivot = tl.load(x + program.to(tl.int64) * BLOCK_ROWS * x_stride + c, c < channels, 0.).to(dtype)
    total = tl.zeros([BLOCK_CHANNELS], dtype)
    square = tl.zeros([BLOCK_CHANNELS], dtype)
    count = 0
    for start in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (r < rows)[:, None] & (c < channels)[None, :]
        value = tl.load(x + r[:, None] * x_stride + c[None, :], inside, 0.)
        if COPIES:
            tl.store(out + r[:, None] * out_stride + c[None, :], value, inside)
        d = tl.where(inside, value.to(dtype) - pivot[None, :], 0.)
        total += tl.sum(d, 0)
        square += tl.sum(d * d, 0)
        count += tl.minimum(rows - start, BLOCK_ROWS)
    row = partial + program * 3 * channels + c
    size = count.to(dtype)
    tl.store(row, pivot + total / size, c < channels)
    tl.store(row + channels, square - total * total / size, c < channels)
    tl.store(row + 2 * channels, tl.zeros([BLOCK_CHANNELS], dtype) + size, c < channels)


@triton.jit
def _join_moments_kernel(
        partial, mean, var, running_mean, running_var, batches, programs, rows, channels, momentum: tl.constexpr,
        UPDATES: tl.constexpr, BLOCK_SUMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    dtype = partial.dtype.element_ty
    total = tl.zeros([BLOCK_CHANNELS], dtype)
    for start in range(0, programs, BLOCK_SUMS):
        r = start + tl.arange(0, BLOCK_SUMS)
        inside = (r < programs)[:, None] & (c < channels)[None, :]
        part = partial + r[:, None] * 3 * channels + c[None, :]
        total += tl.sum(tl.load(part, inside, 0.) * tl.load(part + 2 * channels, inside, 0.), 0)
    m = total / rows
    square = tl.zeros([BLOCK_CHANNELS], dtype)
    for start in range(0, programs, BLOCK_SUMS):
        r = start + tl.arange(0, BLOCK_SUMS)
        inside = (r < programs)[:, None] & (c < channels)[None, :]
        part = partial + r[:, None] * 3 * channels + c[None, :]
        d = tl.load(part, inside, 0.) - m[None, :]
        square += tl.sum(tl.load(part + channels, inside, 0.) + d * d * tl.load(part + 2 * channels, inside, 0.), 0)
    tl.store(mean + c, m, c < channels)
    tl.store(var + c, square / rows, c < channels)
    if UPDATES:
        before = tl.load(running_mean + c, c < channels, 0.)
        tl.store(running_mean + c, before + (m - before) * momentum, c < channels)
        before = tl.load(running_var + c, c < channels, 0.)
        tl.store(running_var + c, before + (square / (rows - 1) - before) * momentum, c < channels)
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _forward_kernel(
        x, out, mean, var, weight, bias, rows, channels, x_stride, out_stride, eps: tl.constexpr,
        BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m, scale, shift = _affine(mean, var, weight, bias, c, c < channels, eps)
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    y = _relu(_normed(tl.load(x + r[:, None] * x_stride + c[None, :], inside, 0.), scale, shift))
    tl.store(out + r[:, None] * out_stride + c[None, :], y.to(out.dtype.element_ty), inside)


@triton.jit
def _join_kernel(
        x, mean, var, weight, bias, other, other_mean, other_var, other_weight, other_bias, y, out, rows, channels,
        x_stride, other_stride, y_stride, eps: tl.constexpr, other_eps: tl.constexpr, BLOCK_ROWS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m, scale, shift = _affine(mean, var, weight, bias, c, c < channels, eps)
    m, other_scale, other_shift = _affine(
        other_mean, other_var, other_weight, other_bias, c, c < channels, other_eps)
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    value = tl.load(other + r[:, None] * other_stride + c[None, :], inside, 0.)
    added = _relu(_normed(value, other_scale, other_shift))
    tl.store(y + r[:, None] * y_stride + c[None, :], added.to(y.dtype.element_ty), inside)
    total = added + _relu(_normed(tl.load(x + r[:, None] * x_stride + c[None, :], inside, 0.), scale, shift))
    tl.store(out + r[:, None] * channels + c[None, :], total.to(out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
        x, dy, dx, sums, mean, var, weight, bias, rows, channels, x_stride, dy_stride, dx_stride, sums_stride,
        eps: tl.constexpr, ADDS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
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
        d = tl.load(dy + r[:, None] * dy_stride + c[None, :], inside, 0.).to(scale.dtype)
        d = tl.where(_normed(value, scale, shift) <= 0., 0., d)
        total += tl.sum(d, 0)
        centered += tl.sum(d * (value - m[None, :]), 0)
        place = dx + r[:, None] * dx_stride + c[None, :]
        gradient = d * scale[None, :]
        if ADDS:
            gradient += tl.load(place, inside, 0.).to(scale.dtype)
        tl.store(place, gradient.to(dx.dtype.element_ty), inside)
    row = sums + program * 2 * sums_stride + c
    tl.store(row, total, c < channels)
    tl.store(row + sums_stride, centered, c < channels)


@triton.jit
def _join_backward_kernel(
        dout, x, dx, sums, mean, var, weight, bias, other, dy, dother, other_sums, other_mean, other_var, other_weight,
        other_bias, rows, channels, x_stride, dx_stride, sums_stride, other_stride, dy_stride, dother_stride,
        other_sums_stride, eps: tl.constexpr, other_eps: tl.constexpr, BLOCK_ROWS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m, scale, shift = _affine(mean, var, weight, bias, c, c < channels, eps)
    other_m, other_scale, other_shift = _affine(
        other_mean, other_var, other_weight, other_bias, c, c < channels, other_eps)
    total = tl.zeros([BLOCK_CHANNELS], scale.dtype)
    centered = tl.zeros([BLOCK_CHANNELS], scale.dtype)
    other_total = tl.zeros([BLOCK_CHANNELS], scale.dtype)
    other_centered = tl.zeros([BLOCK_CHANNELS], scale.dtype)
    for start in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (r < rows)[:, None] & (c < channels)[None, :]
        d = tl.load(dout + r[:, None] * channels + c[None, :], inside, 0.).to(scale.dtype)
        value = tl.load(other + r[:, None] * other_stride + c[None, :], inside, 0.).to(scale.dtype)
        both = d + tl.load(dy + r[:, None] * dy_stride + c[None, :], inside, 0.).to(scale.dtype)
        both = tl.where(_normed(value, other_scale, other_shift) <= 0., 0., both)
        other_total += tl.sum(both, 0)
        other_centered += tl.sum(both * (value - other_m[None, :]), 0)
        gradient = (both * other_scale[None, :]).to(dother.dtype.element_ty)
        tl.store(dother + r[:, None] * dother_stride + c[None, :], gradient, inside)
        value = tl.load(x + r[:, None] * x_stride + c[None, :], inside, 0.).to(scale.dtype)
        d = tl.where(_normed(value, scale, shift) <= 0., 0., d)
        total += tl.sum(d, 0)
        centered += tl.sum(d * (value - m[None, :]), 0)
        gradient = (d * scale[None, :]).to(dx.dtype.element_ty)
        tl.store(dx + r[:, None] * dx_stride + c[None, :], gradient, inside)
    row = sums + program * 2 * sums_stride + c
    tl.store(row, total, c < channels)
    tl.store(row + sums_stride, centered, c < channels)
    row = other_sums + program * 2 * other_sums_stride + c
    tl.store(row, other_total, c < channels)
    tl.store(row + other_sums_stride, other_centered, c < channels)


@triton.jit
def _norm_gradients_kernel(
        sums, gradients, var, weight, programs, channels, eps: tl.constexpr, BLOCK_SUMS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    dtype = sums.dtype.element_ty
    total = tl.zeros([BLOCK_CHANNELS], dtype)
    centered = tl.zeros([BLOCK_CHANNELS], dtype)
    for start in range(0, programs, BLOCK_SUMS):
        r = start + tl.arange(0, BLOCK_SUMS)
        inside = (r < programs)[:, None] & (c < channels)[None, :]
        part = sums + r[:, None] * 2 * channels + c[None, :]
        total += tl.sum(tl.load(part, inside, 0.), 0)
        centered += tl.sum(tl.load(part + channels, inside, 0.), 0)
    invstd = 1. / tl.sqrt(tl.load(var + c, c < channels, 1.) + eps)
    scale = tl.load(weight + c, c < channels, 0.) * invstd
    tl.store(gradients + c, invstd * centered, c < channels)
    tl.store(gradients + channels + c, total, c < channels)
    tl.store(gradients + 2 * channels + c, -scale * total, c < channels)
    tl.store(gradients + 3 * channels + c, -0.5 * scale * invstd * invstd * centered, c < channels)


@triton.jit
def _add_stats_gradient_kernel(
        dx, x, out, mean, dmean, dvar, rows, channels, dx_stride, x_stride, out_stride, BLOCK_ROWS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    slope = 2. * tl.load(dvar + c, c < channels, 0.) / rows
    offset = tl.load(dmean + c, c < channels, 0.) / rows - tl.load(mean + c, c < channels, 0.) * slope
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    d = tl.load(dx + r[:, None] * dx_stride + c[None, :], inside, 0.).to(slope.dtype)
    d += _normed(tl.load(x + r[:, None] * x_stride + c[None, :], inside, 0.), slope, offset)
    tl.store(out + r[:, None] * out_stride + c[None, :], d.to(out.dtype.element_ty), inside)


def _blocks(rows: int, channels: int) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """Number of blocks, and their size, in rows and channels."""
    width = min(MAX_BLOCK_CHANNELS, triton.next_power_of_2(channels))
    return (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(channels, width)), (BLOCK_ROWS, width)


def _programs(blocks: Tuple[int, int]) -> Tuple[int, int]:
    """Number of programs where sums are taken; the first one depends on the rows alone."""
    return min(blocks[0], MAX_PROGRAMS), blocks[1]


def _check(x: torch.Tensor, *values: torch.Tensor) -> None:
    """Refuses what the kernels, which know no ends of tensors, would read and write past."""
    sizes = sorted({len(value) for value in values} - {x.shape[1]})
    if sizes:
        raise ValueError(f'a norm of {sizes[0]} channels cannot take maps of {x.shape[1]}')


def moments(
        x: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        running: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = None,
        momentum: float = 0.,
        copy: Optional[torch.Tensor] = None,
) -> None:
    """Mean and biased variance of the channels.

    Args:
        x: (rows, C), channels next to each other; of two rows or more where running statistics follow.
        mean: Where the mean is written, (C,), contiguous.
        var: The biased variance likewise.
        running: Running mean and variance, (C,), and number of batches, to be updated as by batch norm.
        momentum: Share of this batch in them.
        copy: Where x is written besides, (rows, C), channels next to each other, in the dtype of x.

    Raises:
        ValueError: If there are other than C values of one of them; so do all functions that take a norm.
    """
    _check(x, mean, var, *(running or ())[:2])
    rows, channels = x.shape
    blocks, sizes = _blocks(rows, channels)
    grid = _programs(blocks)
    partial = mean.new_empty((grid[0], 3, channels))
    out = x if copy is None else copy
    running_mean, running_var, batches = (mean, var, mean) if running is None else running
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _moments_kernel[grid](
            x, out, partial, rows, channels, x.stride(0), out.stride(0), copy is not None, *sizes)
        _join_moments_kernel[(triton.cdiv(channels, BLOCK_SUM_CHANNELS),)](
            partial, mean, var, running_mean, running_var, batches, grid[0], rows, channels, momentum,
            running is not None, BLOCK_SUMS, BLOCK_SUM_CHANNELS)


def norm_relu(x: torch.Tensor, norm: KernelNorm, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """relu(weight (x - mean) / sqrt(var + eps) + bias).

    Args:
        x: (rows, C), channels next to each other.
        norm: Of the C channels.
        out: Where it is written, (rows, C), channels next to each other; None for a new matrix.

    Returns:
        (rows, C) with the dtype of x.
    """
    _check(x, norm.mean, norm.weight)
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device) if out is None else out
    blocks, sizes = _blocks(rows, channels)
    with torch.cuda.device_of(x):
        _forward_kernel[blocks](x, out, *norm[:4], rows, channels, x.stride(0), out.stride(0), norm.eps, *sizes)
    return out


def join(
        x: torch.Tensor, norm: KernelNorm, other: torch.Tensor, other_norm: KernelNorm, y: torch.Tensor,
) -> torch.Tensor:
    """Sum of two maps, each after its norm and ReLU; writes what the other one adds to it.

    Args:
        x: (rows, C), channels next to each other.
        norm: Of x.
        other: (rows, C), channels next to each other.
        other_norm: Of the other maps.
        y: Where relu(norm(other)) is written, (rows, C), channels next to each other.

    Returns:
        (rows, C), contiguous, with the dtype of x.
    """
    _check(x, norm.mean, norm.weight, other_norm.mean, other_norm.weight)
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    blocks, sizes = _blocks(rows, channels)
    with torch.cuda.device_of(x):
        _join_kernel[blocks](
            x, *norm[:4], other, *other_norm[:4], y, out, rows, channels, x.stride(0), other.stride(0), y.stride(0),
            norm.eps, other_norm.eps, *sizes)
    return out


def new_sums(x: torch.Tensor, norm: KernelNorm) -> torch.Tensor:
    """For the partial sums (P, 2, C) of the gradients of a norm of x (rows, C), of all channels or some at a time."""
    programs, _ = _programs(_blocks(*x.shape)[0])
    return norm.mean.new_empty((programs, 2, x.shape[1]))


def norm_relu_backward(
        dy: torch.Tensor, x: torch.Tensor, norm: KernelNorm, dx: torch.Tensor, sums: torch.Tensor, adds: bool = False,
) -> None:
    """Gradient of x, with mean and variance taken as given, to dx; what the norm's are made of to sums.

    Args:
        dy: Gradient of ``norm_relu``'s output, (rows, C), channels next to each other.
        x: As of ``norm_relu``, like norm.
        norm: Of x.
        dx: (rows, C), channels next to each other.
        sums: Of ``new_sums``, or its columns of these channels.
        adds: Whether the gradient is added to dx, or written there.
    """
    rows, channels = x.shape
    blocks, sizes = _blocks(rows, channels)
    with torch.cuda.device_of(x):
        _backward_kernel[_programs(blocks)](
            x, dy, dx, sums, *norm[:4], rows, channels, x.stride(0), dy.stride(0), dx.stride(0), sums.stride(1),
            norm.eps, adds, *sizes)


def join_backward(
        dout: torch.Tensor,
        x: torch.Tensor,
        norm: KernelNorm,
        dx: torch.Tensor,
        sums: torch.Tensor,
        other: torch.Tensor,
        other_norm: KernelNorm,
        dy: torch.Tensor,
        dother: torch.Tensor,
        other_sums: torch.Tensor,
) -> None:
    """Gradients of both maps of ``join``, as of ``norm_relu_backward``.

    Args:
        dout: Gradient of the sum, (rows, C), contiguous.
        x: As of ``join``, like norm, other and other_norm.
        norm: Of x.
        dx: Where the gradient of x is written.
        sums: Where its sums are.
        other: The other maps.
        other_norm: Of them.
        dy: Gradient of y that comes from elsewhere, (rows, C), channels next to each other.
        dother: Where the gradient of the other maps is written.
        other_sums: Where its sums are.
    """
    rows, channels = x.shape
    blocks, sizes = _blocks(rows, channels)
    with torch.cuda.device_of(x):
        _join_backward_kernel[_programs(blocks)](
            dout, x, dx, sums, *norm[:4], other, dy, dother, other_sums, *other_norm[:4], rows, channels, x.stride(0),
            dx.stride(0), sums.stride(1), other.stride(0), dy.stride(0), dother.stride(0), other_sums.stride(1),
            norm.eps, other_norm.eps, *sizes)


def norm_gradients(sums: torch.Tensor, norm: KernelNorm) -> torch.Tensor:
    """Gradients (4, C) of weight, bias, mean and variance, from the sums (P, 2, C) that the backward pass left."""
    programs, _, channels = sums.shape
    gradients = sums.new_empty((4, channels))
    with torch.cuda.device_of(sums):
        _norm_gradients_kernel[(triton.cdiv(channels, BLOCK_SUM_CHANNELS),)](
            sums, gradients, norm.var, norm.weight, programs, channels, norm.eps, BLOCK_SUMS, BLOCK_SUM_CHANNELS)
    return gradients


def add_stats_gradient(
        dx: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, dstats: torch.Tensor, out: torch.Tensor) -> None:
    """Writes to out dx and what the gradients (2, C) of mean and biased variance of x add to it; all (rows, C)."""
    rows, channels = x.shape
    blocks, sizes = _blocks(rows, channels)
    with torch.cuda.device_of(x):
        _add_stats_gradient_kernel[blocks](
            dx, x, out, mean, *dstats, rows, channels, dx.stride(0), x.stride(0), out.stride(0), *sizes)


def try_kernels(device: torch.device) -> None:
    """Runs all kernels once, on next to nothing; raises what stands in their way."""
    x, y = torch.ones((2, 2, 2), device=device)
    norm = KernelNorm(*torch.ones((4, 2), device=device), 1e-5)
    sums, other_sums = new_sums(x, norm), new_sums(x, norm)
    batches = torch.zeros((), dtype=torch.int64, device=device)
    moments(x, norm.mean, norm.var, (*torch.ones((2, 2), device=device), batches), 0.1)
    total = join(x, norm, norm_relu(x, norm), norm, y)
    norm_relu_backward(total, x, norm, y, sums)
    join_backward(total, x, norm, y, sums, x, norm, total, torch.empty_like(x), other_sums)
    add_stats_gradient(y, x, norm.mean, norm_gradients(sums, norm)[2:], y)
