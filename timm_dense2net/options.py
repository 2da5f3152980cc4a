"""Arguments of `train_cifar.py`, with timm's names for what timm's train.py has.

A value comes from, in order of rising precedence: the defaults here (the deck's SGD recipe), a recipe or the arguments
saved with a run that is resumed, the command line.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from .option_checks import check_args
from .public_args import is_data_set_id
from .recipe import NOT_SAVED, check_values, list_recipes, load_recipe, read_yaml
from .training_state import CHECKPOINT_FILE, PREVIOUS_FILE

__all__ = ['ARGS_FILE', 'HOST_ARGS', 'SCHEDULES', 'SPEED_ARGS', 'build_parser', 'parse_args', 'saved_args']

ARGS_FILE = 'args.yaml'
_OUTPUT = './output'

# timm has no list of them; 'plateau' is torch's here, as its state can be saved.
SCHEDULES = ('plateau', 'cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none')

# They say how a machine does the work and what it shows of it.
HOST_ARGS = frozenset((
    'device', 'workers', 'log_interval', 'checkpoint_interval', 'log_wandb', 'log_tensorboard', 'dataset_download'))

# Arguments that only tell how fast a run goes.
SPEED_ARGS = frozenset((
    'validation_batch_size', 'channels_last', 'grad_checkpointing', 'torchcompile', 'torchcompile_layers',
    'cuda_graph'))

# What a resumed run may change: where things are, how the host works, how fast it goes, how long it lasts.
_MAY_CHANGE = HOST_ARGS | SPEED_ARGS | {
    'output', 'experiment', 'recipe', 'data_dir', 'kd_pretrained_path', 'batch_size', 'grad_accum_steps', 'epochs',
    'early_stop_patience', 'dist_bn', 'sync_bn'}


class _ModelKwargs(ParseKwargs):
    """timm's, with a message for a word that is no pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                raise ValueError(f"{option_string} takes KEY=VALUE, got '{value}'")
        super().__call__(parser, namespace, values, option_string)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


_FLAG = argparse.BooleanOptionalAction


def build_parser() -> argparse.ArgumentParser:
    """The parser; its defaults are the deck's Dense2Net run, and it raises ValueError for what it cannot parse."""
    parser = _Parser(
        description='Train and evaluate a timm model on CIFAR-100 or any timm data set.',
        allow_abbrev=False)
    _add_run_args(parser.add_argument_group('Run'))
    _add_data_args(parser.add_argument_group('Data'))
    _add_model_args(parser.add_argument_group('Model'))
    _add_optimization_args(parser.add_argument_group('Optimizer and schedule'))
    _add_augmentation_args(parser.add_argument_group('Augmentation'))
    _add_distillation_args(parser.add_argument_group('Knowledge distillation'))
    _add_speed_args(parser.add_argument_group('Speed and machines'))
    return parser


def _add_run_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--recipe', metavar='NAME', help=f'packaged recipe or YAML file ({", ".join(list_recipes())})')
    group.add_argument('--output', default=_OUTPUT, metavar='DIR', help='folder of run folders (%(default)s)')
    group.add_argument('--experiment', metavar='NAME', help="run folder's name (date-model-recipe)")
    group.add_argument(
        '--resume', metavar='PATH', help="run folder or checkpoint; 'auto': the run of --experiment where there is one")
    group.add_argument('--eval-only', action='store_true', help='evaluate --checkpoint or --pretrained, train nothing')
    group.add_argument('--checkpoint', metavar='PATH', help='run folder or weights to evaluate with --eval-only')
    group.add_argument('--seed', type=int, default=42, metavar='N')
    group.add_argument('--device', default=None, help='cpu, cuda, ... (cuda where there is one)')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help=(
        'batches between readings of the loss, which wait for the device (%(default)s)'))
    group.add_argument('--checkpoint-interval', type=int, default=0, metavar='N', help=(
        'save the training state every N updates too, 0: after each epoch only'))
    group.add_argument('--log-wandb', action=_FLAG, default=False, help='log to Weights & Biases')
    group.add_argument('--log-tensorboard', action=_FLAG, default=False, help='log to TensorBoard')


