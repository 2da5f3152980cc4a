"""Makes a run's data, model and trainer from its arguments."""
from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.models import get_arch_name, is_model
from timm.utils import random_seed, reparameterize_model

from .augment import ProgressiveResize
from .checkpoint import check_finite, load_metadata
from .convert import conversion_in, conversion_metadata, convert_res2net, reapply_conversion
from .data import check_splits_agree, load_images
from .distillation import Distillation, loss_weights
from .distributed import Processes
from .engine import autocast_factory
from .errors import one_line
from .freeze import freeze_stages
from .hub import LOAD_ERRORS
from .images import PREPROCESSING, Images, dataset_stats, hold_out_split
from .loader import BatchLoader
from .meta import check_input
from .names import check_model_or_source
from .option_checks import augment_config
from .options import build_parser, saved_args
from .public_args import public_args, public_model_kwargs, weight_kwargs
from .start import load_start, pretrained_overlay, start_file
from .trained import TrainedModel, check_fits, load_test_split, load_trained, weights_config, weights_file
from .trainer import Trainer

__all__ = [
    'RunData', 'build_data', 'build_distillation', 'build_loader', 'build_model', 'build_trained', 'build_trainer',
    'weights_metadata']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """Images of a run.

    Args:
        train: Images to train on; None where nothing is trained.
        validation: Images that every epoch is judged by.
        test: Images of the final report.
        mean: Mean of each channel, pixels in 0..1.
        std: Standard deviation of each channel.
    """
    train: Images | None
    validation: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _data_args(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        data_dir=args.data_dir, download=args.dataset_download, num_classes=args.num_classes, input_key=args.input_key,
        target_key=args.target_key)


def build_data(args: argparse.Namespace) -> RunData:
    """Loads the data set; with `--hold-out` part of the training images validate in the test split's place.

    The mean and std are the arguments', else those of the pretrained weights, which are noted in the arguments so that
    a resumed run needs the weights no more, else the training images' own.

    Raises:
        FileNotFoundError: If the data set is not there.
        ValueError: If it is damaged, or does not fit the arguments.
    """
    train, test = (
        load_images(args.dataset, split, img_size=args.img_size, **_data_args(args)) for split in ('train', 'test'))
    check_splits_agree(train, test)
    if args.mean and args.std:
        mean, std = args.mean, args.std
    elif args.pretrained or args.pretrained_path:
        mean, std = _pretrained_stats(args)
        args.mean, args.std = args.mean or list(mean), args.std or list(std)
    else:
        mean, std = dataset_stats(train)
    mean, std = _stats_of_channels(args, mean, std, train.image_shape[0])
    validation = test
    if args.hold_out:
        train, validation = hold_out_split(train, args.hold_out, args.seed)
    return RunData(train, validation, test, mean, std)


