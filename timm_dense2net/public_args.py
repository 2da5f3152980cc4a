"""What of a run's arguments may be given away with its weights: nothing of the machine that it was made on."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import IN_DATA_DIR
from .packaged import is_packaged
from .recipe import recipe_name

__all__ = ['WEIGHT_KWARGS', 'is_data_set_id', 'is_place', 'public_args', 'public_model_kwargs', 'weight_kwargs']

# They tell of the machine that a run was made on, and nothing of the run.
_PLACES = frozenset((
    'output', 'experiment', 'data_dir', 'pretrained_path', 'initial_checkpoint', 'kd_pretrained_path'))

# What timm.create_model takes of where weights are; the rest of --model-kwargs is the model's shape.
WEIGHT_KWARGS = frozenset(('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'))


def weight_kwargs(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `--model-kwargs` says of where the weights are."""
    return {key: value for key, value in model_kwargs.items() if key in WEIGHT_KWARGS}


def public_model_kwargs(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`--model-kwargs` without where weights were taken from."""
    return {key: value for key, value in model_kwargs.items() if key not in WEIGHT_KWARGS}


def is_place(name: str, value: Any) -> bool:
    """Whether an argument's value is a path of the machine: packaged weights have a name."""
    if name in ('model', 'kd_model_name'):
        return str(value).startswith('local-dir:')
    return name in _PLACES and not (name in ('pretrained_path', 'initial_checkpoint') and is_packaged(value))


def public_args(args: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A run's saved arguments as they may be given away: without the paths of the machine it was made on.

    Args:
        args: Arguments by name.
        model: Name of the architecture, for a model that lay in a folder.
    """
    public = {key: value for key, value in args.items() if not is_place(key, value)}
    return public | dict(
        model=model, model_kwargs=public_model_kwargs(args['model_kwargs']),
        dataset=_public_dataset(args['dataset'], args.get('data_dir') or ''), recipe=recipe_name(args['recipe']))


def _public_dataset(dataset: str, data_dir: str) -> str:
    """A public data set's name as it is, of a path the folder's own name."""
    if is_data_set_id(dataset):
        return dataset
    folder = data_dir if dataset in IN_DATA_DIR else dataset.removeprefix('hfds/')
    return Path(os.path.abspath(folder)).name


def is_data_set_id(dataset: str) -> bool:
    """Whether a data set's name is that of a public one: not a path, nor hfds/ and a path."""
    is_hub_id = re.fullmatch(r'hfds/[\w.-]+/[\w.-]+', dataset) and not Path(dataset.removeprefix('hfds/')).is_dir()
    return dataset.startswith('torch/') or bool(is_hub_id)
