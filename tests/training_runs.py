"""Starts small training runs in processes of their own, and compares what they leave."""
import contextlib
import csv
import ctypes
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
from timm.utils import setup_default_logging

# Imported here so that the fork server has them once for all runs.
import sklearn.datasets  # noqa: F401
import sklearn.model_selection  # noqa: F401

from timm_dense2net.checkpoint import load_weights
from timm_dense2net.training_state import CHECKPOINT_FILE, load_state

ROOT = Path(__file__).resolve().parents[1]
TRAIN_SCRIPT = ROOT / 'train_cifar.py'

_spec = importlib.util.spec_from_file_location('train_cifar', TRAIN_SCRIPT)
train_cifar = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train_cifar)

# Everything that carries state over an update: dropout, momentum, EMA, plateau, batch norm, augmentation.
TINY = [
    '--dataset', 'digits', '--img-size', '8', '--model', 'test_resnet', '--drop', '0.2', '--crop-padding', '1',
    '--model-ema', '--model-ema-warmup', '--lr', '0.05', '--patience-epochs', '0', '--epochs', '3', '-b', '256',
    '--checkpoint-interval', '2', '--seed', '1', '--device', 'cpu']

TIMES = ('train_seconds', 'train_images_per_second')

# Child processes start from a server that has imported torch but computed nothing, so starting one takes no time.
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload([__name__])


def arguments(output, *more, name='run'):
    """The command line of a tiny run; what comes later replaces what comes earlier."""
    return [*TINY, '--output', str(output), '--experiment', name, *map(str, more)]


def run_here(argv):
    """Runs the job in this process; returns its exit code."""
    return train_cifar.main([str(item) for item in argv])


def start(argv, log, prepare=None, main=run_here):
    """Starts the job, or another command's `main`, in a process of its own, its output going to the file `log`.

    `prepare` is called in that process first, with no arguments.
    """
    paths = [str(ROOT), str(ROOT / 'tests'), *filter(None, [os.environ.get('PYTHONPATH')])]
    os.environ['PYTHONPATH'] = os.pathsep.join(dict.fromkeys(paths))
    process = _context.Process(target=_job, args=(argv, str(log), prepare, main))
    process.start()
    return process


def drop_privileges():
    """Leaves root, whose capabilities go before permissions, with what any owner of a file may do."""
    if sys.platform == 'linux':
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0


def _job(argv, log, prepare, main):
    torch.set_num_threads(1)
    # Drawing takes most of a tiny run's time, and a run does without it where matplotlib is missing.
    sys.modules['matplotlib'] = None
    with open(log, 'a') as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        setup_default_logging()
        if prepare is not None:
            prepare()
        code = main(argv)
    sys.exit(code)


def finish(process, seconds=120):
    """Waits for a process; returns its exit code, negative for a signal."""
    process.join(seconds)
    assert process.exitcode is not None, f'still running after {seconds} s'
    return process.exitcode


def kill(process):
    """Kills a process as nothing can hold off."""
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def wait_for(condition, process, seconds=60):
    """Waits until a condition holds; returns whether it did before the process ended."""
    end = time.monotonic() + seconds
    while process.is_alive():
        if condition():
            return True
        assert time.monotonic() < end, f'nothing happened in {seconds} s'
        time.sleep(0.001)
    return False


def read_summary_rows(folder):
    """Rows of summary.csv without the columns that hold times."""
    with open(Path(folder, 'summary.csv'), newline='') as f:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(f)]


def read_state(folder):
    """The last training state of a run."""
    return load_state(Path(folder, CHECKPOINT_FILE).read_bytes())


def differences(a, b, path=''):
    """Where two nested states differ in any bit, times and the arguments of the run left out."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [path]
        return [
            found for key in a if key not in ('seconds', 'args')
            for found in differences(a[key], b[key], f'{path}.{key}')]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [found for i, pair in enumerate(zip(a, b)) for found in differences(*pair, f'{path}.{i}')]
    return [] if a == b or a != a and b != b else [path]


def assert_same_run(a, b):
    """Two run folders hold the same weights, state and summary, bit for bit, times and arguments left out."""
    for name in ('last.safetensors', 'best.safetensors'):
        assert not differences(load_weights(Path(a, name))[0], load_weights(Path(b, name))[0]), name
    different = differences(read_state(a), read_state(b))
    assert not different, different
    rows, expected = read_summary_rows(a), read_summary_rows(b)
    assert rows == expected, f'{rows} is not {expected}'
