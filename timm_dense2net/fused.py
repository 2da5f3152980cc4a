"""Inference form of the layers: norms folded into convolutions, features written once into one buffer a block.

Reached by timm's convention: ``timm.utils.reparameterize_model(model)``, or ``--reparam`` of timm's ``validate.py`` and
``benchmark.py``, calls ``fuse()`` on the modules that have it. The mathematics is that of the plain form in eval mode:

* Batch norm then ReLU is, per channel, relu(a x + b) = a clamp(x, lo, hi) + b, with one bound at t = -b / a: the lower
  for a > 0, the upper for a < 0. Before a 1x1 convolution a and b go into the convolution, and one clamp is left.
* Batch norm after a convolution goes into the convolution.
* Average pooling after a 1x1 convolution is that convolution after the pooling, on a quarter of the pixels.

Each module has a ``forward`` that can be traced, scripted, exported and differentiated; where none of this is done,
``in_place.py`` computes the same in buffers. The parameters are frozen: the form is for inference.
"""
import copy
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct

from .hooks import has_hooks, is_plain_tensor
from .in_place import block_in_place, bounds_of, computing_dtype, in_groups, is_recorded, sees_whole_batch
from .parts import image_parts

__all__ = ['FusedDenseBlock', 'FusedDenseTransition', 'FusedFeatures', 'FusedSplitHierarchyConv2d', 'is_fusable']

# A bound this many standard deviations from the mean is never reached; computing with it could overflow.
UNREACHABLE_SIGMA = 1e6
# Nor is one that is infinite in float16, unless it is as near as this.
UNREACHABLE, NEAR_SIGMA = 6e4, 1e3