def _add_data_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('-d', '--dataset', default='torch/cifar100', metavar='NAME', help=(
        "timm data set spec, path of an image folder, or 'digits' (%(default)s)"))
    group.add_argument('--data-dir', metavar='DIR', help=(
        "folder of a torch/ data set, or of images (--dataset folder); cache of an hfds/ one"))
    group.add_argument('--dataset-download', action=_FLAG, default=False, help='download where supported')
    group.add_argument('--input-key', metavar='NAME', help='image column of a Hugging Face data set')
    group.add_argument('--target-key', metavar='NAME', help='label column of a Hugging Face data set')
    group.add_argument('--hold-out', type=int, default=0, metavar='N', help=(
        'choose on N training images; the test split is touched once, at the end'))
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='a process (%(default)s)')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help=(
        'processes that decode images of data that does not fit in memory (%(default)s)'))
    group.add_argument('--img-size', type=int, metavar='N', help="side of the images (the data set's own)")
    group.add_argument('--initial-img-size', type=int, metavar='N', help=(
        "progressive resizing: shorter side of the first epoch's training images, a multiple of 4; it grows up to "
        '--full-size-epoch'))
    group.add_argument('--full-size-epoch', type=int, metavar='N', help=(
        'first epoch at full size, counted from 0; a run of N epochs or fewer ends before it'))
    group.add_argument('--mean', type=float, nargs='+', metavar='MEAN', help='override the mean, pixels in 0..1')
    group.add_argument('--std', type=float, nargs='+', metavar='STD', help='override the standard deviation')


def _add_model_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--model', default='dense2net121_s4', metavar='MODEL', help='any timm model (%(default)s)')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE')
    group.add_argument('--pretrained', action=_FLAG, default=False, help='start from (or evaluate) pretrained weights')
    group.add_argument('--pretrained-path', metavar='PATH', help=(
        "run folder, safetensors file, checkpoint of timm's train.py or packaged weights (ARCH.TAG) in the place of the"
        ' pretrained weights, with adaptation'))
    group.add_argument('--initial-checkpoint', metavar='PATH', help=(
        'the same, all of the weights as they are: for the same classes'))
    group.add_argument('--num-classes', type=int, metavar='N', help="number of classes (the data's)")
    group.add_argument('--freeze-stages', type=int, default=0, metavar='N', help=(
        'keep the stem and the first N stages (dense blocks) as their weights are, batch statistics too'))
    group.add_argument('--drop', type=float, metavar='PCT', help='dropout rate')
    group.add_argument('--drop-path', type=float, metavar='PCT', help='drop-path rate')
    group.add_argument('--res2net-scale', type=int, metavar='S', help=(
        "replace the model's 3x3 convolutions by Dense2Net's hierarchy of S splits, after its weights are loaded"))
    group.add_argument(
        '--model-ema', action=_FLAG, default=False, help='keep an exponential moving average of weights')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='D')
    group.add_argument(
        '--model-ema-warmup', action=_FLAG, default=False, help='warm the decay up; needed on short runs')


