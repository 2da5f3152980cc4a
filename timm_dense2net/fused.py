"""Inference form of the layers: norms folded into convolutions, features written once into one buffer a block.

Reached by timm's convention: ``timm.utils.reparameterize_model(model)``, or ``--reparam`` of timm's ``validate.py`` and
``benchmark.py``, calls ``fuse()`` on the modules that have it. The mathematics is that of the plain form in eval mode:

* Batch norm then ReLU is, per channel, relu(a x + b) = a clamp(x, lo, hi) + b, with one bound at t = -b / a: the lower
  for a > 0, the upper for a < 0. Before a 1x1 convolution a and b go into the convolution, and one clamp is left.
* Batch norm after a convolution goes into the convolution.
* Average pooling after a 1x1 convolution is that convolution after the pooling, on a quarter of the pixels.

The parameters of the fused layers are frozen: the form is for inference. Gradients reach the input.
"""
import copy
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct

__all__ = ['FusedDenseBlock', 'FusedDenseTransition', 'FusedSplitHierarchyConv2d', 'is_fusable']

# A bound this many standard deviations from the mean is never reached; computing with it could overflow.
UNREACHABLE_SIGMA = 1e6
# On a CPU a block works on so many bytes of images at a time, that they stay in its caches.
CACHE_BYTES = 8 << 20


def is_fusable(*norms: nn.Module) -> bool:
    """Whether each of the layers is batch norm with statistics of its own, then ReLU and nothing else."""
    return all(
        isinstance(norm, (BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct))
        and isinstance(norm.act, nn.ReLU)
        and isinstance(getattr(norm, 'drop', None), (nn.Identity, type(None)))
        and norm.running_mean is not None
        for norm in norms)


def norm_as_affine(norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) in float64 of a batch norm in eval mode."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def norm_relu_as_clamp(norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bounds, scale and shift (C,) in float64 such that relu(norm(x)) = scale * clamp(x, lo, hi) + shift.

    A channel that does not depend on its input, since its weight is 0 or its bound is out of reach, is clamped to 0.
    """
    scale, shift = norm_as_affine(norm)
    mean = norm.running_mean.double()
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    bound = -shift / scale
    varies = (bound - mean).abs() < UNREACHABLE_SIGMA * sigma  # false also where bound is not a number
    lo = torch.where(scale > 0, bound, -torch.inf).where(varies, 0.)
    hi = torch.where(scale < 0, bound, torch.inf).where(varies, 0.)
    at_mean = (scale * mean + shift).clamp(min=0.)
    return lo, hi, scale.where(varies, 0.), shift.where(varies, at_mean)


def _fold_norm(
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        norm: nn.Module,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias in float64 of a convolution and the norm after it in one."""
    scale, shift = norm_as_affine(norm)
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    return weight.detach().double() * scale.view(-1, *[1] * (weight.ndim - 1)), shift


def _fold_conv(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    weight, bias = _fold_norm(conv.weight, conv.bias, norm)
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        device=conv.weight.device, dtype=conv.weight.dtype)
    folded.load_state_dict(dict(weight=weight, bias=bias))
    return folded.to(memory_format=torch.channels_last)


