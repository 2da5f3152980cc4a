"""Hooks on modules, which forms that do not call the modules would pass over."""
import torch.nn as nn

__all__ = ['has_hooks']


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on any of the modules."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
