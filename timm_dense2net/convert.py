"""Puts the Res2Net hierarchy in place of the 3x3 convolutions of any timm model.

    python -m timm_dense2net convert resnet50 regnety_008 --scale 4
"""
from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch.nn as nn
from timm.layers import create_conv2d, get_device_dtype
from timm.models import build_model_with_cfg, is_model, model_entrypoint, register_model
from timm.models._registry import _deprecated_models
from timm.models.res2net import Bottle2neck

from .counts import count_macs, count_params
from .dense2net import SplitHierarchyConv2d
from .errors import one_line
from .named_layers import find_norm_act_layer
from .names import check_model_name, layer_names

__all__ = ['convert_res2net', 'reapply_conversion', 'conversion_metadata', 'conversion_in', 'METADATA_KEY']

_logger = logging.getLogger(__name__)

METADATA_KEY = 'res2net_conversion'


class ProjectedHierarchy(nn.Sequential):
    """Split hierarchy, then a linear 1x1 convolution to another number of channels."""

    def __init__(self, hierarchy: SplitHierarchyConv2d, out_channels: int, bias: bool, device=None, dtype=None) -> None:
        layers = OrderedDict(
            hierarchy=hierarchy,
            proj=create_conv2d(hierarchy.in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype))
        super().__init__(layers)
        self.in_channels = hierarchy.in_channels
        self.out_channels = out_channels


def convert_res2net(
        model: nn.Module,
        scale: int = 4,
        act_layer: str = 'relu',
        norm_layer: str = 'batchnorm2d',
) -> nn.Module:
    """Replaces a model's 3x3 convolutions by `SplitHierarchyConv2d`, in place.

    A convolution is replaced if it keeps the size of its input (stride 1) and its channels can be split:

    * equal widths: the hierarchy takes its place;
    * grouped, of equal widths: so that no group is cut, the groups are dealt out evenly over the splits, each as wide
      as before;
    * unequal widths, not grouped: the hierarchy and a linear 1x1 convolution take its place, as in Dense2Net's layers.

    What the model does with the output, norm and activation as a rule, stays as it was. New layers are initialized as
    in Dense2Net; all other weights are kept.

    What was done is recorded in `model.res2net_conversion`, which JSON can hold: the arguments, `replaced` (names) and
    `kept` (names of the other 3x3 convolutions, each with the reason).

    Args:
        model: The model.
        scale: Number of splits of the hierarchy.
        act_layer: Activation after each convolution of the hierarchy, by timm's name.
        norm_layer: Norm after each convolution of the hierarchy, by timm's name.

    Returns:
        The model itself.

    Raises:
        ValueError: If scale is below 2, the model was converted before, nothing in it can be replaced, or timm has no
            such norm or activation; the model is then as it was.
    """
    if scale < 2:
        raise ValueError(f'scale must be at least 2, got {scale}')
    if hasattr(model, 'res2net_conversion'):
        raise ValueError(f'the model was already converted, at scale {model.res2net_conversion["scale"]}')
    reasons = _find_convs(model, scale)
    replaced = [name for name, reason in reasons.items() if not reason]
    kept = {name: reason for name, reason in reasons.items() if reason}
    if not replaced:
        why = '; '.join(f'{name}: {reason}' for name, reason in list(kept.items())[:3]) or 'it has none'
        raise ValueError(f'no 3x3 convolution of {type(model).__name__} can be replaced at scale {scale} ({why})')
    return reapply_conversion(
        model, dict(scale=scale, act_layer=act_layer, norm_layer=norm_layer, replaced=replaced, kept=kept))


