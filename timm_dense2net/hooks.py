"""What a call does beside a class's forward, which forms that do not call the modules would pass over."""
from typing import Iterator

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

__all__ = ['all_modules', 'has_hooks', 'has_own_hooks', 'is_plain_tensor', 'is_transformed']


def all_modules(root: nn.Module) -> Iterator[nn.Module]:
    """As ``root.modules()``, without the names that it makes: asked at each call, they are a part of a small one."""
    stack = [root]
    while stack:
        module = stack.pop()
        yield module
        stack.extend(child for child in module._modules.values() if child is not None)


def has_hooks(root: nn.Module) -> bool:
    """Whether calling a module in root runs hooks, a compiled form or a forward of its own instead of its class's."""
    return _has_global_hooks() or any(map(has_own_hooks, all_modules(root)))


def has_own_hooks(module: nn.Module) -> bool:
    """As ``has_hooks``, of one module without those in it, and of the hooks that are registered with it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or module._compiled_call_impl is not None or 'forward' in module.__dict__)


def _has_global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)


def is_plain_tensor(x: torch.Tensor) -> bool:
    """Whether x is of torch's own classes: others decide what an operation does, and fake tensors have no memory."""
    return type(x) in (torch.Tensor, nn.Parameter)


def is_transformed(x: torch.Tensor) -> bool:
    """Whether operations on x are compiled, traced, differentiated forward or under a transform of torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or isinstance(x, torch.fx.Proxy)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0)