def _add_optimization_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--epochs', type=int, default=100, metavar='N')
    group.add_argument(
        '--opt', default='momentum', metavar='OPTIMIZER', help="timm's name; 'momentum' is plain SGD, 'sgd' Nesterov's")
    group.add_argument('--opt-eps', type=float, metavar='EPSILON', help="the optimizer's (its default)")
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='BETA', help="the optimizer's (its default)")
    group.add_argument('--lr', type=float, default=0.1, metavar='LR')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M')
    group.add_argument(
        '--weight-decay', type=float, default=1e-4, metavar='WD', help='on biases and norms too (%(default)s)')
    group.add_argument('--clip-grad', type=float, metavar='NORM')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    group.add_argument('--layer-decay', type=float, metavar='D', help='layer-wise learning-rate decay')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N')
    group.add_argument('--sched', default='plateau', choices=SCHEDULES, metavar='SCHEDULER', help=(
        f"'plateau' (on validation loss, %(default)s is the default) or timm's {', '.join(SCHEDULES[1:])}"))
    group.add_argument('--sched-on-updates', action=_FLAG, default=False, help='step the schedule each update')
    group.add_argument('--warmup-epochs', type=int, default=0, metavar='N')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR')
    group.add_argument('--min-lr', type=float, default=0., metavar='LR')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N', help=(
        'plateau: epochs without a lower validation loss before the rate decays (%(default)s)'))
    group.add_argument('--decay-rate', type=float, default=0.1, metavar='RATE', help='factor of plateau, step, ...')
    group.add_argument('--decay-epochs', type=float, metavar='N', help=(
        'step: epochs between decays (90); wsd, rsqrt: epochs of the decay, below 1 a part of all (0.2)'))
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help=(
        'plateau: epochs after a decay that do not count; cosine, tanh, poly, wsd, rsqrt: epochs at --min-lr after '
        "the schedule's end"))
    group.add_argument('--early-stop-patience', type=int, metavar='N', help=(
        'stop after N epochs without a better validation top-1, 0: never (25 with plateau, else 0)'))


def _add_augmentation_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--aug', action=_FLAG, default=True, help=(
        '--no-aug turns all training augmentation off, mixup and cutmix too'))
    group.add_argument('--hflip', type=float, default=0.5, metavar='P')
    group.add_argument('--crop-padding', type=int, default=4, metavar='N', help='pad by N and crop back at random')
    group.add_argument('--cutout-holes', type=int, default=0, metavar='N')
    group.add_argument('--cutout-length', type=int, default=8, metavar='N')
    group.add_argument('--aa', default='', metavar='NAME', help="AutoAugment policy: 'cifar10' or none")
    group.add_argument('--mixup', type=float, default=0., metavar='ALPHA', help=(
        "alpha, drawn anew for each image as by timm's --mixup-mode elem"))
    group.add_argument('--cutmix', type=float, default=0., metavar='ALPHA', help='the same')
    group.add_argument('--mixup-prob', type=float, default=1., metavar='P')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help=(
        'first epoch without mixup and cutmix, 0: never off'))
    group.add_argument('--smoothing', type=float, default=0., metavar='E', help='label smoothing')


def _add_distillation_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--kd-model-name', metavar='MODEL', help=(
        "teacher: a timm model with weights for the data's classes, whose answers are targets too"))
    group.add_argument('--kd-pretrained-path', metavar='PATH', help=(
        "the teacher's run folder, safetensors file or checkpoint of timm's train.py"))
    group.add_argument('--kd-temperature', type=float, default=4., metavar='T', help='(%(default)s)')
    group.add_argument('--distill-loss-weight', type=float, metavar='W', help=(
        "weight of the teacher's answers (1, or what the task weight leaves of 1)"))
    group.add_argument('--task-loss-weight', type=float, metavar='W', help='weight of the labels (1)')


