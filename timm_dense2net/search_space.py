"""What a search of hyper-parameters may propose: the space, its sampler, and the arguments of a trial."""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import Trial

from .dense2net import SplitHierarchyConv2d
from .option_checks import check_args

__all__ = ['SearchSpace', 'ValidSampler', 'trial_args']

_SGD = ('momentum', 'nesterov', 'nesterovw')  # and those with sgd in their names
_LR_RANGES = {'lr': (0.01, 0.5), 'lr_adaptive': (1e-4, 1e-2)}


class SearchSpace:
    """What is searched.

    Args:
        scales: Numbers of splits of the hierarchy.
        cardinalities: Numbers of groups of its convolutions.
        growth_rates: New features of a layer.
        opts: Optimizers, by timm's name.
        scheds: Schedules that decay the learning rate.
        bn_size: Width of a layer's bottleneck in multiples of the growth rate.

    Raises:
        ValueError: If a growth rate and a scale can have none of the cardinalities, or ``bn_size`` is no whole number.
    """

    def __init__(
            self,
            scales: Sequence[int] = (2, 4, 8),
            cardinalities: Sequence[int] = (1, 2, 4, 8, 16, 32),
            growth_rates: Sequence[int] = (12, 16, 24, 32, 40, 48),
            opts: Sequence[str] = ('momentum', 'sgd', 'adamw'),
            scheds: Sequence[str] = ('plateau', 'step', 'cosine'),
            bn_size: int = 4,
    ):
        self.scales, self.cardinalities, self.growth_rates = tuple(scales), tuple(cardinalities), tuple(growth_rates)
        self.opts, self.scheds = tuple(opts), tuple(scheds)
        if not isinstance(bn_size, int) or bn_size < 1:
            raise ValueError(f'bn_size must be a whole number of at least 1, got {bn_size!r}')
        self.bn_size = bn_size
        for growth_rate in self.growth_rates:
            for scale in self.scales:
                if not self.valid_cardinalities(growth_rate, scale):
                    raise ValueError(
                        f'growth rate {growth_rate} with scale {scale} can have none of the cardinalities '
                        f'{", ".join(map(str, self.cardinalities))}')

    def valid_cardinalities(self, growth_rate: int, scale: int) -> list[int]:
        """The cardinalities that a layer of this growth rate and scale can have, as the layer itself judges."""
        return [c for c in self.cardinalities if _is_layer(self.bn_size * growth_rate, scale, c)]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """The values of a trial, by the names of train_cifar.py; those of the model are in `model_kwargs`."""
        model_kwargs = dict(
            growth_rate=trial.suggest_categorical('growth_rate', self.growth_rates),
            scale=trial.suggest_categorical('scale', self.scales),
            cardinality=trial.suggest_categorical('cardinality', self.cardinalities))
        opt = trial.suggest_categorical('opt', self.opts)
        lr = 'lr' if 'sgd' in opt or opt in _SGD else 'lr_adaptive'
        values = dict(
            opt=opt, lr=trial.suggest_float(lr, *_LR_RANGES[lr], log=True),
            sched=trial.suggest_categorical('sched', self.scheds))
        if values['sched'] in ('plateau', 'step', 'multistep'):
            values['decay_rate'] = trial.suggest_categorical('decay_rate', (0.1, 0.2, 0.5))
        return dict(values, model_kwargs=model_kwargs)


def _is_layer(channels: int, scale: int, groups: int) -> bool:
    try:
        SplitHierarchyConv2d(channels, scale, groups, device='meta')
    except ValueError:
        return False
    return True


class ValidSampler(optuna.samplers.TPESampler):
    """Tree-structured Parzen estimator that only ever proposes a cardinality its trial's layers can have.

    The distribution of the cardinality is the same in all trials, as the analysis of importance needs it.
    """

    def __init__(self, space: SearchSpace, seed: int | None = None):
        # One parameter after the other, so that the cardinality is drawn for a known growth rate and scale.
        super().__init__(multivariate=False, constant_liar=True, seed=seed)
        self._space = space

    def sample_independent(self, study, trial, param_name, param_distribution):
        if param_name != 'cardinality':
            return super().sample_independent(study, trial, param_name, param_distribution)
        valid = self._space.valid_cardinalities(trial.params['growth_rate'], trial.params['scale'])
        for _ in range(20):
            value = super().sample_independent(study, trial, param_name, param_distribution)
            if value in valid:
                return value
        # The estimator insists on what cannot be: any valid value is as good.
        return valid[trial.number % len(valid)]


def trial_args(base: argparse.Namespace, values: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments of a trial: the study's own with the trial's values in their place."""
    args = argparse.Namespace(**vars(base))
    for key, value in values.items():
        setattr(args, key, dict(base.model_kwargs, **value) if key == 'model_kwargs' else value)
    if args.sched == 'step':
        args.decay_epochs = args.epochs / 3
    elif args.sched == 'plateau':
        args.warmup_epochs, args.sched_on_updates = 0, False
    elif args.sched == 'multistep':
        # At half and three quarters, as in the DenseNet paper (https://arxiv.org/abs/1608.06993).
        # By epochs timm's milestone is the number of the first epoch that has the lower rate, counted from 1.
        first = 0 if args.sched_on_updates else 1
        args.decay_milestones = sorted({max(1, args.epochs // 2) + first, max(1, 3 * args.epochs // 4) + first})
    check_args(args)
    return args
