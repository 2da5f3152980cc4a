"""Makes a run's data, model and result from its arguments."""
from __future__ import annotations

import argparse
import difflib
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import is_model, list_models, split_model_name_tag

from .augment import AugmentConfig
from .checkpoint import load_weights
from .data import BatchLoader, ImageArrays, check_same_classes, dataset_stats, hold_out_split, load_arrays
from .distributed import Processes
from .options import saved_args
from .version import __version__

__all__ = ['RunData', 'build_data', 'build_model', 'build_loader', 'load_evaluated', 'weights_metadata', 'environment']


@dataclass(frozen=True)
class RunData:
    """Images of a run.

    Args:
        train: Images to train on.
        validation: Images that every epoch is judged by.
        test: Images of the final report.
        mean: Mean of each channel, pixels in 0..1.
        std: Standard deviation of each channel.
    """
    train: ImageArrays
    validation: ImageArrays
    test: ImageArrays
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _load(args: argparse.Namespace, split: str) -> ImageArrays:
    return load_arrays(
        args.dataset, split, data_dir=args.data_dir, download=args.dataset_download, num_classes=args.num_classes,
        img_size=args.img_size, input_key=args.input_key, target_key=args.target_key)


def build_data(args: argparse.Namespace) -> RunData:
    """Loads the data set; with `--hold-out` the test split is kept from validation.

    The mean and std are the arguments', else those of the pretrained weights, else the training images' own.

    Raises:
        ValueError: If the data set and the arguments do not fit.
    """
    train, test = _load(args, 'train'), _load(args, 'test')
    check_same_classes(train, test)
    mean, std = _resolve_statistics(args, train)
    validation = test
    if args.hold_out:
        train, validation = hold_out_split(train, args.hold_out, args.seed)
    return RunData(train, validation, test, mean, std)


def _resolve_statistics(args: argparse.Namespace, train: ImageArrays) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pretrained_cfg = timm.get_pretrained_cfg(args.model, allow_unregistered=True) if args.pretrained else None
    mean, std = (pretrained_cfg.mean, pretrained_cfg.std) if pretrained_cfg else dataset_stats(train)
    return tuple(args.mean or mean), tuple(args.std or std)


def build_model(args: argparse.Namespace, arrays: ImageArrays) -> nn.Module:
    """Creates the model for the classes and channels of `arrays`.

    Raises:
        ValueError: If timm has no such model or it does not take the arguments.
    """
    if ':' not in args.model and not is_model(args.model):
        close = difflib.get_close_matches(split_model_name_tag(args.model)[0], list_models(), n=3)
        raise ValueError(f"timm has no model '{args.model}'" + (f', did you mean {" or ".join(close)}?' if close else ''))
    try:
        return timm.create_model(
            args.model, pretrained=args.pretrained, checkpoint_path=args.initial_checkpoint or '', num_classes=arrays.num_classes,
            in_chans=arrays.images.shape[1], drop_rate=args.drop, drop_path_rate=args.drop_path, **args.model_kwargs)
    except TypeError as e:
        raise ValueError(f'{args.model}: {e}') from e


def build_loader(
        args: argparse.Namespace,
        arrays: ImageArrays,
        data: RunData,
        processes: Processes,
        train: bool = False,
) -> BatchLoader:
    """Batches of one process; `--batch-size` is a process's own, as in timm's train.py."""
    batch_size = args.batch_size if train else args.validation_batch_size or args.batch_size
    return BatchLoader(
        arrays, batch_size * processes.world_size, device=processes.device, mean=data.mean, std=data.std, train=train,
        augment=augment_config(args) if train and args.aug else None, seed=args.seed, rank=processes.rank,
        world_size=processes.world_size, channels_last=args.channels_last)


def augment_config(args: argparse.Namespace) -> AugmentConfig:
    """The augmentation that the arguments ask for."""
    return AugmentConfig(
        hflip=args.hflip, crop_padding=args.crop_padding, auto_augment=args.aa, cutout_holes=args.cutout_holes,
        cutout_length=args.cutout_length, mixup=args.mixup, cutmix=args.cutmix, mixup_prob=args.mixup_prob,
        mixup_switch_prob=args.mixup_switch_prob, mixup_off_epoch=args.mixup_off_epoch, smoothing=args.smoothing)


def weights_metadata(args: argparse.Namespace, data: RunData) -> dict[str, str]:
    """What a file of weights says of itself, each value as JSON or plain text."""
    return dict(
        model=args.model,
        model_args=json.dumps(args.model_kwargs),
        num_classes=str(data.train.num_classes),
        input_size=json.dumps(list(data.train.images.shape[1:])),
        mean=json.dumps(data.mean),
        std=json.dumps(data.std),
        dataset=args.dataset,
        class_names=json.dumps(data.train.class_names),
        args=json.dumps(saved_args(args)),
    )


def load_evaluated(args: argparse.Namespace) -> tuple[nn.Module, RunData]:
    """The model that `--eval-only` names, and its data; what the weights' metadata knows replaces the arguments.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If the file cannot be read or does not fit the model.
    """
    if args.pretrained:
        data = build_data(args)
        return build_model(args, data.test), data
    path = Path(args.checkpoint)
    weights, metadata = load_weights(path / 'last.safetensors' if path.is_dir() else path)
    if 'model_args' in metadata:
        args.model, args.model_kwargs = metadata['model'], json.loads(metadata['model_args'])
        args.num_classes = int(metadata['num_classes'])
        args.mean, args.std = json.loads(metadata['mean']), json.loads(metadata['std'])
    data = build_data(args)
    model = build_model(args, data.test)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(f'{path} does not fit {args.model}: {" ".join(str(e).split())[:300]}') from e
    return model, data


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, library versions and the source's commit."""
    hardware = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    return dict(
        hardware=hardware,
        threads=torch.get_num_threads(),
        versions=dict(
            python=platform.python_version(), torch=torch.__version__, timm=timm.__version__, timm_dense2net=__version__),
        commit=_commit(),
        command=sys.argv,
    )


def _commit() -> str | None:
    try:
        return subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--match='], cwd=Path(__file__).parent, capture_output=True,
            text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