def _add_speed_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--amp', action=_FLAG, default=False, help='mixed precision')
    group.add_argument('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'))
    group.add_argument('--channels-last', action=_FLAG, default=False)
    group.add_argument('--grad-checkpointing', action=_FLAG, default=False, help=(
        'keep less for the backward pass and compute it again'))
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    group.add_argument('--torchcompile-layers', action=_FLAG, default=False, help=(
        "compile what follows the bottlenecks of Dense2Net's layers, in a fraction of the time; has no effect on those "
        'that train in a form of their own, on a GPU those with a hierarchy'))
    group.add_argument('--cuda-graph', action=_FLAG, default=False, help=(
        'capture forward and backward pass in a CUDA graph; has no effect on other devices'))
    group.add_argument('--sync-bn', action=_FLAG, default=False, help='batch statistics over all processes (GPU)')
    group.add_argument('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''), help=(
        'share running batch-norm statistics between processes after each epoch'))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line over a recipe and, when resuming, over the run's saved arguments.

    Raises:
        ValueError: If a recipe or saved arguments are bad, or options cannot go together.
    """
    parser = build_parser()
    early, _ = _early_parser().parse_known_args(argv)
    saved = _saved_args_file(early)
    if saved:
        values = read_yaml(saved, str(saved))
        recipe = values.pop('recipe', None)
        if early.recipe and early.recipe != recipe:
            raise ValueError(f'{saved.parent} was started with recipe {recipe}, it cannot go on with {early.recipe}')
        parser.set_defaults(**check_values(values, parser, str(saved)), recipe=recipe)
    elif early.recipe:
        parser.set_defaults(**load_recipe(early.recipe, parser))
    args = parser.parse_args(argv)
    if saved:
        _check_same_folder(early, saved)
        args.output, args.experiment = str(saved.parent.parent), saved.parent.name
        _check_unchanged(args, parser, saved)
    check_args(args)
    return args


def _check_same_folder(early: argparse.Namespace, saved: Path) -> None:
    run = saved.parent
    output = Path(early.output or run.parent)
    folder = output / (early.experiment or run.name)
    # An experiment may be several folders deep in the output.
    if folder.resolve() != run and (early.experiment or output.resolve() not in run.parents):
        raise ValueError(
            f'--resume {early.resume} goes on in its own folder, not in {folder}: leave out --output and --experiment,'
            f' or begin a new run{_from_its_weights(run)}')


def _from_its_weights(run: Path) -> str:
    weights = run / 'last.safetensors'  # not there before the first epoch is over
    return f', if need be with --initial-checkpoint {weights}' if weights.is_file() else ''


def _check_unchanged(args: argparse.Namespace, parser: argparse.ArgumentParser, saved: Path) -> None:
    for name in vars(args).keys() - _MAY_CHANGE - set(NOT_SAVED):
        # YAML makes lists of tuples.
        before, now = (json.loads(json.dumps(value)) for value in (parser.get_default(name), getattr(args, name)))
        if before != now and not (name == 'dataset' and _may_be_moved(before, now)):
            raise ValueError(
                f'{saved.parent} was started with {name} {before}, it cannot go on with {now}: begin a new run'
                f'{_from_its_weights(saved.parent)}')


def _may_be_moved(before: str, now: str) -> bool:
    """Whether two names of data may be of one folder, moved or named from another place."""
    in_folders = not any(name == 'digits' or is_data_set_id(name) for name in (before, now))
    return in_folders and Path(before).name == Path(now).name


def _early_parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ('--recipe', '--resume', '--experiment', '--output'):
        parser.add_argument(name)
    return parser


def _saved_args_file(early: argparse.Namespace) -> Path | None:
    """args.yaml of the run that is resumed, if one is."""
    if not early.resume:
        return None
    if early.resume == 'auto':
        if not early.experiment:
            raise ValueError('--resume auto needs --experiment to know which run is meant')
        folder = Path(early.output or _OUTPUT, early.experiment)
        begun = any((folder / name).exists() for name in (CHECKPOINT_FILE, PREVIOUS_FILE))
        return folder.resolve() / ARGS_FILE if begun else None
    given = Path(early.resume)
    path = (given if given.is_dir() else given.parent) / ARGS_FILE
    if not path.is_file():
        why = f'{path} is missing' if given.exists() else 'no such file or folder'
        raise ValueError(f'--resume {early.resume}: no run is there ({why})')
    return path.resolve()


def saved_args(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that make a run what it is, as plain values for YAML and JSON."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SAVED}
