"""`python -m timm_dense2net package`: puts the weights that a run tested into the package.

    package RUN --recipe quick    adds them as ARCH.quick_c100
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from . import packaged
from .checkpoint import first_not_finite, load_weights, save_weights
from .cifar import CIFAR100_CLASSES
from .convert import METADATA_KEY
from .files import sha256_of, write_text
from .public_args import is_place
from .trained import weights_file

__all__ = ['package_run', 'main']


def package_run(run: Path, recipe: str) -> Path:
    """Adds the weights of a CIFAR-100 run that it tested in half precision, and their SHA-256.

    Args:
        run: Run folder.
        recipe: First part of the tag, ``<recipe>_c100``.

    Returns:
        Path of the packaged file.

    Raises:
        FileNotFoundError: If the run has no weights.
        ValueError: If the recipe's name cannot be part of a file's, or the weights are not for CIFAR-100's classes, do
            not say of which model they are, or that model was made with arguments or converted.
    """
    if not re.fullmatch(r'\w[\w.-]*', recipe):  # it becomes part of a file's name
        raise ValueError(f'a tag consists of letters, digits, -, _ and ., got {recipe!r}')
    state_dict, metadata = load_weights(weights_file(run))
    if 'model' not in metadata or metadata.get('num_classes') != '100':
        raise ValueError(
            f'{run}: expected weights of a named model with 100 classes, got {metadata.get("model")} with '
            f'{metadata.get("num_classes")}')
    if METADATA_KEY in metadata:
        raise ValueError(f'{run}: weights of a converted {metadata["model"]} fit no model that a name stands for')
    if metadata.get('model_args', '{}') != '{}':
        raise ValueError(f'{run}: weights of a {metadata["model"]} with {metadata["model_args"]} fit none by that name')
    if json.loads(metadata.get('class_names', 'null')) != list(CIFAR100_CLASSES):
        raise ValueError(f"{run}: expected weights for CIFAR-100's classes, in their order, got those of others")
    half = {name: t.half() if t.is_floating_point() else t for name, t in state_dict.items()}
    overflown = first_not_finite(half)
    if overflown is not None:
        raise ValueError(f'{run}: {overflown} does not fit half precision')
    path = Path(packaged.packaged_file(f'{metadata["model"].split(".")[0]}.{recipe}_c100'))
    packaged.WEIGHTS_DIR.mkdir(exist_ok=True)
    if 'args' in metadata:  # weights that a run started from may have left the package since
        args = {key: value for key, value in json.loads(metadata['args']).items() if not is_place(key, value)}
        metadata = dict(metadata, args=json.dumps(args))
    save_weights(path, half, metadata)
    sums = packaged.read_sums() | {path.name: sha256_of(path)}
    write_text(packaged.SUMS_FILE, ''.join(f'{digest}  {name}\n' for name, digest in sorted(sums.items())))
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
