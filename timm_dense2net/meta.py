"""Models on torch's meta device, where operations have shapes and compute nothing."""
from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn as nn

from .errors import one_line

__all__ = ['check_input', 'forward_on_meta']


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


def check_input(model: nn.Module, name: str, image_shape: Sequence[int]) -> None:
    """Checks that a model takes images of a shape, by one that runs through it on the meta device.

    Args:
        model: The model.
        name: What it is called in the message.
        image_shape: Channels, height and width.

    Raises:
        ValueError: If it does not.
    """
    try:
        forward_on_meta(model, tuple(image_shape))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as e:
        shape = 'x'.join(map(str, image_shape))
        raise ValueError(f'{name} does not take images of {shape} ({one_line(e)}){_own_size(model)}') from e


def _own_size(model: nn.Module) -> str:
    """For a message, the size that a model is made for, if it is for one only."""
    cfg = getattr(model, 'pretrained_cfg', {})
    if not cfg.get('fixed_input_size'):
        return ''
    height, width = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or cfg['input_size'][1:]
    return f'; it is made for {height}x{width} (--img-size {height})'
