"""What happens in a call of a module beside its class's forward: forms that do not call it would pass over that."""
import torch.nn as nn
from torch.nn.modules import module as torch_module

__all__ = ['has_hooks']


def has_hooks(*modules: nn.Module) -> bool:
    """Whether calling one of the modules runs hooks, a compiled form or a forward of its own instead of its class's."""
    return _has_global_hooks() or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or m._compiled_call_impl is not None or 'forward' in m.__dict__ for m in modules)


def _has_global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)
