"""Arguments of `train_cifar.py`: timm's names for what timm's train.py has, recipes, and what cannot go together.

A value comes from, in order of rising precedence: the defaults here (the deck's SGD recipe), a recipe or the arguments
saved with a run that is resumed, the command line.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from timm.optim import list_optimizers
from timm.utils import ParseKwargs
from timm.utils.distributed import is_distributed_env

from .augment import AugmentConfig
from .checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE
from .errors import one_line
from .names import did_you_mean, is_utf8, option
from .packaged import is_packaged

__all__ = [
    'augment_config', 'build_parser', 'parse_args', 'check_args', 'list_recipes', 'load_recipe', 'saved_args',
    'is_place', 'public_args', 'public_model_kwargs', 'recipe_name', 'ARGS_FILE', 'HOST_ARGS', 'SCHEDULES']

ARGS_FILE = 'args.yaml'
_OUTPUT = './output'

# timm has no list of them; 'plateau' is torch's here, as its state can be saved.
SCHEDULES = ('plateau', 'cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none')

# Set for one invocation and no part of what a run is.
_NOT_SAVED = ('resume', 'eval_only', 'checkpoint')
# Where a run lies.
_RUN_FOLDER = ('output', 'experiment')

# They tell of the machine that a run was made on, and nothing of the run.
_PLACES = frozenset((
    'output', 'experiment', 'data_dir', 'pretrained_path', 'initial_checkpoint', 'kd_pretrained_path'))

# They say how a machine does the work and what it shows of it.
HOST_ARGS = frozenset((
    'device', 'workers', 'log_interval', 'checkpoint_interval', 'log_wandb', 'log_tensorboard', 'dataset_download'))

# What timm.create_model takes of where weights are; the rest of --model-kwargs is the model's shape.
_WEIGHT_KWARGS = frozenset(('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'))

# Arguments of a model in training that are set otherwise, and by what.
_OWN_KWARGS = dict(
    num_classes='--num-classes', in_chans='the channels of the images', drop_rate='--drop',
    drop_path_rate='--drop-path', pretrained='--pretrained', checkpoint_path='--initial-checkpoint')

# Arguments that only tell how fast a run goes.
SPEED_ARGS = frozenset((
    'validation_batch_size', 'channels_last', 'grad_checkpointing', 'torchcompile', 'torchcompile_layers',
    'cuda_graph'))

# What a resumed run may change: where things are, how the host works, how fast it goes, how long it lasts.
_MAY_CHANGE = HOST_ARGS | SPEED_ARGS | {
    'output', 'experiment', 'recipe', 'data_dir', 'kd_pretrained_path', 'batch_size', 'grad_accum_steps', 'epochs',
    'early_stop_patience', 'dist_bn', 'sync_bn'}


# Option, what it must be, and whether a value is that; text is as it stands in the message.
_RANGES = (
    *((name, f'at least {least}', lambda value, least=least: value >= least) for name, least in (
        ('res2net_scale', 2), ('epochs', 1), ('batch_size', 1), ('validation_batch_size', 1), ('grad_accum_steps', 1),
        ('log_interval', 1), ('checkpoint_interval', 0), ('hold_out', 0), ('early_stop_patience', 0), ('img_size', 1),
        ('full_size_epoch', 1), ('workers', 0), ('freeze_stages', 0), ('patience_epochs', 0),
        ('cooldown_epochs', 0), ('warmup_epochs', 0), ('num_classes', 1), ('lr', 0), ('warmup_lr', 0), ('min_lr', 0),
        ('weight_decay', 0), ('distill_loss_weight', 0), ('task_loss_weight', 0))),
    *((name, 'above 0', lambda value: value > 0) for name in (
        'clip_grad', 'decay_rate', 'decay_epochs', 'opt_eps', 'kd_temperature')),
    # What NumPy takes.
    ('seed', 'in [0, 2^32)', lambda value: 0 <= value < 1 << 32),
    ('opt_betas', 'in [0, 1)', lambda value: all(0 <= beta < 1 for beta in value)),
    *((name, 'in [0, 1)', lambda value: 0 <= value < 1) for name in (
        'smoothing', 'momentum', 'model_ema_decay', 'drop', 'drop_path')),
    ('initial_img_size', 'a multiple of 4 above 0', lambda value: value > 0 and value % 4 == 0),
    ('layer_decay', 'in (0, 1]', lambda value: 0 < value <= 1),
    ('std', 'above 0', lambda value: all(deviation > 0 for deviation in value)),
)


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
        "timm data set spec, or 'digits' (%(default)s)"))
    group.add_argument('--data-dir', metavar='DIR', help='folder of a torch/ data set, cache of an hfds/ one')
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
    group.add_argument('--initial-checkpoint', metavar='PATH', help='start from these weights')
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
        'that train in a form of their own'))
    group.add_argument('--cuda-graph', action=_FLAG, default=False, help=(
        'capture forward and backward pass in a CUDA graph; has no effect on other devices'))
    group.add_argument('--sync-bn', action=_FLAG, default=False, help='batch statistics over all processes (GPU)')
    group.add_argument('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''), help=(
        'share running batch-norm statistics between processes after each epoch'))


def list_recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.name[:-5] for path in _recipe_folder().iterdir() if path.name.endswith('.yaml'))


def _recipe_folder():
    return resources.files(__package__) / 'recipes'


def load_recipe(name: str, parser: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """Reads and checks a recipe: a YAML mapping of argument names, with underscores, to values.

    Args:
        name: A packaged recipe's name, or the path of a YAML file; a run's args.yaml is one.
        parser: The parser whose arguments the recipe sets.

    Raises:
        ValueError: If there is no such recipe, a key is not an argument or says where a run lies, or a value is of the
            wrong type.
    """
    if name in list_recipes():
        text = (_recipe_folder() / f'{name}.yaml').read_text(encoding='utf-8')
    elif Path(name).is_file():
        text = _read_text(Path(name))
    else:
        raise ValueError(f"no recipe '{name}': give a YAML file or one of {', '.join(list_recipes())}")
    values = _parse_yaml(text, f'recipe {name}')
    if 'recipe' in values:
        # The saved arguments of a run: where it lay is no part of how it was made.
        values = {key: value for key, value in values.items() if key not in ('recipe', *_RUN_FOLDER)}
    for key in _RUN_FOLDER:
        if key in values:  # --resume auto looks for a run before it reads a recipe
            raise ValueError(f"recipe {name}: '{key}' is no part of how a run is made: give it as {option(key)}")
    return _check_values(values, parser or build_parser(), f'recipe {name}')


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except UnicodeDecodeError as e:
        raise ValueError(f'{path} is not a text file: {e}') from None


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f'{source}: not YAML: {one_line(e)}') from e
    if not isinstance(values, dict):
        raise ValueError(f'{source}: a mapping of argument names to values is expected')
    return values


def _check_values(values: Mapping[str, Any], parser: argparse.ArgumentParser, source: str) -> dict[str, Any]:
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'recipe', *_NOT_SAVED)}
    checked = {}
    for key, value in values.items():
        if key not in actions:
            raise ValueError(f"{source}: unknown key '{key}'{did_you_mean(str(key), actions)}")
        checked[key] = _check_value(actions[key], value, f'{source}: {key}')
    return checked


def _check_value(action: argparse.Action, value: Any, where: str) -> Any:
    if value is None:
        if action.default is not None:
            raise ValueError(f'{where} has no value')
        return None
    if isinstance(action, argparse.BooleanOptionalAction):
        return _expect(isinstance(value, bool), value, value, 'true or false', where)
    if isinstance(action, ParseKwargs):
        return _expect(isinstance(value, dict), value, value, 'a mapping', where)
    if action.nargs == '+':
        if not isinstance(value, list) or not value:
            raise ValueError(f'{where} must be a list, got {value!r}')
        return [_check_scalar(action, item, where) for item in value]
    return _check_scalar(action, value, where)


def _check_scalar(action: argparse.Action, value: Any, where: str) -> Any:
    if action.type is int:
        return _expect(isinstance(value, int) and not isinstance(value, bool), value, value, 'a whole number', where)
    if action.type is float:
        # YAML 1.1 reads 1e-4, without a point, as text.
        number = _to_float(value)
        return _expect(number is not None, number, value, 'a number', where)
    _expect(isinstance(value, str), value, value, 'text', where)
    if action.choices is not None:
        _expect(value in action.choices, value, value, f'one of {", ".join(map(repr, action.choices))}', where)
    return value


def _to_float(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _expect(holds: bool, result: Any, value: Any, wanted: str, where: str) -> Any:
    if not holds:
        raise ValueError(f'{where} must be {wanted}, got {value!r}')
    return result


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line over a recipe and, when resuming, over the run's saved arguments.

    Raises:
        ValueError: If a recipe or saved arguments are bad, or options cannot go together.
    """
    parser = build_parser()
    early, _ = _early_parser().parse_known_args(argv)
    saved = _saved_args_file(early)
    if saved:
        values = _parse_yaml(_read_text(saved), str(saved))
        recipe = values.pop('recipe', None)
        if early.recipe and early.recipe != recipe:
            raise ValueError(f'{saved.parent} was started with recipe {recipe}, it cannot go on with {early.recipe}')
        parser.set_defaults(**_check_values(values, parser, str(saved)), recipe=recipe)
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
    output, experiment = early.output or saved.parent.parent, early.experiment or saved.parent.name
    if Path(output, experiment).resolve() != saved.parent:
        raise ValueError(
            f'--resume {early.resume} goes on in its own folder, not in {Path(output, experiment)}: leave out --output'
            f' and --experiment, or begin a new run{_from_its_weights(saved.parent)}')


