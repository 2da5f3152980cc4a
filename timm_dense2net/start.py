"""What a run starts from: pretrained weights in a file."""
from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from .checkpoint import load_weights
from .dense2net import Dense2Net, SplitHierarchyConv2d
from .names import layer_names
from .packaged import check_packaged, is_packaged, packaged_file
from .trained import weights_config, weights_file, weights_shape

__all__ = ['start_file', 'load_start', 'pretrained_overlay']

_logger = logging.getLogger(__name__)


def start_file(name: str | Path) -> Path:
    """The file of weights that a run starts from: packaged weights by name, those that a run tested, or a file."""
    return Path(packaged_file(str(name))) if is_packaged(name) else weights_file(name)


def load_start(name: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """State dict and metadata of the weights that a run starts from, of packaged ones after their SHA-256 was checked.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no weights.
        RuntimeError: If packaged weights are damaged.
    """
    file = start_file(name)
    check_packaged(str(file))
    return load_weights(file)


def pretrained_overlay(path: str | Path, model: nn.Module, class_names: Sequence[str]) -> dict[str, Any]:
    """A file of weights in the place of those that a model's name stands for.

    timm adapts head and first convolution as it does for weights of its own. Weights of as many classes as are trained
    on keep their head, unless the file names other classes. Attention that they were trained without is new, a
    hierarchy of fewer splits starts from convolutions side by side, and one of more groups from the kernels within its
    groups.

    Args:
        path: Run folder (the weights that it tested), safetensors file, checkpoint of timm's train.py, or packaged
            weights (``ARCH.TAG``).
        model: The timm model that they are for, with other weights.
        class_names: Names of the classes that it is to tell apart.

    Returns:
        timm's ``pretrained_cfg_overlay``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no weights, or lacks parameters of the model other than those of the head and
            of attention, or has more.
        RuntimeError: If packaged weights are damaged.
    """
    weights, metadata = load_start(path)
    merged = _merged_splits(model, weights)
    if merged.keys() != weights.keys():
        _logger.info(f'{path}: of more splits than the model, whose 3x3 convolutions start from theirs, side by side')
    grouped = _kernels_within_groups(model, merged)
    if grouped:
        _logger.info(f'{path}: of fewer groups than the model, whose 3x3 kernels start from theirs within its groups')
    weights = _attention(model) | merged | grouped
    _check_names(path, weights, metadata, model)
    shape = weights_shape(model.pretrained_cfg, weights, metadata)
    num_classes = shape.get('num_classes', 0)
    if json.loads(metadata.get('class_names', 'null')) not in (None, list(class_names)):
        num_classes = 0  # timm makes a new head where the number is another
    config = dict(input_size=model.pretrained_cfg['input_size']) | weights_config(metadata)
    if 'in_chans' in shape:
        config['input_size'] = (shape['in_chans'], *config['input_size'][1:])
    return dict(config, state_dict=weights, file=None, num_classes=num_classes)


def _attention(model: nn.Module) -> dict[str, torch.Tensor]:
    # Norms read what the gates scale: gates that are nearly the same for all images change nothing of a batch in
    # training, though running statistics have to follow them.
    if not isinstance(model, Dense2Net):
        return {}
    return {name: tensor for name, tensor in model.state_dict().items() if '.attn.' in name}


def _merged_splits(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of hierarchies in as many splits as the model has, where the file has a multiple of them."""
    merged = dict(weights)
    for name, layer in model.named_modules():
        if isinstance(layer, SplitHierarchyConv2d):
            own = [key for key in weights if key.startswith((f'{name}.convs.', f'{name}.norms.'))]
            old_scale = 1 + sum(key.startswith(f'{name}.convs.') for key in own)
            if 1 < layer.scale < old_scale and old_scale % layer.scale == 0 and _is_divided(
                    weights[f'{name}.convs.0.weight'], layer, old_scale // layer.scale):
                tensors = {key.removeprefix(f'{name}.'): merged.pop(key) for key in own}
                merged |= {f'{name}.{key}': tensor for key, tensor in _merge(tensors, layer, old_scale).items()}
    return merged


def _is_divided(kernel: torch.Tensor, layer: SplitHierarchyConv2d, count: int) -> bool:
    # Splits of kernels (O, I, H, W): as wide as one of the layer, whose groups are whole ones of theirs.
    width, inputs = kernel.shape[:2]
    return width * count == layer.width and layer.width // layer.groups % inputs == 0


def _merge(
        tensors: Mapping[str, torch.Tensor], layer: SplitHierarchyConv2d, old_scale: int) -> dict[str, torch.Tensor]:
    # Each new convolution does what those of its splits did, but takes in the splits before them instead of each
    # other: not the same function, and near enough to go on from.
    count = old_scale // layer.scale
    merged = {}
    for key in tensors:
        kind, index, parameter = key.split('.', 2)
        if int(index) >= layer.scale - 1:
            continue
        first = (int(index) + 1) * count - 1  # split 0 has no convolution
        parts = [tensors[f'{kind}.{i}.{parameter}'] for i in range(first, first + count)]
        if kind == 'convs':
            merged[key] = _side_by_side(parts, layer.width // layer.groups)
        else:
            merged[key] = torch.cat(parts) if parts[0].ndim else parts[0]
    return merged


def _side_by_side(kernels: Sequence[torch.Tensor], inputs: int) -> torch.Tensor:
    """One kernel (n * O, inputs, H, W) of n kernels (O, I, H, W), each group of which reads channels of its own."""
    rows = torch.cat(list(kernels))
    width = rows.shape[1]  # of a group, in inputs as in outputs
    merged = rows.new_zeros(len(rows), inputs, *rows.shape[2:])
    for first in range(0, len(rows), width):
        merged[first:first + width, first % inputs:first % inputs + width] = rows[first:first + width]
    return merged


def _kernels_within_groups(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Kernels of hierarchies of as many groups as the model has, where the file has fewer, a divisor of them."""
    grouped = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SplitHierarchyConv2d):
            inputs = layer.width // layer.groups
            for key in (f'{name}.convs.{i}.weight' for i in range(layer.scale - 1)):
                outputs, before = weights[key].shape[:2] if key in weights else (0, 0)
                if outputs == layer.width and before > inputs and before % inputs == 0:
                    grouped[key] = _blocks(weights[key], inputs)
    return grouped


def _blocks(kernel: torch.Tensor, inputs: int) -> torch.Tensor:
    """Of a kernel (O, I, H, W) that (O, inputs, H, W) by which each output channel reads its own group."""
    before = kernel.shape[1]
    return torch.cat([
        kernel[first:first + inputs, first % before:first % before + inputs]
        for first in range(0, len(kernel), inputs)])


def _check_names(
        path: str | Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str], model: nn.Module) -> None:
    """timm itself only logs what weights for other classes lack."""
    heads = tuple(f'{name}.' for name in layer_names(model.pretrained_cfg, 'classifier'))
    # Frozen norms count no batches.
    names = {name for name in weights.keys() ^ model.state_dict().keys() if not name.endswith('num_batches_tracked')}
    other = sorted(name for name in names if not name.startswith(heads))
    if other:
        held = ''
        if 'model' in metadata:
            model_args = metadata.get('model_args', '{}')
            held = f' holds weights of {metadata["model"]}{"" if model_args == "{}" else " " + model_args} and'
        what = f'{"has more" if other[0] in weights else "lacks some"}, {other[0]} first'
        raise ValueError(f'{path}{held} does not fit {model.pretrained_cfg["architecture"]}: it {what}')
