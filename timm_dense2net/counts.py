"""Sizes of models: parameters, and multiply-accumulates of one image."""
from __future__ import annotations

import copy

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_params', 'count_macs']


def count_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image, by torch's counter.

    Nothing is computed: a copy of the model runs on the meta device. The model is left as it is.

    Args:
        model: The model, on any device.
        input_size: Channels, height and width of the image.
    """
    dtype = next(model.parameters()).dtype
    # The counter trips over parameters that ask for gradients where a module is called with one, as CaiT's are.
    twin = copy.deepcopy(model).to('meta').eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.empty(1, *input_size, device='meta', dtype=dtype))
    return counter.get_total_flops() // 2
