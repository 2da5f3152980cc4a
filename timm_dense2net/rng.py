"""The streams of random numbers that data draws from, and the random states a process depends on."""
from __future__ import annotations

import random

import numpy as np
import torch

__all__ = [
    'AUGMENTATION_STREAM', 'HOLD_OUT_STREAM', 'PERMUTATION_STREAM', 'STATS_STREAM', 'rng_state', 'set_rng_state']

# First words of each stream's entropy. numpy takes (1, 2) and (1, 2, 0) for the same seed, so streams of different
# length need different first words.
PERMUTATION_STREAM, AUGMENTATION_STREAM, HOLD_OUT_STREAM, STATS_STREAM = 1, 2, 3, 4


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch (CPU and `device`), NumPy and Python, as tensors that can be saved."""
    version, internal, gauss_next = random.getstate()
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    state = dict(
        torch=torch.get_rng_state(),
        numpy_keys=torch.from_numpy(keys.astype(np.int64)),
        numpy_rest=torch.tensor([position, has_gauss, cached_gaussian], dtype=torch.double),
        python_internal=torch.tensor([version, *internal]),
        python_gauss=torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.double),
    )
    if device.type != 'cpu':
        state['device'] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Sets what `rng_state` returned; the device's state is left alone if it was taken on another kind of device."""
    torch.set_rng_state(state['torch'])
    position, has_gauss, cached_gaussian = state['numpy_rest'].tolist()
    np.random.set_state(
        ('MT19937', state['numpy_keys'].numpy().astype(np.uint32), int(position), int(has_gauss), cached_gaussian))
    version, *internal = state['python_internal'].tolist()
    random.setstate((version, tuple(internal), next(iter(state['python_gauss'].tolist()), None)))
    if device.type != 'cpu' and 'device' in state:
        torch.get_device_module(device).set_rng_state(state['device'], device)
