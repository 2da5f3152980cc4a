"""What a run was made with: hardware, library versions, commit."""
from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

from .version import __version__

__all__ = ['environment', 'source_commit']


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and library versions."""
    return dict(
        hardware=torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name(),
        threads=torch.get_num_threads(),
        versions=dict(
            python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
            timm_dense2net=__version__),
    )


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
        return next(line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def source_commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / '.git').exists():
        return None
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'], cwd=root, capture_output=True,
            text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
