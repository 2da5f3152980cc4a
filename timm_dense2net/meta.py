"""Models on torch's meta device, where operations have shapes and compute nothing."""
from __future__ import annotations

import copy

import torch
import torch.nn as nn

__all__ = ['forward_on_meta']


@torch.no_grad()
def forward_on_meta(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Runs one image through a copy of a model on the meta device; the model is left as it is.

    Args:
        model: The model, on any device.
        input_size: Channels, height and width of the image.
    """
    dtype = next((p.dtype for p in model.parameters()), None)
    # CaiT calls modules with parameters that ask for gradients, which torch's counter of operations trips over.
    twin = copy.deepcopy(model).to('meta').eval().requires_grad_(False)
    twin(torch.empty(1, *input_size, device='meta', dtype=dtype))
