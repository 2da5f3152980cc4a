"""Turns a checkpoint of a 32x32 model into weights of its `d` model, for larger images: all but the stem.

    python -m timm_dense2net enlarge output/RUN --model dense2net121d_s4 --output dense2net121d_s4.safetensors
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from timm.models import list_models

from .checkpoint import save_weights
from .dense2net import Dense2Net
from .files import output_file
from .start import load_start

__all__ = ['load_all_but_stem', 'main']


def load_all_but_stem(model: Dense2Net, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Loads the weights of a Dense2Net with another stem, in place.

    The stem keeps the model's own weights, and so does the classifier where the number of classes differs.

    Args:
        model: The model.
        weights: State dict of a model with the same blocks.

    Returns:
        Names of the model's tensors that were not loaded.

    Raises:
        ValueError: If the blocks differ, or the stem does not; the model is then as it was.
    """
    stem = re.compile(model.group_matcher()['stem'])
    own = model.state_dict()
    stem_parameters = {name: tensor.shape for name, tensor in model.named_parameters() if stem.match(name)}
    if all(name in weights and weights[name].shape == shape for name, shape in stem_parameters.items()):
        raise ValueError('the weights have this stem already: the model takes them as they are')
    classifier = {name for name in own if name.startswith('classifier.')}
    taken = {name: tensor for name, tensor in weights.items() if not stem.match(name)}
    if not classifier or any(name not in taken or taken[name].shape != own[name].shape for name in classifier):
        taken = {name: tensor for name, tensor in taken.items() if not name.startswith('classifier.')}
    else:
        classifier = set()
    wanted = {name for name in own if not stem.match(name)} - classifier
    # Frozen norms count no batches.
    taken = {name: own[name] for name in wanted if name.endswith('.num_batches_tracked')} | taken
    wrong = sorted(
        name for name in wanted | taken.keys()
        if name not in wanted or name not in taken or taken[name].shape != own[name].shape)
    if wrong:
        raise ValueError(f'the weights are of other blocks: {len(wrong)} tensors differ, the first is {wrong[0]}')
    model.load_state_dict(taken, strict=False)
    return [name for name in own if name not in taken]


def _enlarge(path: str, name: str, output: Path, num_classes: int | None) -> str:
    if name not in list_models('dense2net*d_*', module='dense2net'):
        known = ', '.join(list_models('dense2net*d_*', module='dense2net'))
        raise ValueError(f"--model {name} has no stem for larger images: it must be one of {known}")
    weights, metadata = load_start(path)
    if num_classes is None:
        num_classes = len(weights['classifier.bias']) if 'classifier.bias' in weights else 0
    model_args = metadata.get('model_args', '{}')
    try:
        model = timm.create_model(name, num_classes=num_classes, **json.loads(model_args))
    except TypeError as e:
        raise ValueError(f'--model {name} does not take the arguments {model_args} of {path}: {e}') from e
    left = load_all_but_stem(model, weights)
    has_classifier = num_classes > 0 and 'classifier.bias' not in left
    kept = {key: metadata[key] for key in ('class_names', 'dataset') if key in metadata and has_classifier}
    kept |= dict(model=name, model_args=model_args, num_classes=str(num_classes))
    save_weights(output, model.state_dict(), kept)
    return f'{output}: {len(model.state_dict()) - len(left)} tensors from {path}, new: {", ".join(left)}'


def main(argv: list[str] | None = None) -> int:
    """Writes the weights; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net enlarge',
        description="Turn a 32x32 model's checkpoint into weights of its 'd' model, all but the stem.")
    parser.add_argument('checkpoint', help=(
        "run folder, safetensors file, checkpoint of timm's train.py or packaged weights (ARCH.TAG)"))
    parser.add_argument('--model', required=True, help="'d' model of the same depth and scale")
    parser.add_argument('--output', required=True, type=output_file, metavar='FILE', help='safetensors file to write')
    parser.add_argument('--num-classes', type=int, metavar='N', help=(
        "classes (the checkpoint's); with another number the classifier is new"))
    args = parser.parse_args(argv)
    try:
        print(_enlarge(args.checkpoint, args.model, args.output, args.num_classes))
    except (ValueError, OSError, RuntimeError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return 0
