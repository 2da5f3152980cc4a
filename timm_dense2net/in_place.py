"""Runs the inference form in buffers: no allocation, no copy and no concatenation a layer.

A dense block's features lie in one (N, H, W, C) buffer, each written once where all later layers read it; all layers
of a block take turns in the same scratch buffers. On a CPU a block runs on so few images at a time, that its features
stay in the caches, and what follows it (transition or final norm) takes them from there; groups of images run beside
each other.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import Callable, Dict, Iterable, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from timm.layers import DropPath

from .hooks import all_modules, has_hooks, is_plain_tensor, is_transformed
from .parts import image_parts

# Images for each of torch's threads from which a group of them has a Python thread: these take turns in Python.
GROUP_IMAGES = 8
# Up to so many pixels a 3x3 convolution on a CPU is unfolded into a matrix product: a call of oneDNN has a fixed cost.
UNFOLDED_PIXELS = 1024
# Up to so many bytes of channels that lie together, torch adds numbers of two bytes on a CPU one by one.
NARROW_BYTES = 32


@torch.jit.ignore
def is_recorded(x: torch.Tensor) -> bool:
    """Whether operations on x are traced, differentiated or without memory, so that none may be in place."""
    return (
        is_transformed(x) or x.is_meta or not is_plain_tensor(x) or (torch.is_grad_enabled() and x.requires_grad))


def computing_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What a convolution of x computes in: autocast's dtype where that is on, else the weight's."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


@torch.jit.ignore
def block_in_place(
        block: nn.ModuleDict,
        x: torch.Tensor,
        follower: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
) -> torch.Tensor:
    """Features (N, out_chs, H, W) of a ``FusedDenseBlock``, channels last, or what the follower makes of them.

    The follower may overwrite what it is given: parts of the images take turns in the same buffers, as memory that is
    new to the process costs more than what is computed in it.
    """
    parts = image_parts(x, block.out_chs)
    n, _, h, w = parts[0].shape
    features = x.new_empty((n if follower else len(x), h, w, block.out_chs))
    layers = list(block.values())
    clamped = x.new_empty(n * h * w * layers[-1].in_chs)
    bottleneck = x.new_empty((n, h, w, layers[0].conv1.linear.out_features))
    weights = {}
    output, done = None, 0
    for part in parts:
        start = 0 if follower else done
        of_part = features[start:start + len(part)]
        maps = bottleneck[:len(part)]
        hierarchy = _Hierarchy(maps, layers[0].conv2) if layers[0].has_hierarchy else None
        unfolds = hierarchy is not None and hierarchy.unfolds
        if unfolds not in weights:  # few images may be left for the last part
            weights[unfolds] = [_weights_of(layer, x.dtype, unfolds) for layer in layers]
        of_part[..., :x.shape[1]] = part.permute(0, 2, 3, 1)
        for layer, of_layer in zip(layers, weights[unfolds]):
            _run_layer(layer, of_layer, of_part, clamped, maps, hierarchy)
        if follower:
            output = _put(follower(of_part.permute(0, 3, 1, 2)), output, done, len(x))
        done += len(part)
    return output if follower else features.permute(0, 3, 1, 2)


def _put(part: torch.Tensor, output: Optional[torch.Tensor], start: int, size: int) -> torch.Tensor:
    """The output of ``size`` images, made for the first part of them, with a part in its place."""
    if len(part) == size:
        return part
    if output is None:
        output = torch.empty_like(part[:1].expand(size, *part.shape[1:]), memory_format=torch.channels_last)
    output[start:start + len(part)] = part
    return output


def _is_watched() -> bool:
    """Whether autograd, an operation counter or a profiler looks at this thread, and would not see others."""
    return (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled())


def in_groups(module: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``run(x)`` of images x (N, C, H, W) by a module: on a CPU, of groups of a large batch beside each other.

    Threads that share each operation wait for each other after each one. So every group has a Python thread, with its
    share of torch's threads.
    """
    threads = torch.get_num_threads()
    groups = min(threads, len(x) // (GROUP_IMAGES * threads))
    if x.device.type != 'cpu' or groups < 2 or _is_watched() or sees_whole_batch(module):
        return run(x)
    is_inference = torch.is_inference_mode_enabled()
    # Of this thread; casts of weights that were kept would be this thread's too.
    autocast = dict(
        dtype=torch.get_autocast_dtype('cpu'), enabled=torch.is_autocast_enabled('cpu'), cache_enabled=False)

    def run_group(group: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(is_inference), torch.no_grad(), torch.autocast('cpu', **autocast):
            return run(group)

    return torch.cat(list(_workers(groups, threads).map(run_group, x.tensor_split(groups))))


def _workers(groups: int, threads: int) -> ThreadPoolExecutor:
    """Python threads, one a group, that share the number of torch's threads; made once, as they may be many calls'."""
    with _workers_lock:
        if (groups, threads) not in _all_workers:
            _all_workers[groups, threads] = _start_workers(groups, threads)
        return _all_workers[groups, threads]


def _start_workers(groups: int, threads: int) -> ThreadPoolExecutor:
    started = Barrier(groups)

    def start() -> None:
        torch.get_num_threads()  # the first time it takes the number that new threads begin with
        torch.set_num_threads(threads // groups)  # of this thread
        started.wait()  # so that each thread does this

    pool = ThreadPoolExecutor(groups, thread_name_prefix='dense2net')
    try:
        for future in [pool.submit(start) for _ in range(groups)]:
            future.result()
    finally:
        # The last number set is also that of all threads to come.
        torch.set_num_threads(threads)
    return pool


_all_workers: Dict[Tuple[int, int], ThreadPoolExecutor] = {}
_workers_lock = Lock()


def _forget_workers() -> None:
    global _workers_lock
    _workers_lock = Lock()
    _all_workers.clear()


if hasattr(os, 'register_at_fork'):
    # A process that is forked has the pools without their threads.
    os.register_at_fork(after_in_child=_forget_workers)


@torch.jit.ignore
def runs_by_parts(block: nn.ModuleDict, x: torch.Tensor) -> bool:
    """Whether a plain block may work on parts of x: where it is large, and nothing sees the batch as a whole."""
    if is_recorded(x) or len(image_parts(x, block.out_chs)) == 1:
        return False
    return not (has_hooks(block) or sees_whole_batch(block))


def sees_whole_batch(module: nn.Module) -> bool:
    """Whether something in the module is in training mode or takes statistics of the batch it is given."""
    return any(m.training or getattr(m, 'running_mean', m) is None for m in all_modules(module))


class _Weights(NamedTuple):
    """What a layer computes with, in the dtype of its features."""
    lo: torch.Tensor
    hi: Optional[torch.Tensor]
    conv1: torch.Tensor
    bias1: torch.Tensor
    convs: Sequence[Tuple[torch.Tensor, torch.Tensor]]
    conv3: Optional[torch.Tensor]


def bounds_of(conv: nn.Module, dtype: torch.dtype) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Lower and upper bounds of a ``ClampLinear``'s clamp; no upper ones where that saves time and changes nothing."""
    lo, hi = conv.lo.to(dtype), conv.hi.to(dtype)
    # On a CPU a clamp of numbers of two bytes takes twice as long with both.
    saves = hi.device.type == 'cpu' and dtype.itemsize == 2
    return lo, None if saves and hi.min() >= torch.finfo(dtype).max else hi


def _weights_of(layer: nn.Module, dtype: torch.dtype, unfolds: bool) -> _Weights:
    """Those of a layer, cast and cut once for all parts: operations that write to a buffer are not autocast."""
    conv1, hierarchy = layer.conv1, layer.conv2
    cast = [*bounds_of(conv1, dtype), conv1.linear.weight.to(dtype).t(), conv1.linear.bias.to(dtype)]
    if not layer.has_hierarchy:
        return _Weights(*cast, [], None)
    weight, bias = hierarchy.weight.to(dtype), hierarchy.bias.to(dtype)
    weight = weight.transpose(1, 2) if unfolds else hierarchy.kernels(weight)
    return _Weights(*cast, list(zip(weight.unbind(), bias.unbind())), layer.conv3.weight.to(dtype).t())


def _run_layer(
        layer: nn.Module,
        weights: _Weights,
        features: torch.Tensor,
        clamped: torch.Tensor,
        bottleneck: torch.Tensor,
        hierarchy: Optional['_Hierarchy'],
) -> None:
    """Writes a layer's new features behind the first ``in_chs`` channels of ``features`` (N, H, W, C).

    ``clamped`` and ``bottleneck`` are scratch.
    """
    pixels = features.view(-1, features.shape[3])
    c = layer.in_chs
    x = clamped.as_strided((pixels.shape[0], c), (c, 1))
    torch.clamp(pixels[:, :c], weights.lo, weights.hi, out=x)
    mid = bottleneck.view(-1, bottleneck.shape[3])
    torch.addmm(weights.bias1, x, weights.conv1, out=mid)
    mid.relu_()
    if hierarchy is None:
        y = layer.conv2(bottleneck.permute(0, 3, 1, 2))
    else:
        hierarchy.run(layer.conv2, weights.convs)
        if type(layer.attn) is nn.Identity and _keeps_all(layer.drop_path):
            torch.mm(mid, weights.conv3, out=pixels[:, c:c + layer.growth_rate])
            return
        y = torch.mm(mid, weights.conv3).view(*bottleneck.shape[:3], layer.growth_rate).permute(0, 3, 1, 2)
    features[..., c:c + layer.growth_rate] = layer.drop_path(layer.attn(y)).permute(0, 2, 3, 1)


def _keeps_all(drop_path: nn.Module) -> bool:
    return type(drop_path) is nn.Identity or (type(drop_path) is DropPath and not drop_path.training)


class _Hierarchy:
    """The split hierarchy in place of its input: what is left of a split after the addition is room for its result.

    Args:
        maps: Input and output (N, H, W, channels).
        like: One of the hierarchies that are to run, all of one shape.
    """

    def __init__(self, maps: torch.Tensor, like: nn.Module) -> None:
        n, h, w, _ = maps.shape
        width = like.width
        self.splits = maps.split(width, 3)
        self.copies = maps.device.type == 'cpu' and maps.element_size() == 2 and 2 * width <= NARROW_BYTES
        self.unfolds = (
            maps.device.type == 'cpu' and n * h * w <= UNFOLDED_PIXELS
            and (like.kernel_size, like.dilation, like.groups) == (3, 1, 1))
        if self.unfolds:
            padded = maps.new_zeros((n, h + 2, w + 2, width))
            self.sum = padded[:, 1:-1, 1:-1]
            self.windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
            self.columns = maps.new_empty((n, h, w, 3, 3, width))
            self.matrix = self.columns.view(-1, 9 * width)
            self.product = maps.new_empty((n * h * w, width))

    def run(self, hierarchy: nn.Module, convs: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Runs one of the hierarchies with weight and bias of each of its convolutions."""
        if self.unfolds:
            self._run_unfolded(convs)
            return
        for i, (kernel, bias) in enumerate(convs):
            x, y = self.splits[i + 1], self.splits[i]
            if self.copies:
                x, y = x.contiguous(), y.contiguous()
            y = hierarchy.conv((x + y).permute(0, 3, 1, 2), kernel, bias)
            torch.clamp_min(y.permute(0, 2, 3, 1), 0, out=self.splits[i + 1])

    def _run_unfolded(self, convs: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> None:
        y, product = self.splits[0], self.product.view(self.splits[0].shape)
        for x, (weight, bias) in zip(self.splits[1:], convs):
            torch.add(x, y, out=self.sum)
            self.columns.copy_(self.windows)
            torch.addmm(bias, self.matrix, weight, out=self.product)
            y = torch.clamp_min(product, 0, out=x)
