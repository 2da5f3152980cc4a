"""Files of weights and of whole training states, in safetensors: tensors and JSON, nothing that runs when it is read.

A training state is written aside, synced and renamed; the one before it is kept until the new one is whole. Each
carries a SHA-256 digest of all it holds, so a torn or altered file is known when it is read. Of others, checkpoints of
timm's train.py are read as weights, by torch's `weights_only=True`, which runs nothing either.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import logging
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
from .files import replace_file

__all__ = [
    'CHECKPOINT_FILE', 'PREVIOUS_FILE', 'CorruptCheckpointError', 'save_state', 'load_state', 'read_state_bytes',
    'save_weights', 'load_weights', 'load_metadata', 'check_finite', 'first_not_finite',
]

_logger = logging.getLogger(__name__)

CHECKPOINT_FILE = 'checkpoint.safetensors'
PREVIOUS_FILE = 'checkpoint-prev.safetensors'

# How files of `torch.save` begin, and those from before torch 1.6.
_ZIP, _PICKLES = b'PK\x03\x04', b'\x80\x02\x8a\n'

_TENSOR, _ITEMS, _TUPLE, _DTYPE = '$tensor', '$items', '$tuple', '$dtype'


class CorruptCheckpointError(ValueError):
    """A training state is torn, altered or no training state at all."""


def save_state(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> Path:
    """Writes a training state to `checkpoint.safetensors`; the one before it becomes `checkpoint-prev.safetensors`.

    Args:
        folder: Run folder.
        state: Nested dicts, lists and tuples of tensors, numbers, texts, booleans and None.

    Returns:
        Path of the file.

    Raises:
        OSError: If the file cannot be written; the states already there are left as they were.
        TypeError: If the state holds something else.
    """
    path, previous = Path(folder, CHECKPOINT_FILE), Path(folder, PREVIOUS_FILE)
    data = dump_state(state)
    with replace_file(path) as temporary:
        _write_synced(temporary, data)
        if path.exists():
            os.replace(path, previous)
    _sync_folder(path.parent)
    return path


def dump_state(state: Mapping[str, Any]) -> bytes:
    """The bytes of a training state's file."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(state, 'state', tensors))
    return safetensors.torch.save(tensors, {'state': text, 'sha256': _digest(tensors, text)})


def load_state(data: bytes) -> dict[str, Any]:
    """The training state in a file's bytes, tensors on the CPU.

    Raises:
        CorruptCheckpointError: If the bytes are not a whole, unaltered training state.
    """
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], 'little')
        metadata = json.loads(data[8:8 + length])['__metadata__']
        text, digest = metadata['state'], metadata['sha256']
    except KeyError as e:
        raise CorruptCheckpointError('no training state, but a file of weights') from e
    except (safetensors.SafetensorError, ValueError, TypeError) as e:
        raise CorruptCheckpointError(f'not a whole training state ({e})') from e
    if _digest(tensors, text) != digest:
        raise CorruptCheckpointError('the SHA-256 digest does not match: the file was altered')
    return _unpack(json.loads(text), tensors)


def read_state_bytes(path: str | os.PathLike[str]) -> bytes | None:
    """The bytes of the newest whole training state.

    Args:
        path: A run folder, whose last state is read or, with a warning, the one before it; or a state's own file.

    Returns:
        Bytes that `load_state` takes, or None where the folder holds no state.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        CorruptCheckpointError: If there are states but none of them is whole.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'no run folder or checkpoint at {path}')
    candidates = [path / CHECKPOINT_FILE, path / PREVIOUS_FILE] if path.is_dir() else [path]
    candidates = [file for file in candidates if file.exists()]
    faults = []
    for file in candidates:
        data = file.read_bytes()
        try:
            load_state(data)
        except CorruptCheckpointError as e:
            faults.append(f'{file}: {e}')
            continue
        if faults:
            _logger.warning(f'{"; ".join(faults)}; using {file.name} instead.')
        return data
    if faults:
        raise CorruptCheckpointError('; '.join(faults))
    return None


def save_weights(
        path: str | os.PathLike[str],
        state_dict: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
) -> None:
    """Writes a model's state dict, under timm's names, with text metadata, in one step.

    Raises:
        OSError: If the file cannot be written; one already there is left as it was.
    """
    path = Path(path)
    tensors = {name: _detached(tensor) for name, tensor in state_dict.items()}
    with replace_file(path) as temporary:
        _write_synced(temporary, safetensors.torch.save(tensors, {'format': 'pt', **metadata}))
    _sync_folder(path.parent)


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads weights from a safetensors file, or from a checkpoint of timm's train.py (its EMA where it has one).

    Returns:
        State dict on the CPU, and the file's metadata; of timm's checkpoint what train.py was told of model and images,
        by the same names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, not whole, a training state, which holds more than weights, or a value is not
            finite.
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
            if {'state', 'sha256'} <= (f.metadata() or {}).keys():
                raise ValueError(
                    f'{path} is a training state, for --resume; last.safetensors and best.safetensors beside it hold'
                    ' weights')
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


def _write_synced(path: Path, data: bytes) -> None:
    """Writes a file down to the disk."""
    with open(path, 'wb') as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut, where the system can."""
    if os.name != 'posix':
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU copy: safetensors refuses tensors that share memory, as tied weights do."""
    return tensor.detach().to('cpu', copy=True).contiguous()


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = _detached(value)
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, f'{path}.{key}', tensors) for key, item in value.items()}
        return {_ITEMS: [[key, _pack(item, f'{path}.{key}', tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f'{path}.{index}', tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix('torch.')}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f'{path}: a {type(value).__name__} cannot be saved')


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _ITEMS in value:
        return {key: _unpack(item, tensors) for key, item in value[_ITEMS]}
    if _TUPLE in value:
        return tuple(_unpack(item, tensors) for item in value[_TUPLE])
    if _DTYPE in value:
        return getattr(torch, value[_DTYPE])
    return {key: _unpack(item, tensors) for key, item in value.items()}


def _digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """SHA-256 over names, types, shapes and values of all tensors and over the JSON text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f'\n{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
