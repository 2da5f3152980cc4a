"""Sizes of models: parameters, and multiply-accumulates of one image."""
from __future__ import annotations

import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .meta import forward_on_meta

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
    with FlopCounterMode(display=False) as counter:
        forward_on_meta(model, input_size)
    return counter.get_total_flops() // 2