def reapply_conversion(model: nn.Module, conversion: Mapping[str, Any]) -> nn.Module:
    """Does to a fresh model, in place, what a recorded conversion did.

    Args:
        model: A model made as the one that was converted.
        conversion: That model's `res2net_conversion`.

    Returns:
        The model itself.

    Raises:
        ValueError: If the model lacks a convolution that was replaced or the record is not whole; the model is then
            as it was.
    """
    try:
        layer_args = {key: conversion[key] for key in ('scale', 'act_layer', 'norm_layer')}
        names = conversion['replaced']
    except KeyError as e:
        raise ValueError(f'the record of a conversion lacks {e}') from e
    find_norm_act_layer(layer_args['norm_layer'], layer_args['act_layer'])
    modules = dict(model.named_modules())
    for name in names:
        if type(modules.get(name)) is not nn.Conv2d:
            raise ValueError(f"{type(model).__name__} has no convolution '{name}' that the conversion replaced")
    layers = {name: _create_replacement(modules[name], **layer_args) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.res2net_conversion = dict(conversion)
    _logger.info(f'{len(names)} 3x3 convolutions replaced at scale {conversion["scale"]}')
    return model


def _find_convs(model: nn.Module, scale: int) -> dict[str, str]:
    """Names of all 3x3 convolutions, each with the reason to keep it, empty if it can be replaced."""
    first_convs = {_flat(name) for name in layer_names(getattr(model, 'pretrained_cfg', {}), 'first_conv')}
    hierarchies = _below(model, lambda m: isinstance(m, (SplitHierarchyConv2d, Bottle2neck)))
    folded = _below(model, _folds_its_convs)
    reasons = {}
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (3, 3):
            continue
        if name.startswith(hierarchies):
            reasons[name] = 'in a hierarchy already'
        elif _flat(name) in first_convs:
            reasons[name] = 'takes the images'
        elif name.startswith(folded):
            reasons[name] = 'its block folds it for inference'
        else:
            reasons[name] = _reason_to_keep(conv, scale)
    return reasons


def _flat(name: str) -> str:
    """A module's name as timm's features_only has it."""
    return name.replace('.', '_')


def _below(model: nn.Module, is_meant: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    """What the names of all below certain modules begin with."""
    return tuple(f'{name}.' for name, m in model.named_modules() if name and is_meant(m))


def _folds_its_convs(module: nn.Module) -> bool:
    """Whether timm's ``reparameterize_model`` calls it; the blocks of this package see themselves what was replaced."""
    is_called = any(hasattr(module, name) for name in ('fuse', 'reparameterize', 'switch_to_deploy'))
    return is_called and not type(module).__module__.startswith(f'{__package__}.')


def _reason_to_keep(conv: nn.Conv2d, scale: int) -> str:
    in_chs, out_chs, groups = conv.in_channels, conv.out_channels, conv.groups
    if type(conv) is not nn.Conv2d:
        return f'{type(conv).__name__} is more than a convolution'
    if conv.stride != (1, 1):
        return f'stride {conv.stride[0]}x{conv.stride[1]}'
    if conv.padding not in ('same', conv.dilation) or conv.dilation[0] != conv.dilation[1]:
        return f'padding {conv.padding} at dilation {conv.dilation}'
    if conv.padding_mode != 'zeros':
        return f'padding mode {conv.padding_mode}'
    if in_chs % scale:
        return f'{in_chs} channels at scale {scale}'
    if groups > 1 and in_chs != out_chs:
        return f'{in_chs} to {out_chs} channels in {groups} groups'
    if groups > 1 and groups % scale:
        return f'{groups} groups at scale {scale}'
    return ''


def _create_replacement(conv: nn.Conv2d, scale: int, act_layer: str, norm_layer: str) -> nn.Module:
    dd = get_device_dtype(conv)
    layer = SplitHierarchyConv2d(
        conv.in_channels,
        scale,
        groups=max(conv.groups // scale, 1),
        dilation=conv.dilation[0],
        act_layer=act_layer,
        norm_layer=norm_layer,
        **dd,
    )
    if conv.out_channels != conv.in_channels:
        layer = ProjectedHierarchy(layer, conv.out_channels, bias=conv.bias is not None, **dd)
    for m in layer.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return layer.train(conv.training)


def conversion_metadata(model: nn.Module) -> dict[str, str]:
    """The record of a model's conversion for the metadata of its weights' file; empty if it was not converted."""
    conversion = getattr(model, 'res2net_conversion', None)
    return {} if conversion is None else {METADATA_KEY: json.dumps(conversion)}


def conversion_in(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The conversion that `conversion_metadata` recorded; None where metadata hold none."""
    return json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None


@register_model
def res2net_converted(
        pretrained: bool = False,
        *,
        base: str | None = None,
        conversion: Mapping[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """A model with a recorded conversion: the architecture that a published converted model names.

    Args:
        pretrained: Load the weights of the pretrained configuration.
        base: timm model name.
        conversion: The record, `res2net_conversion` of a model made as `base` with the same arguments.
        **kwargs: Arguments of the base model and of timm's `build_model_with_cfg`.

    Raises:
        ValueError: If base or record are missing, timm has no such model, or the record does not fit it.
    """
    if conversion is None or base is None or not is_model(base):
        raise ValueError(
            f'res2net_converted stands for a model with a recorded conversion: it needs base, a timm model name, and '
            f'conversion, got base={base!r}')

    def create(**model_args: Any) -> nn.Module:
        return reapply_conversion(model_entrypoint(base)(**model_args), conversion)

    if kwargs.get('features_only') and 'out_indices' not in kwargs:
        kwargs['out_indices'] = _own_out_indices(base, kwargs)
    source_args = kwargs.get('pretrained_model_args') or {}
    model = build_model_with_cfg(
        create, 'res2net_converted', pretrained, feature_cfg=dict(feature_cls='getter'), **kwargs)
    # As of a model that was converted after it was made: saved again, its record goes beside the base's name.
    model.pretrained_cfg['architecture'] = base
    model.pretrained_model_args = {
        key: value for key, value in source_args.items() if key not in ('base', 'conversion')}
    return model


# Without a record it makes no model, and `timm.list_models` is what one sweeps over; timm keeps such names here.
_deprecated_models['res2net_converted'] = None


def _own_out_indices(base: str, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The features that a model gives by default, where timm has the first five for any without a choice of its own."""
    model_args = {
        key: value for key, value in kwargs.items() if key != 'cache_dir' and not key.startswith('pretrained')}
    return timm.create_model(base, **dict(model_args, device='meta')).feature_info.out_indices


def _report(name: str, scale: int, num_classes: int | None, img_size: int | None) -> str:
    """Text on what converting a model replaces, and its size before and after."""
    check_model_name(name)
    model = timm.create_model(name, num_classes=num_classes, device='meta')  # of which timm drops None
    chans, height, width = model.pretrained_cfg['input_size']
    input_size = (chans, img_size or height, img_size or width)
    before = count_params(model), count_macs(model, input_size)
    conversion = convert_res2net(model, scale).res2net_conversion
    after = count_params(model), count_macs(model, input_size)
    by_reason: dict[str, list[str]] = {}
    for conv, reason in conversion['kept'].items():
        by_reason.setdefault(reason, []).append(conv)
    lines = [f'{name}, scale {scale}, {"x".join(map(str, input_size))}']
    for what, old, new in zip(('parameters', 'MACs'), before, after):
        lines.append(f'  {what} {old / 1e6:,.2f} M -> {new / 1e6:,.2f} M ({new / old - 1:+.1%})')
    replaced = conversion['replaced']
    lines.append(f'  replaced {len(replaced)}: {", ".join(replaced)}')
    lines += [f'  kept {len(convs)} ({reason}): {", ".join(convs)}' for reason, convs in by_reason.items()]
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints what converting models replaces, and their sizes before and after; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net convert', description=(
            "Show what replacing timm models' 3x3 convolutions by the Res2Net hierarchy changes."))
    parser.add_argument('model', nargs='+', help='timm model name')
    parser.add_argument('--scale', type=int, default=4, metavar='S', help='splits of the hierarchy (%(default)s)')
    parser.add_argument('--num-classes', type=int, metavar='N', help="number of classes (the model's own)")
    parser.add_argument('--img-size', type=int, metavar='N', help="side of the image (the model's own)")
    args = parser.parse_args(argv)
    for option, value, least in (('num-classes', args.num_classes, 0), ('img-size', args.img_size, 1)):
        if value is not None and value < least:
            parser.error(f'--{option} must be at least {least}, got {value}')
    for index, name in enumerate(args.model):
        try:
            print(('\n' if index else '') + _report(name, args.scale, args.num_classes, args.img_size))
        except (AssertionError, ValueError, RuntimeError) as e:
            print(f'error: {name}: {one_line(e)}', file=sys.stderr)
            return 2
    return 0