def _from_its_weights(run: Path) -> str:
    weights = run / 'last.safetensors'  # not there before the first epoch is over
    return f', if need be with --initial-checkpoint {weights}' if weights.is_file() else ''


def _check_unchanged(args: argparse.Namespace, parser: argparse.ArgumentParser, saved: Path) -> None:
    for name in vars(args).keys() - _MAY_CHANGE - set(_NOT_SAVED):
        # YAML makes lists of tuples.
        before, now = (json.loads(json.dumps(value)) for value in (parser.get_default(name), getattr(args, name)))
        if before != now and not (name == 'dataset' and _may_be_moved(before, now)):
            raise ValueError(
                f'{saved.parent} was started with {name} {before}, it cannot go on with {now}: begin a new run'
                f'{_from_its_weights(saved.parent)}')


def _may_be_moved(before: str, now: str) -> bool:
    """Whether two names of data may be of one folder, moved or named from another place."""
    in_folders = not any(name == 'digits' or _is_data_set_id(name) for name in (before, now))
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
    return {key: value for key, value in sorted(vars(args).items()) if key not in _NOT_SAVED}


def weight_kwargs(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `--model-kwargs` says of where the weights are."""
    return {key: value for key, value in model_kwargs.items() if key in _WEIGHT_KWARGS}


def public_model_kwargs(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`--model-kwargs` without where weights were taken from."""
    return {key: value for key, value in model_kwargs.items() if key not in _WEIGHT_KWARGS}


def is_place(name: str, value: Any) -> bool:
    """Whether an argument's value is a path of the machine: packaged weights have a name."""
    if name in ('model', 'kd_model_name'):
        return str(value).startswith('local-dir:')
    return name in _PLACES and not (name == 'pretrained_path' and is_packaged(value))


def public_args(args: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A run's saved arguments as they may be given away: without the paths of the machine it was made on.

    Args:
        args: Arguments by name.
        model: Name of the architecture, for a model that lay in a folder.
    """
    public = {key: value for key, value in args.items() if not is_place(key, value)}
    return public | dict(
        model=model, model_kwargs=public_model_kwargs(args['model_kwargs']),
        dataset=args['dataset'] if _is_data_set_id(args['dataset']) else Path(args['dataset']).name,
        recipe=recipe_name(args['recipe']))


def _is_data_set_id(dataset: str) -> bool:
    """Whether a data set's name is that of a public one: not a path, nor hfds/ and a path."""
    is_hub_id = re.fullmatch(r'hfds/[\w.-]+/[\w.-]+', dataset) and not Path(dataset.removeprefix('hfds/')).is_dir()
    return dataset.startswith('torch/') or bool(is_hub_id)


def recipe_name(recipe: str | None) -> str | None:
    """A packaged recipe's name, or that of a recipe's file."""
    return recipe and Path(recipe).name


def check_args(args: argparse.Namespace) -> None:
    """Refuses what cannot work before any work is done.

    Raises:
        ValueError: Naming the value, or the two options that cannot go together.
    """
    if not is_utf8(args.dataset):  # the weights' metadata tell it
        raise ValueError(f'--dataset {args.dataset!r} is not UTF-8; rename it')
    _check_ranges(args)
    _check_augmentation(args)
    # timm itself drops any other first word.
    if args.opt.lower().removeprefix('lookahead_') not in list_optimizers():
        raise ValueError(f"timm has no optimizer '{args.opt}'{did_you_mean(args.opt, list_optimizers())}")
    if args.torchcompile and args.torchcompile not in (backends := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(f"torch has no compiler backend '{args.torchcompile}', only {', '.join(backends)}")
    if args.sched == 'plateau' and (args.warmup_epochs or args.sched_on_updates):
        raise ValueError(
            '--sched plateau steps once an epoch and has no warm-up: leave out --warmup-epochs and --sched-on-updates')
    if args.sched == 'rsqrt' and not args.warmup_epochs:
        raise ValueError('--sched rsqrt falls from the end of a warm-up on: give --warmup-epochs of at least 1')
    if args.sched == 'none' and args.layer_decay not in (None, 1):
        raise ValueError('--layer-decay is applied by the schedule: give --sched constant, not none')
    if args.warmup_epochs >= args.epochs and args.sched != 'none':
        raise ValueError(f'--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}')
    _check_progressive_resizing(args)
    if args.eval_only:
        _check_eval_only(args)
    elif args.checkpoint:
        raise ValueError('--checkpoint names weights to evaluate: add --eval-only, or train on --initial-checkpoint')
    _check_model_kwargs(args)
    _check_start(args)
    _check_distillation(args)
    for name, package in (('log_wandb', 'wandb'), ('log_tensorboard', 'tensorboard')):
        if getattr(args, name) and importlib.util.find_spec(package) is None:
            raise ValueError(f'{option(name)}: {package} is not installed')
    if args.torchcompile == 'eager' and args.grad_checkpointing:
        raise ValueError(
            '--torchcompile eager and --grad-checkpointing: torch cannot run what it makes of the two; give another'
            ' backend, such as aot_eager or inductor')
    if args.cuda_graph and args.grad_checkpointing:
        raise ValueError('--cuda-graph and --grad-checkpointing: it asks for random states, which a capture has not')
    if args.cuda_graph and args.grad_accum_steps > 1:
        raise ValueError(
            f'--cuda-graph captures an update of one batch: --grad-accum-steps must be 1, got {args.grad_accum_steps}')
    if args.cuda_graph and args.amp and args.amp_dtype == 'float16':
        raise ValueError(
            '--cuda-graph and --amp-dtype float16: its gradient scaler waits for the device; give bfloat16')
    if args.sync_bn and not is_distributed_env():
        raise ValueError('--sync-bn shares batch statistics between processes: start them with torchrun')
    if args.sync_bn and (args.device == 'cpu' or not torch.cuda.is_available()):
        raise ValueError('--sync-bn works between GPUs only; --dist-bn shares the running statistics on a CPU')


def _check_eval_only(args: argparse.Namespace) -> None:
    if args.resume:
        raise ValueError('--eval-only trains nothing, so --resume has no meaning: name the run with --checkpoint')
    if args.pretrained_path:
        raise ValueError(
            '--pretrained-path names weights to train on; to evaluate them, name them by --checkpoint, packaged'
            ' ones by --model ARCH.TAG --pretrained, and no recipe that trains on others')
    if args.initial_checkpoint:
        raise ValueError(
            '--initial-checkpoint names weights to train on; to evaluate them, name them by --checkpoint')
    if not args.checkpoint and not args.pretrained:
        raise ValueError('--eval-only needs --checkpoint PATH or --pretrained')
    if args.checkpoint and args.pretrained:
        raise ValueError(
            '--eval-only needs either --checkpoint PATH or --pretrained: where a recipe says pretrained, add '
            '--no-pretrained')
    if args.pretrained and args.res2net_scale:
        raise ValueError(
            '--eval-only --pretrained evaluates a model as it is, and --res2net-scale makes layers without weights:'
            ' give one of the two')


def _check_ranges(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f'{option(name)} must be finite, got {value}')
    for name, wanted, holds in _RANGES:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f'{option(name)} must be {wanted}, got {value}')
    if args.decay_milestones != sorted({max(epoch, 1) for epoch in args.decay_milestones}):
        raise ValueError(
            f'--decay-milestones must be epochs from 1 on, each above the one before, got {args.decay_milestones}')
    if args.sched == 'plateau' and args.decay_rate >= 1:
        raise ValueError(f'--decay-rate must be below 1 for --sched plateau, got {args.decay_rate}')


def augment_config(args: argparse.Namespace) -> AugmentConfig | None:
    """What is done to training batches; None for nothing.

    Raises:
        ValueError: If a value is out of its range, naming it as `AugmentConfig` does.
    """
    if not args.aug:
        return None
    return AugmentConfig(
        hflip=args.hflip, crop_padding=args.crop_padding, auto_augment=args.aa, cutout_holes=args.cutout_holes,
        cutout_length=args.cutout_length, mixup=args.mixup, cutmix=args.cutmix, mixup_prob=args.mixup_prob,
        mixup_switch_prob=args.mixup_switch_prob, mixup_off_epoch=args.mixup_off_epoch, smoothing=args.smoothing)


def _check_augmentation(args: argparse.Namespace) -> None:
    try:
        augment_config(args)
    except ValueError as e:
        name, _, fault = str(e).partition(' ')
        raise ValueError(f'{option("aa" if name == "auto_augment" else name)} {fault}') from e


def _check_progressive_resizing(args: argparse.Namespace) -> None:
    if (args.initial_img_size is None) != (args.full_size_epoch is None):
        raise ValueError('--initial-img-size and --full-size-epoch go together: give both or neither')


def _check_model_kwargs(args: argparse.Namespace) -> None:
    if args.model_kwargs.get('features_only'):
        raise ValueError('--model-kwargs: features_only leaves no classifier')
    for name, value in args.model_kwargs.items():
        if value is None:
            raise ValueError(
                f"--model-kwargs: timm drops {name}=None, and the model's own value stays: name another --model")
    for name, instead in _OWN_KWARGS.items():
        if name in args.model_kwargs and not args.eval_only:
            raise ValueError(f'--model-kwargs: {name} is set by {instead}')


def _check_start(args: argparse.Namespace) -> None:
    """What a run starts from."""
    if args.initial_checkpoint and (args.pretrained or args.pretrained_path):
        given = '--pretrained-path' if args.pretrained_path else '--pretrained'
        raise ValueError(f'{given} and --initial-checkpoint both set the first weights: give one')
    if args.pretrained_path and ':' in args.model:
        raise ValueError(
            f'--pretrained-path sets the first weights, and so does --model {args.model}: name the architecture alone')
    if args.pretrained_path and _WEIGHT_KWARGS & args.model_kwargs.keys():
        raise ValueError('--pretrained-path and --model-kwargs pretrained_cfg... both set the first weights: give one')
    if args.freeze_stages and not (args.pretrained or args.pretrained_path or args.initial_checkpoint):
        raise ValueError(
            f'--freeze-stages {args.freeze_stages} keeps weights as they are, and there are none yet: name them with'
            ' --pretrained, --pretrained-path or --initial-checkpoint')


def _check_distillation(args: argparse.Namespace) -> None:
    if args.kd_model_name and args.kd_pretrained_path:
        raise ValueError(
            "--kd-model-name and --kd-pretrained-path both name the teacher: give one (--kd-model-name '' in the place"
            " of a recipe's)")
    given = [name for name in ('distill_loss_weight', 'task_loss_weight') if getattr(args, name) is not None]
    if given and not (args.kd_model_name or args.kd_pretrained_path):
        raise ValueError(
            f'{option(given[0])} weighs the answers of a teacher: name one with --kd-model-name or'
            ' --kd-pretrained-path')
    if given == ['task_loss_weight'] and args.task_loss_weight > 1:
        raise ValueError(
            f'--task-loss-weight must be at most 1 without --distill-loss-weight, got {args.task_loss_weight}')
