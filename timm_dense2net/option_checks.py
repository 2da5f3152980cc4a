"""What cannot work in the arguments of `train_cifar.py`, found before any work is done."""
from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable

import torch
from timm.optim import list_optimizers
from timm.utils.distributed import is_distributed_env

from .augment import AugmentConfig
from .names import did_you_mean, is_utf8, option
from .public_args import WEIGHT_KWARGS

__all__ = ['augment_config', 'check_args']

# Arguments of a model in training that are set otherwise, and by what.
_OWN_KWARGS = dict(
    num_classes='--num-classes', in_chans='the channels of the images', drop_rate='--drop',
    drop_path_rate='--drop-path', pretrained='--pretrained', checkpoint_path='--initial-checkpoint')

_AT_LEAST = dict(
    res2net_scale=2, epochs=1, batch_size=1, validation_batch_size=1, grad_accum_steps=1, log_interval=1,
    checkpoint_interval=0, hold_out=0, early_stop_patience=0, img_size=1, full_size_epoch=1, workers=0, freeze_stages=0,
    patience_epochs=0, cooldown_epochs=0, warmup_epochs=0, num_classes=1, lr=0, warmup_lr=0, min_lr=0, weight_decay=0,
    distill_loss_weight=0, task_loss_weight=0)
_ABOVE_0 = ('clip_grad', 'decay_rate', 'decay_epochs', 'opt_eps', 'kd_temperature', 'std')
_FROM_0_BELOW_1 = ('smoothing', 'momentum', 'model_ema_decay', 'drop', 'drop_path', 'opt_betas')


def check_args(args: argparse.Namespace) -> None:
    """Refuses what cannot work before any work is done.

    Raises:
        ValueError: Naming the value, or the two options that cannot go together.
    """
    if not is_utf8(args.dataset):  # the weights' metadata tell it
        raise ValueError(f'--dataset {args.dataset!r} is not UTF-8; rename it')
    _check_ranges(args)
    _check_augmentation(args)
    _check_optimizer_and_schedule(args)
    if (args.initial_img_size is None) != (args.full_size_epoch is None):
        raise ValueError('--initial-img-size and --full-size-epoch go together: give both or neither')
    if args.eval_only:
        _check_eval_only(args)
    elif args.checkpoint:
        raise ValueError('--checkpoint names weights to evaluate: add --eval-only, or train on --initial-checkpoint')
    _check_model_kwargs(args)
    _check_start(args)
    _check_distillation(args)
    _check_how_it_runs(args)
    for name, package in (('log_wandb', 'wandb'), ('log_tensorboard', 'tensorboard')):
        if getattr(args, name) and importlib.util.find_spec(package) is None:
            raise ValueError(f'{option(name)}: {package} is not installed')


def _check_optimizer_and_schedule(args: argparse.Namespace) -> None:
    # timm itself drops any other first word.
    if args.opt.lower().removeprefix('lookahead_') not in list_optimizers():
        raise ValueError(f"timm has no optimizer '{args.opt}'{did_you_mean(args.opt, list_optimizers())}")
    if args.sched == 'plateau' and (args.warmup_epochs or args.sched_on_updates):
        raise ValueError(
            '--sched plateau steps once an epoch and has no warm-up: leave out --warmup-epochs and --sched-on-updates')
    if args.sched == 'plateau' and args.decay_rate >= 1:
        raise ValueError(f'--decay-rate must be below 1 for --sched plateau, got {args.decay_rate}')
    if args.sched == 'rsqrt' and not args.warmup_epochs:
        raise ValueError('--sched rsqrt falls from the end of a warm-up on: give --warmup-epochs of at least 1')
    if args.sched == 'none' and args.layer_decay not in (None, 1):
        raise ValueError('--layer-decay is applied by the schedule: give --sched constant, not none')
    if args.warmup_epochs >= args.epochs and args.sched != 'none':
        raise ValueError(f'--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}')


def _check_how_it_runs(args: argparse.Namespace) -> None:
    """Compiler, CUDA graph and processes."""
    if args.torchcompile:
        backends = torch.compiler.list_backends(exclude_tags=())
        if args.torchcompile not in backends:
            raise ValueError(f"torch has no compiler backend '{args.torchcompile}', only {', '.join(backends)}")
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
    for name, least in _AT_LEAST.items():
        _require(args, name, f'at least {least}', lambda value: value >= least)
    for name in _ABOVE_0:
        _require(args, name, 'above 0', lambda value: value > 0)
    for name in _FROM_0_BELOW_1:
        _require(args, name, 'in [0, 1)', lambda value: 0 <= value < 1)
    _require(args, 'layer_decay', 'in (0, 1]', lambda value: 0 < value <= 1)
    _require(args, 'initial_img_size', 'a multiple of 4 above 0', lambda value: value > 0 and value % 4 == 0)
    _require(args, 'seed', 'in [0, 2^32)', lambda value: 0 <= value < 1 << 32)  # what NumPy takes
    if args.decay_milestones != sorted({max(epoch, 1) for epoch in args.decay_milestones}):
        raise ValueError(
            f'--decay-milestones must be epochs from 1 on, each above the one before, got {args.decay_milestones}')


def _require(args: argparse.Namespace, name: str, wanted: str, holds: Callable[[float], bool]) -> None:
    """Refuses a given value, or a list with one, that is not as wanted."""
    value = getattr(args, name)
    numbers = value if isinstance(value, list) else [value]
    if value is not None and not all(map(holds, numbers)):
        raise ValueError(f'{option(name)} must be {wanted}, got {value}')


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
    if args.pretrained_path and WEIGHT_KWARGS & args.model_kwargs.keys():
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
