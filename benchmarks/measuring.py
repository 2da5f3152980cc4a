"""What the benchmarks share: the device, the time and peak memory of one call, and what the figures are of.

Peak memory is that of the GPU where there is one, else of the process (Linux).
"""
import ctypes
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable

import torch

from timm_dense2net.environment import environment, source_commit

__all__ = ['DEVICE', 'in_process', 'machine', 'peak_mb_of', 'seconds']

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
if DEVICE.type == 'cuda':
    # As in timm's benchmark.py and train_cifar.py. Convolutions compute so by default, and the training form takes
    # matrix products for those of 1x1.
    torch.backends.cuda.matmul.allow_tf32 = True
COMMIT = source_commit() or 'unknown'  # before figures are written into the checkout


def machine() -> str:
    """What figures are of: hardware, torch and the code's commit."""
    found = environment(DEVICE)
    hardware = found['hardware'] if DEVICE.type == 'cuda' else f'{found["threads"]} threads of {found["hardware"]}'
    return f'{hardware}, torch {torch.__version__}, commit {COMMIT}'


def seconds(step: Callable[[], Any]) -> float:
    """Time of a call, with all that it starts on a GPU."""
    synchronize = torch.cuda.synchronize if DEVICE.type == 'cuda' else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a module's function in a process of its own; what it raises is raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def peak_mb_of(step: Callable[[], Any]) -> float:
    """Peak memory of a call above that before it, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # What making the network has freed is still this process's: a small step would fit there and seem to need none.
    if hasattr(ctypes.CDLL(None), 'malloc_trim'):
        ctypes.CDLL(None).malloc_trim(0)
    # getrusage's peak would be that of making the network, or of the process which started this one.
    Path('/proc/self/clear_refs').write_text('5')
    before = _resident_mb('VmRSS')
    step()
    return _resident_mb('VmHWM') - before


def _resident_mb(field: str) -> float:
    """This process's resident memory, VmRSS now or VmHWM at its peak, in MiB."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**10
