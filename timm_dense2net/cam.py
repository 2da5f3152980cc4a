"""Class-activation maps of a Dense2Net: where the net found what speaks for a class.

A map is the sum over channels of activation times gradient of the class's logit, without what speaks against the class
(HiResCAM, https://arxiv.org/abs/2011.08891).
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .dense2net import DenseBlock, SplitHierarchyConv2d

__all__ = ['ActivationMaps', 'class_activation_maps']


class ActivationMaps(NamedTuple):
    """Class-activation maps (H, W) of the image's size, in units of the logit.

    Args:
        by_scale: One map for each split y_1 .. y_s of the hierarchies, summed over all dense layers; empty where the
            net has no hierarchy.
        by_block: One map for the output of each dense block, first to last.
    """
    by_scale: tuple[torch.Tensor, ...]
    by_block: tuple[torch.Tensor, ...]


def class_activation_maps(model: nn.Module, image: torch.Tensor, class_index: int) -> ActivationMaps:
    """Maps of one image for one class.

    The splits of a hierarchy's output are used side by side by the convolution after it, so their maps share the
    logit among them: each shows what its own receptive field, 2 (i - 1) + 1 pixels within a layer, has found.

    Args:
        model: Dense2Net in evaluation mode, not fused.
        image: Normalized image (1, C, H, W).
        class_index: Class whose logit is explained.

    Raises:
        ValueError: If the model has no dense blocks to look into, as when it is fused.
    """
    blocks = [m for m in model.modules() if isinstance(m, DenseBlock)]
    hierarchies = [m for m in model.modules() if isinstance(m, SplitHierarchyConv2d)]
    if not blocks:
        raise ValueError('class-activation maps need a Dense2Net that is not fused')
    outputs = {}

    def keep(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        outputs[module] = output

    hooks = [module.register_forward_hook(keep) for module in (*blocks, *hierarchies)]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # The image asks for the gradient: the parameters may be frozen. One made in inference mode cannot.
            logit = model(image.detach().clone().requires_grad_())[0, class_index]
            gradients = dict(zip(outputs, torch.autograd.grad(logit, list(outputs.values()))))
    finally:
        for hook in hooks:
            hook.remove()
    size = image.shape[2:]
    contributions = {module: outputs[module].detach() * gradients[module] for module in outputs}
    by_block = tuple(_enlarge(contributions[block].sum(1, keepdim=True), size) for block in blocks)
    scale = hierarchies[0].scale if hierarchies else 0
    by_scale = [image.new_zeros(size) for _ in range(scale)]
    for module in hierarchies:
        for i, split in enumerate(contributions[module].split(module.width, 1)):
            by_scale[i] += _enlarge(split.sum(1, keepdim=True), size)
    return ActivationMaps(tuple(m.clamp(min=0) for m in by_scale), tuple(m.clamp(min=0) for m in by_block))


def _enlarge(contribution: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Map (1, 1, h, w) at the image's size, its sum kept so that maps of several resolutions can be added."""
    area = contribution.shape[2] * contribution.shape[3] / (size[0] * size[1])
    return F.interpolate(contribution, size, mode='bilinear', align_corners=False)[0, 0] * area