def is_fusable(*norms: nn.Module) -> bool:
    """Whether each of the layers is batch norm with statistics of its own, then ReLU and nothing else."""
    return all(
        type(norm) in (BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct)
        and type(norm.act) is nn.ReLU
        and isinstance(norm.drop, nn.Identity)
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

    A bound out of reach is infinite. A channel that does not depend on its input is clamped to 0.
    """
    scale, shift = norm_as_affine(norm)
    mean = norm.running_mean.double()
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    bound = -shift / scale
    distance = (bound - mean).abs() / sigma
    # False also where bound is not a number.
    reachable = (distance < UNREACHABLE_SIGMA) & ((bound.abs() < UNREACHABLE) | (distance < NEAR_SIGMA))
    at_mean = (scale * mean + shift).clamp(min=0.)
    varies = reachable | ((scale != 0) & (at_mean > 0))
    lo = torch.where(reachable & (scale > 0), bound, -torch.inf).where(varies, 0.)
    hi = torch.where(reachable & (scale < 0), bound, torch.inf).where(varies, 0.)
    return lo, hi, scale.where(varies, 0.), shift.where(varies, at_mean)


def _fold_norm(
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        norm: nn.Module,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias in float64 of a convolution, itself with a bias or without, and the norm after it in one."""
    scale, shift = norm_as_affine(norm)
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    return weight.detach().double() * scale.view(-1, *[1] * (weight.ndim - 1)), shift


def _as_linear(weight: torch.Tensor, bias: Optional[torch.Tensor], like: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, device=like.device, dtype=like.dtype)
    linear.load_state_dict(dict(weight=weight) if bias is None else dict(weight=weight, bias=bias))
    return linear


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
        if norm_after is not None:
            weight, bias = _fold_norm(weight, bias, norm_after)
        # Finite ones: an average of infinite ones, as of weights, would be no number.
        limits = torch.finfo(conv.weight.dtype)
        self.register_buffer('lo', lo.clamp(min=limits.min).to(conv.weight.dtype))
        self.register_buffer('hi', hi.clamp(max=limits.max).to(conv.weight.dtype))
        self.linear = _as_linear(weight, bias, conv.weight)
        self.train(norm.training)

    def clamp(self, x: torch.Tensor) -> torch.Tensor:
        """The activation short of its scale and shift."""
        return torch.clamp(x, self.lo.to(x.dtype), self.hi.to(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.clamp(x))


class FusedSplitHierarchyConv2d(nn.Module):
    """``SplitHierarchyConv2d`` with its norms folded.

    Its s - 1 convolutions lie in one ``weight`` (s - 1, width, kernel height * kernel width * width / groups): channels
    last, so that each is a convolution's weight and the matrix of its unfolded form without a copy.

    Shape: (N, channels, H, W) -> (N, channels, H, W).
    """

    def __init__(self, hierarchy: nn.Module) -> None:
        super().__init__()
        self.training = hierarchy.training
        self.scale = hierarchy.scale
        self.width = hierarchy.width
        self.kernel_size = hierarchy.kernel_size
        self.dilation = hierarchy.dilation
        self.padding = hierarchy.dilation * (hierarchy.kernel_size - 1) // 2
        self.groups = hierarchy.groups
        like = next(hierarchy.parameters(), torch.empty(0)).detach()
        weight = like.new_empty((self.scale - 1, self.width, self.kernel_size ** 2 * self.width // self.groups))
        bias = like.new_empty((self.scale - 1, self.width))
        for i, (conv, norm) in enumerate(zip(hierarchy.convs, hierarchy.norms)):
            w, bias[i] = _fold_norm(conv.weight, None, norm)
            weight[i] = w.permute(0, 2, 3, 1).flatten(1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def kernels(self, weight: torch.Tensor) -> torch.Tensor:
        """The convolutions' weights (s - 1, width, width / groups, kernel height, kernel width) of ``weight``."""
        sizes = [self.scale - 1, self.width, self.kernel_size, self.kernel_size, self.width // self.groups]
        return weight.view(sizes).permute(0, 1, 4, 2, 3)

    def conv(self, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """One of the convolutions on (N, width, H, W)."""
        return F.conv2d(x, kernel, bias, 1, self.padding, self.dilation, self.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        splits = torch.split(x, [self.width] * self.scale, 1)
        kernels = self.kernels(self.weight)
        y = splits[0]
        outputs = [y]
        for i in range(self.scale - 1):
            y = F.relu(self.conv(splits[i + 1] + y, kernels[i], self.bias[i]))
            outputs.append(y)
        return torch.cat(outputs, 1)


class FusedDenseLayer(nn.Module):
    """``DenseLayer`` with its norms folded.

    Shape: (N, in_chs, H, W) -> (N, growth_rate, H, W).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.training = layer.training
        self.in_chs = layer.conv1.in_channels
        self.growth_rate = layer.growth_rate
        self.conv1 = ClampLinear(layer.norm1, layer.conv1, norm_after=layer.norm2)
        self.has_hierarchy = not isinstance(layer.conv2, nn.Conv2d)
        if self.has_hierarchy:
            self.conv2 = FusedSplitHierarchyConv2d(layer.conv2)
            self.conv3 = _as_linear(layer.conv3.weight.detach().flatten(1), None, layer.conv3.weight)
            self.conv3.train(layer.conv3.training)
        else:
            self.conv2 = copy.deepcopy(layer.conv2).to(memory_format=torch.channels_last)
            self.conv3 = copy.deepcopy(layer.conv3)
        self.attn = copy.deepcopy(layer.attn)
        self.drop_path = copy.deepcopy(layer.drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.conv2(x)
        if self.has_hierarchy:
            x = self.conv3(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.drop_path(self.attn(x))


class FusedDenseBlock(nn.ModuleDict):
    """``DenseBlock`` for inference: every feature is written once, where all later layers read it.

    Shape: (N, in_chs, H, W) -> (N, in_chs + num_layers * growth_rate, H, W), channels last in memory.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.training = block.training
        for name, layer in block.items():
            self.add_module(name, FusedDenseLayer(layer))
            self.out_chs = layer.conv1.in_channels + layer.growth_rate
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self.runs_in_place(x) and not has_hooks(self):
                return block_in_place(self, x)
        for layer in self.values():
            x = torch.cat([x, layer(x)], 1)
        return x

    @torch.jit.ignore
    def runs_in_place(self, x: torch.Tensor) -> bool:
        """Whether nothing records what is done to x or to the weights, and the layers are those it is made with."""
        if is_recorded(x) or _is_trained(self) or not all(map(_is_as_made, self.values())):
            return False
        # Of other channels the layers complain, as a buffer for all of them would not, and of another dtype.
        first = next(iter(self.values()))
        return x.shape[1] == first.in_chs and x.dtype == computing_dtype(x, first.conv1.linear.weight)


class FusedDenseTransition(nn.Module):
    """``DenseTransition`` with its norm folded and the convolution after the pooling.

    Shape: (N, in_chs, H, W) -> (N, out_chs, H // 2, W // 2), channels last in memory.
    """

    def __init__(self, transition: nn.Module) -> None:
        super().__init__()
        self.training = transition.training
        self.conv = ClampLinear(transition.norm, transition.conv)
        self.pool = transition.pool
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._pool_and_mix(self.conv.clamp(x.permute(0, 2, 3, 1)))

    @torch.jit.unused
    def overwrite(self, x: torch.Tensor) -> torch.Tensor:
        """The same, with the clamp written to x."""
        x = x.permute(0, 2, 3, 1)
        return self._pool_and_mix(torch.clamp(x, *bounds_of(self.conv, x.dtype), out=x))

    def _pool_and_mix(self, clamped: torch.Tensor) -> torch.Tensor:
        x = self.pool(clamped.permute(0, 3, 1, 2))
        return self.conv.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _is_as_made(layer: nn.Module) -> bool:
    """Whether a layer's matrices and hierarchy are those it is made with, of torch's weights, not quantized ones."""
    return (
        type(layer) is FusedDenseLayer and type(layer.conv1) is ClampLinear
        and (not layer.has_hierarchy or type(layer.conv2) is FusedSplitHierarchyConv2d)
        and _is_torchs(layer.conv1.linear) and _is_torchs(layer.conv3))


def _is_torchs(module: nn.Module) -> bool:
    # Some ways to quantize replace the layer, others its weight.
    return type(module) is nn.Identity or (
        type(module) is nn.Linear and is_plain_tensor(module.weight))


def _is_trained(module: nn.Module) -> bool:
    """Whether autograd keeps the module's input for the gradients of its weights."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


class FusedFeatures(nn.Sequential):
    """The feature extractor, whose widest maps, those of its dense blocks, are not kept as a whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if not (is_recorded(x) or has_hooks(self)):
                return in_groups(self, self._forward_in_place, x)
        for layer in self:
            x = layer(x)
        return x

    @torch.jit.unused
    def _forward_in_place(self, x: torch.Tensor) -> torch.Tensor:
        # As the blocks hold their features; the first convolution is faster so, too.
        x = x.contiguous(memory_format=torch.channels_last)
        layers = iter(self)
        for layer in layers:
            # Asked of each block's own input, which has a gradient where the stem is trained.
            if not (type(layer) is FusedDenseBlock and layer.runs_in_place(x)):
                x = layer(x)
                continue
            follower = next(layers, None)
            if follower is not None and len(image_parts(x, layer.out_chs)) > 1 and (
                    sees_whole_batch(follower) or _is_trained(follower)):
                x = follower(block_in_place(layer, x))
            else:
                x = block_in_place(
                    layer, x, follower.overwrite if type(follower) is FusedDenseTransition else follower)
        return x
