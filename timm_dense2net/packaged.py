"""Weights inside the package: half-precision safetensors under `weights/`, each with its SHA-256 in `SHA256SUMS`.

    python -m timm_dense2net package RUN --recipe quick    adds the weights that a run tested, as ARCH.quick_c100
"""
from __future__ import annotations

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path

import torch
from timm.models import PretrainedCfg, list_models

from .checkpoint import load_weights, save_weights
from .classes import CIFAR100_CLASSES
from .hub import sha256_of

__all__ = ['BEST_PACKAGED', 'packaged_file', 'check_pretrained', 'check_packaged', 'package_run', 'main']

# Used where no weights are named: those of the highest top-1.
BEST_PACKAGED = 'dense2net121_s8.short_ft4_c100'

WEIGHTS_DIR = Path(__file__).parent / 'weights'
SUMS_FILE = WEIGHTS_DIR / 'SHA256SUMS'


def packaged_file(name: str) -> str:
    """Path of the packaged weights of ``ARCH.TAG``, for a pretrained cfg's ``file``."""
    return str(WEIGHTS_DIR / f'{name}.safetensors')


def check_pretrained(cfg: PretrainedCfg) -> None:
    """Checks that a pretrained cfg stands for weights, before a model is built for them.

    Raises:
        RuntimeError: If it has none, or its packaged weights are not those recorded.
    """
    if not (cfg.has_weights or cfg.state_dict):
        names = ', '.join(list_models(module='dense2net', pretrained=True, include_tags=True))
        raise RuntimeError(
            f'No pretrained weights exist for {cfg.architecture}; use pretrained=False for random weights, '
            f'pretrained_cfg_overlay=dict(file=...) for weights of your own, or one of: {names}')
    if cfg.file and cfg.source != 'local-dir':
        check_packaged(cfg.file)


def _read_sums() -> dict[str, str]:
    """File name -> SHA-256."""
    lines = SUMS_FILE.read_text(encoding='utf-8').splitlines() if SUMS_FILE.exists() else []
    return {name: digest for digest, name in (line.split('  ', 1) for line in lines)}


@lru_cache(maxsize=None)
def check_packaged(file: str) -> None:
    """Checks packaged weights against the SHA-256 recorded for them; other files are left to their owner.

    Raises:
        RuntimeError: If the file is not there, or is not the one recorded.
    """
    path = Path(file)
    if path.parent != WEIGHTS_DIR:
        return
    if not path.is_file():
        raise RuntimeError(f'packaged weights {path.name} are not there: install timm_dense2net again')
    digest = sha256_of(path)
    if digest != _read_sums().get(path.name):
        raise RuntimeError(
            f'packaged weights {path.name} are damaged: their SHA-256 is {digest}, and {SUMS_FILE.name} has '
            f'{_read_sums().get(path.name, "none")}; install timm_dense2net again')


def package_run(run: Path, recipe: str) -> Path:
    """Adds the weights of a CIFAR-100 run that it tested in half precision, and their SHA-256.

    Args:
        run: Run folder.
        recipe: First part of the tag, ``<recipe>_c100``.

    Returns:
        Path of the packaged file.

    Raises:
        FileNotFoundError: If the run has no weights.
        ValueError: If the weights are not for CIFAR-100's classes, do not say of which model they are, or that
            model was made with arguments or converted.
    """
    # Here, as these import the models and they this file.
    from .convert import METADATA_KEY
    from .results import replace_file
    from .trained import tested_weights
    state_dict, metadata = load_weights(tested_weights(run))
    if 'model' not in metadata or metadata.get('num_classes') != '100':
        raise ValueError(f'{run}: expected weights of a named model with 100 classes, got {metadata}')
    if METADATA_KEY in metadata:
        raise ValueError(f'{run}: weights of a converted {metadata["model"]} fit no model that a name stands for')
    if metadata.get('model_args', '{}') != '{}':
        raise ValueError(f'{run}: weights of a {metadata["model"]} with {metadata["model_args"]} fit none by that name')
    if json.loads(metadata.get('class_names', 'null')) != list(CIFAR100_CLASSES):
        raise ValueError(f"{run}: expected weights for CIFAR-100's classes, got {metadata.get('class_names')}")
    half = {name: t.half() if t.is_floating_point() else t for name, t in state_dict.items()}
    overflown = [name for name, t in half.items() if not torch.isfinite(t).all()]
    if overflown:
        raise ValueError(f'{run}: {overflown[0]} does not fit half precision')
    path = Path(packaged_file(f'{metadata["model"].split(".")[0]}.{recipe}_c100'))
    WEIGHTS_DIR.mkdir(exist_ok=True)
    save_weights(path, half, metadata)
    sums = _read_sums() | {path.name: sha256_of(path)}
    with replace_file(SUMS_FILE) as temporary:
        temporary.write_text(''.join(f'{digest}  {name}\n' for name, digest in sorted(sums.items())), encoding='utf-8')
    return path


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net package',
        description='Put the weights of a CIFAR-100 run into the package.')
    parser.add_argument('run', type=Path, metavar='RUN', help='run folder')
    parser.add_argument('--recipe', required=True, metavar='NAME', help='first part of the tag, NAME_c100')
    args = parser.parse_args(argv)
    try:
        print(package_run(args.run, args.recipe))
    except (ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    return 0
