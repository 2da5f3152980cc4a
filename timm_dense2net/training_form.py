"""Training form of the dense blocks and transitions: the mathematics of the plain form in less time and memory.

A block's features lie in one (pixels, channels) matrix, channels last, where each is written once. What the plain form
keeps or passes over once more for every layer that reads a feature is done once or made again:

* The batch statistics of a concatenation are the concatenation of the statistics. A feature's mean and variance are
  computed when it is made, and all norms that read it share them, that of the transition too; each updates its own
  running statistics from them.
* Of a layer only the bottleneck (conv1's output) and the outputs of the hierarchy's convolutions are kept, with
  gradient checkpointing not even these. Concatenations, norms and activations are computed again in backward, as in
  `Memory-Efficient Implementation of DenseNets` - https://arxiv.org/abs/1707.06990
* Norm, activation and 1x1 convolution run on so few pixels at a time, that what is between them stays in the caches.
* On a GPU more is kept: there it is the number of kernels that counts (`training_form_gpu.py`).
* On a CPU (`training_form_cpu.py`) the memory of large tensors is kept from one step for the next (`memory_pool.py`).
* Average pooling after a 1x1 convolution is that convolution after the pooling, on a quarter of the pixels.

Of the gradient of a norm's input (`batch_norm.py`) the first term is added up over all layers that read the input in
one matrix, and the gradients of mean and variance in one vector each. The other two terms follow once, when these sums
are complete: in the backward pass of what made the input.
"""
import os
from contextlib import contextmanager
from types import ModuleType
from typing import Iterator, Optional, Tuple

import torch
import torch.nn as nn

from timm.layers import BatchNormAct2d

from . import training_form_cpu
from .hooks import has_hooks, is_plain_tensor, is_transformed
from .memory_pool import MemoryPool, pool_of
from .training_buffers import AddFeatures, Buffers, Output, Statistics, runs_on_kernels

__all__ = [
    'block_has_training_form', 'block_in_training', 'has_training_form', 'plain_form', 'set_training_form',
    'transition_in_training']

# Below this number of pixels a block takes less time in the plain form, and little memory in either.
MANY_PIXELS = 4096

_enabled = os.environ.get('TIMM_DENSE2NET_TRAINING_FORM', '1') != '0'


def set_training_form(enable: bool = True) -> None:
    """Lets nets train in the training form, or in the plain form, which has second derivatives (for AdaHessian).

    The environment variable ``TIMM_DENSE2NET_TRAINING_FORM=0`` does the same for a script.
    """
    global _enabled
    _enabled = enable


@contextmanager
def plain_form() -> Iterator[None]:
    """Lets nets train in the plain form for as long as it lasts."""
    before = _enabled
    set_training_form(False)
    try:
        yield
    finally:
        set_training_form(before)


@torch.jit.ignore
def has_training_form(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a block or transition can run on x (N, C, H, W) in the training form: eagerly, on what that covers."""
    # First of all: where nothing trains, no kernel is compiled to see whether it works.
    if not module.training:
        return False
    # Autograd functions with buffers go neither under torch.func nor forward, and are no graph for what records
    # operations or copies what they change.
    if not _enabled or is_transformed(x) or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if not is_plain_tensor(x) or not (x.device.type == 'cpu' or runs_on_kernels(x)):
        return False
    if x.numel() <= x.shape[1]:
        return False
    params_dtype = torch.promote_types(x.dtype, torch.float32)
    autocasts = torch.is_autocast_enabled(x.device.type)
    if x.dtype != (torch.get_autocast_dtype(x.device.type) if autocasts else params_dtype):
        return False
    return (
        module.is_original()
        and all(_is_covered(norm) for norm in module.norms())
        and all(p.dtype == params_dtype for p in module.parameters())
        and not has_hooks(module))


@torch.jit.ignore
def block_has_training_form(block: nn.ModuleDict, x: torch.Tensor) -> bool:
    """Whether a block can run on x (N, C, H, W) in the training form and that saves time."""
    if not has_training_form(block, x) or x.numel() < MANY_PIXELS * x.shape[1]:
        return False
    if runs_on_kernels(x) and any(layer.grad_checkpointing for layer in block.values()):
        return False  # much of what follows the bottlenecks would be kept
    # Of other channels the layers complain, as buffers for all of them would not.
    return x.shape[1] == next(iter(block.values())).conv1.in_channels


def _is_covered(norm: nn.Module) -> bool:
    return (
        type(norm) is BatchNormAct2d and norm.training and norm.weight is not None and norm.bias is not None
        and type(norm.act) is nn.ReLU and isinstance(norm.drop, nn.Identity))


def _form_on(x: torch.Tensor) -> ModuleType:
    """Where x lies, what makes new features and what is a transition's function."""
    if runs_on_kernels(x):
        from . import training_form_gpu  # not to be imported without triton
        return training_form_gpu
    return training_form_cpu


@torch.jit.ignore
def block_in_training(
        block: nn.ModuleDict, x: torch.Tensor, transition: Optional[nn.Sequential] = None) -> torch.Tensor:
    """Features (N, in_chs + num_layers * growth_rate, H, W), channels last in memory, of x (N, in_chs, H, W).

    With a transition its output, (N, out_chs, H // 2, W // 2), which takes the features' statistics as they are.
    """
    layers = list(block.values())
    buffers = Buffers(x, layers[-1].conv1.in_channels + layers[-1].growth_rate, pool_of(block, x))
    new_features = _form_on(x).new_features
    features, stats = AddFeatures.apply(buffers, 0, x, buffers.features.detach(), buffers.stats.detach())
    for layer in layers:
        new, features, stats = new_features(buffers, layer, features, stats)
        new = layer.drop_path(layer.attn(new))
        features, stats = AddFeatures.apply(buffers, layer.conv1.in_channels, new, features, stats)
    buffers.release()
    if transition is None:
        return Output.apply(buffers, features, stats)
    return _apply_transition(transition, buffers.pool, buffers.size, features, stats)


@torch.jit.ignore
def transition_in_training(transition: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Output (N, out_chs, H // 2, W // 2), channels last in memory, of x (N, in_chs, H, W)."""
    with torch.autocast(x.device.type, enabled=False):
        features, stats = Statistics.apply(x)
    return _apply_transition(transition, pool_of(transition, x), (x.shape[0], *x.shape[2:]), features, stats)


def _apply_transition(
        transition: nn.Sequential,
        pool: MemoryPool,
        size: Tuple[int, int, int],
        features: torch.Tensor,
        stats: torch.Tensor,
) -> torch.Tensor:
    norm, conv = transition.norm, transition.conv
    with torch.autocast(features.device.type, enabled=False):
        return _form_on(features).Transition.apply(
            transition, pool, size, features, stats, norm.weight, norm.bias, conv.weight)
