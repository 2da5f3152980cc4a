"""Files of weights, in safetensors: tensors and texts, nothing that runs when it is read.

Checkpoints of timm's train.py and training states are read too, by torch's `weights_only=True`, which runs nothing
either.
"""
from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict
from timm.utils import load_checkpoint_metadata

from .errors import one_line
from .files import write_synced

__all__ = ['check_finite', 'first_not_finite', 'load_metadata', 'load_weights', 'save_weights']

# How files of `torch.save` begin, and those from before torch 1.6.
_ZIP, _PICKLES = b'PK\x03\x04', b'\x80\x02\x8a\n'


def save_weights(
        path: str | os.PathLike[str],
        state_dict: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
) -> None:
    """Writes a model's state dict, under timm's names, with text metadata, in one step.

    Raises:
        OSError: If the file cannot be written; one already there is left as it was.
    """
    tensors = {name: _detached(tensor) for name, tensor in state_dict.items()}
    write_synced(path, safetensors.torch.save(tensors, {'format': 'pt', **metadata}))


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads weights from a safetensors file, or from a training state or a checkpoint of timm's train.py.

    Of the last two, those of the EMA where there is one.

    Returns:
        State dict on the CPU, and the file's metadata; of timm's checkpoint what train.py was told of model and images,
        by the same names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of these, not whole, or a value is not finite.
    """
    if _first_bytes(path) in (_ZIP, _PICKLES):
        with _explain_torch_errors(path):
            weights, metadata = timm.models.load_state_dict(str(path)), _torch_metadata(path)
        others = [str(name) for name, value in weights.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise ValueError(
                f'{path}: no state dict, nor one as state_dict or model: {", ".join(others)} are no tensors')
    else:
        with _open_weights(path) as f:
            weights, metadata = clean_state_dict({name: f.get_tensor(name) for name in f.keys()}), f.metadata() or {}
    check_finite(weights, path)
    return weights, metadata


def check_finite(weights: Mapping[str, torch.Tensor], source: str | os.PathLike[str]) -> None:
    """Checks that weights are numbers, as those of a run that diverged may not be.

    Args:
        weights: State dict.
        source: Where they are from, for the message.

    Raises:
        ValueError: If a value is infinite or not a number.
    """
    name = first_not_finite(weights)
    if name is not None:
        raise ValueError(f'{source}: {name} holds values that are not finite')


def first_not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that is not finite, None where all are; it waits for the device once."""
    floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    if not floating:
        return None
    finite = torch.stack([tensor.isfinite().all() for tensor in floating.values()]).tolist()
    return None if all(finite) else list(floating)[finite.index(False)]


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file of weights alone; errors are those of `load_weights`."""
    if _first_bytes(path) in (_ZIP, _PICKLES):
        with _explain_torch_errors(path):
            return _torch_metadata(path)
    with _open_weights(path) as f:
        return f.metadata() or {}


@contextmanager
def _open_weights(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, 'pt') as f:
            yield f
    except safetensors.SafetensorError as e:
        raise ValueError(f'{path}: not a whole safetensors file ({e})') from e


def _first_bytes(path: str | os.PathLike[str]) -> bytes:
    """The four bytes that tell what kind of file it is.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no weights at {path}')
    with open(path, 'rb') as f:
        return f.read(4)


def _torch_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    # timm's train.py keeps its arguments beside the weights.
    # The older files cannot be mapped into memory, and timm's train.py writes none.
    checkpoint = load_checkpoint_metadata(path) if _first_bytes(path) == _ZIP else {}
    checkpoint = checkpoint if isinstance(checkpoint, Mapping) else {}
    if 'metadata' in checkpoint:  # a training state of ours
        return checkpoint['metadata']
    name, args = checkpoint.get('arch'), checkpoint.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    if not isinstance(name, str) or not timm.is_model(name):  # without arguments it is the name of the model's class
        return {}
    pooling = {'global_pool': args['gp']} if args.get('gp') else {}
    metadata = dict(model=name, model_args=json.dumps(pooling | (args.get('model_kwargs') or {})))
    if args.get('img_size') and not args.get('input_size'):
        args['input_size'] = args.get('in_chans') or 3, args['img_size'], args['img_size']
    metadata |= {key: json.dumps(args[key]) for key in ('input_size', 'mean', 'std', 'crop_pct') if args.get(key)}
    return metadata | {key: args[key] for key in ('interpolation', 'crop_mode') if args.get(key)}


@contextmanager
def _explain_torch_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (
            AttributeError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError,
            safetensors.SafetensorError) as e:  # the last: timm goes by the name
        raise ValueError(f'{path}: no weights that torch reads with weights_only=True ({one_line(e)})') from e


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU copy: safetensors refuses tensors that share memory, as tied weights do."""
    return tensor.detach().to('cpu', copy=True).contiguous()
