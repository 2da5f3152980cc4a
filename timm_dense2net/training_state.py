"""The file of a whole training state, which a run goes on from.

It is a checkpoint of torch, laid out as those of timm's train.py, so that timm reads its weights too. It is read by
`weights_only=True`, which runs no code. It is written aside, synced and renamed; the one before it is kept until the
new one is whole.
"""
from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from .files import write_synced

__all__ = [
    'CHECKPOINT_FILE', 'PREVIOUS_FILE', 'CorruptCheckpointError', 'dump_state', 'load_state', 'read_state_bytes',
    'save_state']

_logger = logging.getLogger(__name__)

CHECKPOINT_FILE = 'checkpoint.pth.tar'
PREVIOUS_FILE = 'checkpoint-prev.pth.tar'

_DIGEST_SIZE = hashlib.sha256().digest_size


class CorruptCheckpointError(ValueError):
    """A training state is torn, altered or no training state at all."""


def save_state(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> Path:
    """Writes a training state to `checkpoint.pth.tar`; the one before it becomes `checkpoint-prev.pth.tar`.

    Args:
        folder: Run folder.
        state: What `torch.load` reads with `weights_only=True`.

    Returns:
        Path of the file.

    Raises:
        OSError: If the file cannot be written; the states already there are left as they were.
        TypeError: If the state holds something else; nothing is written then.
    """
    path = Path(folder, CHECKPOINT_FILE)
    write_synced(path, dump_state(state), Path(folder, PREVIOUS_FILE))
    return path


def dump_state(state: Mapping[str, Any]) -> bytes:
    """The bytes of a state's file: those of `torch.save`, then their SHA-256 digest, which torch reads past."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    unread = get_unsafe_globals_in_checkpoint(file)  # torch writes more than it reads: told now, not at --resume
    if unread:
        raise TypeError(f'a training state cannot hold {", ".join(unread)}')
    content = file.getvalue()
    return content + hashlib.sha256(content).digest()


def load_state(data: bytes) -> dict[str, Any]:
    """The training state in a file's bytes, tensors on the CPU.

    Raises:
        CorruptCheckpointError: If the bytes are not a whole, unaltered training state.
    """
    return torch.load(io.BytesIO(_checked_content(data)), map_location='cpu', weights_only=True)


def _checked_content(data: bytes) -> bytes:
    """What `torch.save` wrote, of a file's bytes that are as `dump_state` made them."""
    content, digest = data[:-_DIGEST_SIZE], data[-_DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        raise CorruptCheckpointError('the SHA-256 digest does not match: torn, altered or no training state')
    return content


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
            _checked_content(data)
        except CorruptCheckpointError as e:
            faults.append(f'{file}: {e}')
            continue
        if faults:
            _logger.warning(f'{"; ".join(faults)}; using {file.name} instead.')
        return data
    if faults:
        raise CorruptCheckpointError('; '.join(faults))
    return None
