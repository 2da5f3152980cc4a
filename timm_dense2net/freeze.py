"""Stages of a model that fine-tuning leaves as they are."""
from __future__ import annotations

import torch.nn as nn
from timm.models import group_parameters
from timm.utils import freeze

__all__ = ['freeze_stages']


def freeze_stages(model: nn.Module, count: int) -> None:
    """Freezes the stem and the first stages of a timm model in place, by timm's own grouping of its layers.

    Their parameters get no gradient, and their batch norms keep statistics and weights as buffers.

    Args:
        model: Any timm model with its head; stages are those of `group_matcher(coarse=True)`, dense blocks with their
            transitions.
        count: Number of stages.

    Raises:
        ValueError: If the model has not so many stages, or timm does not group its layers.
    """
    if not hasattr(model, 'group_matcher'):
        raise ValueError(
            f'--freeze-stages: timm does not group the layers of {type(model).__name__} in stages (group_matcher)')
    groups = group_parameters(model, model.group_matcher(coarse=True))
    # The first group is the stem, the last one the head.
    stages = len(groups) - 2
    if count > stages:
        raise ValueError(f'--freeze-stages must be at most {stages}, the stages of this model, got {count}')
    names = [name for group in range(count + 1) for name in groups[group]]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    # The root, where some models have a parameter, holds all stages.
    freeze(model, sorted({name.rpartition('.')[0] for name in names} - {''}))