def _stats_of_channels(
        args: argparse.Namespace,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The arguments' mean and std, else those given; as in timm one value is that of all channels."""
    stats = []
    for option, values in (('--mean', args.mean or mean), ('--std', args.std or std)):
        if len(values) not in (1, channels):
            raise ValueError(f'{option}: {channels} values are needed, one a channel, or one for all; got {values}')
        stats.append(tuple(values) * (channels // len(values)))
    return stats[0], stats[1]


def _pretrained_stats(args: argparse.Namespace) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that the pretrained weights were trained with."""
    check_model_or_source(args.model)
    given = weights_config(load_metadata(start_file(args.pretrained_path))) if args.pretrained_path else {}
    try:
        # Created, as the configuration of a model on the Hub or in a folder is read with it.
        cfg = timm.create_model(args.model, **weight_kwargs(args.model_kwargs)).pretrained_cfg | given
    except LOAD_ERRORS as e:
        raise ValueError(f'{args.model}: {one_line(e)}') from e
    return cfg['mean'], cfg['std']


def build_model(
        args: argparse.Namespace,
        images: Images,
        with_weights: bool = True,
        conversion: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Creates the model for the classes and channels of `images`, and converts it where `--res2net-scale` says so.

    Args:
        args: Arguments of the run.
        images: Images of the classes and channels it is for.
        with_weights: Whether it starts from the weights that the arguments name; a resumed run has its own.
        conversion: What was converted when a resumed run began.

    Raises:
        ValueError: If timm has no such model, it does not take the arguments or the weights, or cannot be converted.
    """
    check_model_or_source(args.model)
    start = (args.initial_checkpoint or args.pretrained_path) if with_weights else None
    if start:
        conversion = _conversion_at_start(start, args.res2net_scale)
    if with_weights and args.freeze_stages and args.res2net_scale and conversion is None:
        raise ValueError(
            '--freeze-stages keeps weights as they are, and the layers that --res2net-scale makes have random ones:'
            ' give one of the two')
    try:
        model = _create(args, images, with_weights, conversion)
        if conversion is not None and not hasattr(model, 'res2net_conversion'):
            reapply_conversion(model, conversion)
        if with_weights and args.initial_checkpoint:
            _load_initial(model, args.initial_checkpoint)
        if args.res2net_scale and conversion is None:
            convert_res2net(model, args.res2net_scale)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
    except LOAD_ERRORS as e:
        raise ValueError(f'{args.model}: {one_line(e)}') from e
    check_finite(model.state_dict(), start or args.model)
    check_input(model, args.model, tuple(images.image_shape))
    _check_progressive_sizes(args, args.model, model, tuple(images.image_shape))
    if args.freeze_stages:
        freeze_stages(model, args.freeze_stages)
    return convert_sync_batchnorm(model) if args.sync_bn else model


def _conversion_at_start(start: str, scale: int | None) -> dict[str, Any] | None:
    """What was converted in the model that a run's first weights are of, which has to be as the run asks for."""
    conversion = conversion_in(load_metadata(start_file(start)))
    if conversion is not None and conversion['scale'] != scale:
        raise ValueError(
            f'{start} holds weights of a model converted at scale {conversion["scale"]}: give --res2net-scale'
            f' {conversion["scale"]}' + (f', not {scale}' if scale else ''))
    return conversion


def _create(
        args: argparse.Namespace,
        images: Images,
        with_weights: bool,
        conversion: Mapping[str, Any] | None,
) -> nn.Module:
    """The model by timm, with the weights of its name or of `--pretrained-path` where it is to have these."""
    name = args.model
    shape = dict(
        num_classes=images.num_classes, in_chans=images.image_shape[0], drop_rate=args.drop,
        drop_path_rate=args.drop_path, **args.model_kwargs)
    if not (with_weights and args.pretrained_path):
        return timm.create_model(name, **shape, pretrained=with_weights and args.pretrained)
    if conversion is not None:
        cfg = timm.get_pretrained_cfg(name)
        name, shape = 'res2net_converted', dict(
            shape, base=get_arch_name(name), conversion=conversion, pretrained_cfg=cfg)
    overlay = pretrained_overlay(args.pretrained_path, timm.create_model(name, **shape), images.class_names)
    model = timm.create_model(name, **shape, pretrained=True, pretrained_cfg_overlay=overlay)
    # Loaded by now, and no part of what a copy of the model should hold.
    model.pretrained_cfg.pop('state_dict', None)
    return model


def _load_initial(model: nn.Module, path: str) -> None:
    weights, _ = load_start(path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(f'--initial-checkpoint {path} does not fit: {one_line(e)}') from e


def _check_progressive_sizes(
        args: argparse.Namespace, name: str, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Refuses images that a model does not take in the size of an early epoch."""
    progressive = _progressive_resize(args)
    sizes = [progressive.size(epoch, image_shape[1:]) for epoch in range(args.full_size_epoch)] if progressive else []
    for size in dict.fromkeys(sizes):
        try:
            check_input(model, name, (image_shape[0], *size))
        except ValueError as e:
            raise ValueError(f'--initial-img-size {args.initial_img_size}: {e}') from e


def build_loader(
        args: argparse.Namespace,
        images: Images,
        data: RunData,
        processes: Processes,
        train: bool = False,
) -> BatchLoader:
    """This process's batches of `images`; `--batch-size` is that of one process, as in timm's train.py."""
    batch_size = args.batch_size if train else args.validation_batch_size or args.batch_size
    return BatchLoader(
        images, batch_size * processes.world_size, device=processes.device, mean=data.mean, std=data.std, train=train,
        augment=augment_config(args) if train else None, progressive=_progressive_resize(args) if train else None,
        seed=args.seed, rank=processes.rank, world_size=processes.world_size, channels_last=args.channels_last,
        num_workers=args.workers)


def _progressive_resize(args: argparse.Namespace) -> ProgressiveResize | None:
    return ProgressiveResize(args.initial_img_size, args.full_size_epoch) if args.initial_img_size else None


def build_distillation(args: argparse.Namespace, data: RunData, device: torch.device) -> Distillation | None:
    """What `--kd-model-name` and `--kd-pretrained-path` ask for; None without a teacher.

    Raises:
        ValueError: If there is no such teacher, or it does not fit the data.
    """
    if not args.kd_model_name and not args.kd_pretrained_path:
        return None
    try:
        teacher = _load_teacher(args, data.train)
    except (FileNotFoundError, ValueError) as e:
        raise ValueError(f'{"--kd-model-name" if args.kd_model_name else "--kd-pretrained-path"}: {one_line(e)}') from e
    distill_weight, task_weight = loss_weights(args.distill_loss_weight, args.task_loss_weight)
    _logger.info(
        f'Teacher: {teacher.name}, temperature {args.kd_temperature}, distillation loss weight {distill_weight},'
        f' task loss weight {task_weight}')
    # Its form for inference, where it has one.
    model = reparameterize_model(teacher.model, inplace=True).requires_grad_(False)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Distillation(
        model, (data.mean, data.std), (teacher.data_config['mean'], teacher.data_config['std']), args.kd_temperature,
        distill_weight, task_weight, autocast_factory(args, device)).to(device)


def _load_teacher(args: argparse.Namespace, images: Images) -> TrainedModel:
    teacher = load_trained(args.kd_model_name, args.kd_pretrained_path)
    check_fits(teacher, images)
    _check_progressive_sizes(args, teacher.name, teacher.model, tuple(images.image_shape))
    channels = images.image_shape[0]
    for key in ('mean', 'std'):
        if len(teacher.data_config[key]) not in (1, channels):
            raise ValueError(
                f'{teacher.name} has a {key} of {len(teacher.data_config[key])} channels, the data {channels}')
    return teacher


def build_trainer(
        args: argparse.Namespace,
        data: RunData,
        processes: Processes,
        state: Mapping[str, Any] | None = None,
        trainer_class: type[Trainer] = Trainer,
        distillation: Distillation | None = None,
) -> Trainer:
    """The trainer of a run at its beginning, or where it was when `state` was taken.

    With a teacher that is there already, or the one that the arguments name.

    Raises:
        ValueError: If the arguments, the data, the model and the state do not fit each other.
    """
    # The same first weights in every process, then each its own random numbers.
    random_seed(args.seed)
    begun_with = {} if state is None else state['metadata']
    _check_classes_of(begun_with, data.train)
    model = build_model(args, data.train, with_weights=state is None, conversion=conversion_in(begun_with))
    model = model.to(processes.device)
    model = model.to(memory_format=torch.channels_last) if args.channels_last else model
    random_seed(args.seed, processes.rank)
    trainer = trainer_class(
        args, model, build_loader(args, data.train, data, processes, train=True),
        build_loader(args, data.validation, data, processes), weights_metadata(args, data, model), processes,
        distillation or build_distillation(args, data, processes.device))
    if state is not None:
        trainer.load_state_dict(state)
    return trainer


def _check_classes_of(begun_with: Mapping[str, str], images: Images) -> None:
    """Refuses images of other classes than those that a resumed run began with."""
    if 'class_names' not in begun_with:
        return
    names = json.loads(begun_with['class_names'])
    if tuple(names) == images.class_names:
        return
    before, now = next((a, b) for a, b in zip_longest(names, images.class_names) if a != b)
    raise ValueError(f'the run began on other classes: {before!r} where the data have {now!r}')


def build_trained(args: argparse.Namespace) -> tuple[nn.Module, RunData]:
    """The model that `--eval-only` names with its weights, and the test split.

    Raises:
        FileNotFoundError: If there are no such weights or no such data.
        ValueError: If either does not fit.
    """
    says_model = args.checkpoint and 'model' in load_metadata(weights_file(args.checkpoint))
    # What the file says gives way to a model that was named.
    name = None if says_model and args.model == build_parser().get_default('model') else args.model
    trained = load_trained(name, args.checkpoint, args.model_kwargs)
    args.num_classes = trained.model.num_classes
    test = load_test_split(trained, args.dataset, img_size=args.img_size, **_data_args(args))
    check_fits(trained, test)
    mean, std = _stats_of_channels(
        args, trained.data_config['mean'], trained.data_config['std'], test.image_shape[0])
    return trained.model, RunData(None, test, test, mean, std)


def weights_metadata(args: argparse.Namespace, data: RunData, model: nn.Module) -> dict[str, str]:
    """What a file of weights says of itself: plain text, or JSON where it is no text."""
    # Of a model on the Hub or in a folder, what it is there, so that the file needs neither.
    name = args.model if is_model(args.model) else model.pretrained_cfg['architecture']
    # Where a run was made is nobody's business who gets its weights.
    arguments = public_args(saved_args(args), name)
    shape = {key: value for key, value in model.pretrained_model_args.items() if key not in ('num_classes', 'in_chans')}
    return dict(
        model=get_arch_name(name),  # a tag is that of the first weights
        model_args=json.dumps(shape | public_model_kwargs(args.model_kwargs)),
        num_classes=str(data.train.num_classes),
        input_size=json.dumps(data.train.image_shape),
        mean=json.dumps(data.mean),
        std=json.dumps(data.std),
        **{key: str(value) for key, value in PREPROCESSING.items()},
        dataset=arguments['dataset'],
        class_names=json.dumps(data.train.class_names),
        args=json.dumps(arguments),
        **conversion_metadata(model),
    )