def _as_linear(weight: torch.Tensor, bias: Optional[torch.Tensor], like: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, device=like.device, dtype=like.dtype)
    linear.load_state_dict(dict(weight=weight) if bias is None else dict(weight=weight, bias=bias))
    return linear


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _writes_in_place(x: torch.Tensor) -> bool:
    """Whether buffers may be written in place: neither traced nor differentiated, and of one dtype throughout."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or isinstance(x, torch.fx.Proxy)
        or _autocasts(x.device.type)
        or (torch.is_grad_enabled() and x.requires_grad))


def _images_at_a_time(x: torch.Tensor, channels: int) -> int:
    """How many images of ``channels`` channels and the size of x to work on at a time."""
    if x.device.type != 'cpu':
        return max(1, x.shape[0])
    return max(1, CACHE_BYTES // (channels * x.shape[2] * x.shape[3] * x.element_size()))


class ClampLinear(nn.Module):
    """Norm, ReLU, 1x1 convolution and, where there is one, the norm after it, as a clamp and a matrix product.

    Shape: (..., in_chs) -> (..., out_chs), channels last.
    """

    def __init__(self, norm: nn.Module, conv: nn.Conv2d, norm_after: Optional[nn.Module] = None) -> None:
        super().__init__()
        lo, hi, scale, shift = norm_relu_as_clamp(norm)
        weight = conv.weight.detach().double().flatten(1)
        bias = weight @ shift
        weight = weight * scale
        if conv.bias is not None:
            bias = bias + conv.bias.detach().double()
        if norm_after is not None:
            weight, bias = _fold_norm(weight, bias, norm_after)
        self.register_buffer('lo', lo.to(conv.weight.dtype))
        self.register_buffer('hi', hi.to(conv.weight.dtype))
        self.linear = _as_linear(weight, bias, conv.weight)

    def clamp(self, x: torch.Tensor) -> torch.Tensor:
        """The activation short of its scale and shift."""
        return torch.clamp(x, self.lo.to(x.dtype), self.hi.to(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.clamp(x))


class FusedSplitHierarchyConv2d(nn.Module):
    """``SplitHierarchyConv2d`` with its norms folded.

    Shape: (N, channels, H, W) -> (N, channels, H, W).
    """

    def __init__(self, hierarchy: nn.Module) -> None:
        super().__init__()
        self.width = hierarchy.width
        self.convs = nn.ModuleList([
            _fold_conv(conv, norm) for conv, norm in zip(hierarchy.convs, hierarchy.norms)])
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        splits = torch.split(x, self.width, 1)
        y = splits[0]
        outputs = [y]
        for i, conv in enumerate(self.convs):
            y = F.relu(conv(splits[i + 1] + y))
            outputs.append(y)
        return torch.cat(outputs, 1)

    @torch.jit.unused
    def forward_(self, x: torch.Tensor) -> torch.Tensor:
        """The same, in place of x: what is left of a split after the addition is room for its result."""
        splits = torch.split(x, self.width, 1)
        for y, split, conv in zip(splits, splits[1:], self.convs):
            torch.clamp_min(conv(split + y), 0, out=split)
        return x


class FusedDenseLayer(nn.Module):
    """``DenseLayer`` with its norms folded.

    Shape: (N, in_chs, H, W) -> (N, growth_rate, H, W).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.in_chs = layer.conv1.in_channels
        self.conv1 = ClampLinear(layer.norm1, layer.conv1, norm_after=layer.norm2)
        self.has_hierarchy = not isinstance(layer.conv2, nn.Conv2d)
        if self.has_hierarchy:
            self.conv2 = FusedSplitHierarchyConv2d(layer.conv2)
            self.conv3 = _as_linear(layer.conv3.weight.detach().flatten(1), None, layer.conv3.weight)
        else:
            self.conv2 = copy.deepcopy(layer.conv2).to(memory_format=torch.channels_last)
            self.conv3 = nn.Identity()
        self.attn = copy.deepcopy(layer.attn)
        self.drop_path = copy.deepcopy(layer.drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.conv2(x)
        if self.has_hierarchy:
            x = self.conv3(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.drop_path(self.attn(x))

    @torch.jit.unused
    def write(self, features: torch.Tensor) -> None:
        """Write the new features behind the first ``in_chs`` channels of ``features`` (N, H, W, C), contiguous."""
        n, h, w, channels = features.shape
        pixels = features.view(-1, channels)
        x = self.conv1(pixels[:, :self.in_chs]).relu_()
        x = x.view(n, h, w, x.shape[1]).permute(0, 3, 1, 2)
        x = self.conv2.forward_(x) if self.has_hierarchy else self.conv2(x)
        if self.has_hierarchy:
            x = self.conv3(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.drop_path(self.attn(x)).permute(0, 2, 3, 1)
        features[..., self.in_chs:self.in_chs + x.shape[3]] = x


class FusedDenseBlock(nn.ModuleDict):
    """``DenseBlock`` for inference: every feature is written once, where all later layers read it.

    Shape: (N, in_chs, H, W) -> (N, in_chs + num_layers * growth_rate, H, W), channels last in memory.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, layer in block.items():
            self.add_module(name, FusedDenseLayer(layer))
            self.out_chs = layer.conv1.in_channels + layer.growth_rate
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if _writes_in_place(x):
                return self._forward_in_place(x)
        for layer in self.values():
            x = torch.cat([x, layer(x)], 1)
        return x

    @torch.jit.unused
    def _forward_in_place(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        features = x.new_empty((n, h, w, self.out_chs))
        step = _images_at_a_time(x, self.out_chs)
        for images, part in zip(x.split(step), features.split(step)):
            part[..., :c] = images.permute(0, 2, 3, 1)
            for layer in self.values():
                layer.write(part)
        return features.permute(0, 3, 1, 2)


class FusedDenseTransition(nn.Module):
    """``DenseTransition`` with its norm folded and the convolution after the pooling.

    Shape: (N, in_chs, H, W) -> (N, out_chs, H // 2, W // 2), channels last in memory.
    """

    def __init__(self, transition: nn.Module) -> None:
        super().__init__()
        self.conv = ClampLinear(transition.norm, transition.conv)
        self.pool = transition.pool
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if _writes_in_place(x):
                parts = x.split(_images_at_a_time(x, x.shape[1]))
                return torch.cat([self._forward(part) for part in parts])
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv.clamp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv.linear(self.pool(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
