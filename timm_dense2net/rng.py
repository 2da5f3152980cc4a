"""The streams of random numbers that data draws from, and the random states a process depends on."""
from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = [
    'AUGMENTATION_STREAM', 'HOLD_OUT_STREAM', 'PERMUTATION_STREAM', 'STATS_STREAM', 'rng_state', 'set_rng_state']

# First words of each stream's entropy. numpy takes (1, 2) and (1, 2, 0) for the same seed, so streams of different
# length need different first words.
PERMUTATION_STREAM, AUGMENTATION_STREAM, HOLD_OUT_STREAM, STATS_STREAM = 1, 2, 3, 4


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of torch (CPU and `device`), NumPy and Python, as `torch.load` reads them with `weights_only=True`."""
    name, keys, *rest = np.random.get_state()
    state = dict(torch=torch.get_rng_state(), numpy=(name, keys.tolist(), *rest), python=random.getstate())
    if device.type != 'cpu':
        state['device'] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Sets what `rng_state` returned; the device's state is left alone if it was taken on another kind of device."""
    torch.set_rng_state(state['torch'])
    np.random.set_state(state['numpy'])
    random.setstate(state['python'])
    if device.type != 'cpu' and 'device' in state:
        torch.get_device_module(device).set_rng_state(state['device'], device)
