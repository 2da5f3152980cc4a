"""timm's layers by name, with a message for a name that timm does not know."""
from typing import Optional, Type

import torch.nn as nn

from timm.layers import LayerType, create_attn, get_act_layer, get_norm_act_layer

__all__ = ['check_act_layer', 'create_attn_layer', 'find_norm_act_layer']


def create_attn_layer(attn_layer: Optional[str], channels: int, device=None, dtype=None) -> nn.Module:
    """timm's ``create_attn``, with a message for what timm does not make; an identity where there is no name.

    Raises:
        ValueError: timm makes none of that name for so many channels and nothing else.
    """
    try:
        attn = create_attn(attn_layer, channels, device=device, dtype=dtype)
    except (AssertionError, TypeError) as e:
        raise ValueError(
            f"attn_layer '{attn_layer}': timm makes none of that name for {channels} channels alone ({e}); it must be "
            f"one such as 'se' or 'eca'") from None
    return nn.Identity() if attn is None else attn


def check_act_layer(act_layer: LayerType) -> None:
    """Checks that timm has an activation.

    Raises:
        ValueError: It has not.
    """
    try:
        get_act_layer(act_layer)
    except KeyError:
        raise ValueError(
            f"unknown act_layer '{act_layer}': it must be a name that timm knows, such as 'relu' or 'silu'") from None


def find_norm_act_layer(norm_layer: LayerType, act_layer: LayerType, *channels: int) -> Type[nn.Module]:
    """timm's ``get_norm_act_layer``, with a message for what timm does not know.

    Args:
        norm_layer: Normalization, by name or class.
        act_layer: Activation, by name or class.
        *channels: Numbers of channels that it is to be made for.

    Raises:
        ValueError: timm has no such layer, or its groups do not divide the channels.
    """
    check_act_layer(act_layer)
    try:
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer=act_layer)
    except (AssertionError, KeyError):
        norm_act_layer = None
    if norm_act_layer is None:
        raise ValueError(
            f"unknown norm_layer '{norm_layer}': it must be a name that timm knows, such as 'batchnorm2d' or "
            f"'layernorm2d'")
    for count in channels:
        if not _takes(norm_act_layer, count):
            raise ValueError(
                f"norm_layer '{norm_layer}' cannot be made for {count} channels, which its groups do not divide: give "
                f"one without groups, such as 'batchnorm2d' or 'layernorm2d'")
    return norm_act_layer


def _takes(norm_act_layer: Type[nn.Module], channels: int) -> bool:
    try:
        norm = norm_act_layer(channels)
    except ValueError:
        return False
    return channels % getattr(norm, 'groups', 1) == 0  # some of timm's look at them in forward alone
