"""Searches scale, cardinality, growth rate, learning rate and its decay, and optimizer, on Optuna.

    python -m timm_dense2net search --study wide --trials 100 --recipe quick --hold-out 5000
    python -m timm_dense2net search --study wide --trials 100 --storage postgresql+psycopg://USER@HOST/DB ...

Every start of the command is one worker; as many as one likes, on one machine (SQLite, the default) or on several (a
PostgreSQL or MySQL URL), share a study. A study goes on where it was left. Arguments that are not named here are those
of train_cifar.py and hold for every trial.
"""
from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import get_arch_name, list_models
from timm.optim import list_optimizers
from timm.utils import setup_default_logging
from tqdm import tqdm

from .build import RunData, build_data, build_distillation, build_trainer
from .dense2net import SplitHierarchyConv2d
from .distillation import Distillation
from .distributed import Processes, find_device
from .errors import one_line
from .figures import has_matplotlib, save_figure
from .files import write_csv, write_text
from .names import option
from .option_checks import check_args
from .options import HOST_ARGS, SCHEDULES, SPEED_ARGS, build_parser, parse_args, saved_args
from .public_args import public_args
from .runs import RunFolder, read_resumed_state
from .trainer import Interrupted, StopSignal, Trainer, TrainingError

try:
    import optuna
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as e:
    raise ImportError("the search needs Optuna: pip install -e '.[search]'") from e

__all__ = [
    'SearchSpace', 'ValidSampler', 'Worker', 'open_study', 'check_same_study', 'trial_args', 'write_best',
    'write_trials', 'draw_plots', 'search', 'main',
]

_logger = logging.getLogger(__name__)

# What each worker of a study may have of its own; the schedule is searched.
_OF_A_WORKER = HOST_ARGS | SPEED_ARGS | {'recipe', 'sched'}

# Where a run lies, how it is watched and what it may look at: no part of what is found.
_NOT_IN_RECIPE = HOST_ARGS | {'recipe', 'output', 'experiment', 'data_dir', 'hold_out'}

_NOT_FOR_A_SEARCH = {
    'resume': 'the same command goes on with its study',
    'experiment': 'the trials have names of their own',
    'eval_only': 'it trains',
    'log_wandb': 'it logs one run a process, and a search makes many (see its trials.csv)',
    'res2net_scale': 'it is over Dense2Nets as they are created, their scale by --scales',
}

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


def open_study(name: str, url: str, space: SearchSpace, epochs: int, heartbeat: int = 60) -> optuna.Study:
    """Opens a study, or makes it where there is none.

    A trial whose worker gives no sign of life for three heartbeats is given out again.

    Args:
        name: Its name.
        url: SQLAlchemy URL of the database.
        space: What is searched.
        epochs: Epochs of a whole trial; the worse two thirds end after a ninth of them, and after a third.
        heartbeat: Seconds between signs of life.

    Raises:
        ValueError: If the database cannot be reached.
    """
    engine_kwargs = {'connect_args': {'timeout': 120}} if url.startswith('sqlite') else {'pool_pre_ping': True}
    storage = _open_storage(
        url, engine_kwargs=engine_kwargs, heartbeat_interval=heartbeat, grace_period=3 * heartbeat,
        heartbeat_stale_trial_callback=_give_out_again)
    return optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, direction='maximize', sampler=ValidSampler(space),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=_first_rung(epochs), reduction_factor=3))


def _first_rung(epochs: int) -> int:
    """Epochs after which a trial may first end, a ninth of all."""
    return max(1, epochs // 9)


with warnings.catch_warnings():
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    _give_out_again = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)


def _open_storage(url: str, **kwargs) -> RDBStorage:
    """Opens the database; workers that start together may each try to make its tables, and all but one fail."""
    import sqlalchemy.exc
    for tries_left in reversed(range(10)):
        try:
            return RDBStorage(url, **kwargs)
        except ImportError as e:
            raise ValueError(f'--storage {_without_password(url)}: its driver is not installed ({e})') from e
        except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as e:
            raise ValueError(f'--storage {_without_password(url)}: {_first_line(e)}') from e
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as e:
            if not tries_left:
                raise ValueError(f'--storage {_without_password(url)}: {_first_line(e)}') from e
            time.sleep(0.5)
    raise AssertionError


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition('@')
    return f'{head.partition("://")[0]}://...@{tail}' if at else url


def _first_line(error: Exception) -> str:
    return str(error).strip().split('\n')[0][:300]


def check_same_study(study: optuna.Study, args: argparse.Namespace, space: SearchSpace) -> None:
    """Records in a new study what holds for all its trials, and compares it in one that goes on.

    What only tells how or where a machine does its work may be another for each worker.

    Raises:
        ValueError: If the study was begun with other arguments, naming the first that differs.
    """
    holds = {
        name: value for name, value in public_args(saved_args(args), args.model).items()
        if name not in _OF_A_WORKER}
    holds = json.loads(json.dumps(holds | vars(space)))  # as the study gives it back
    before = study.user_attrs.get('arguments')
    if before is None:
        study.set_user_attr('arguments', holds)
        return
    for name, value in holds.items():
        if before.get(name) != value:
            raise ValueError(
                f'study {study.study_name} was begun with {option(name)} {before.get(name)}, it cannot go'
                f' on with {value}: name another --study')


class _TrialTrainer(Trainer):
    """Reports each epoch to the study and ends where the pruner says so."""

    trial: Trial

    def _end_epoch(self) -> None:
        super()._end_epoch()
        self.trial.report(self.last['top1'], self.epoch)
        # Not later, as the pruner would: what is almost trained is trained and counts.
        if self.epoch < self.epochs and self.epoch <= 3 * _first_rung(self.epochs) and self.trial.should_prune():
            raise optuna.TrialPruned(f'after {self.epoch} epochs')


class Worker:
    """Takes trials of a study until enough of them are finished.

    Args:
        study: The study.
        args: Arguments that hold for all trials.
        space: What is searched.
        folder: The study's folder; each trial has a run folder in it.
        data: The images.
        processes: This process.
        distillation: The teacher of all trials.
    """

    def __init__(
            self,
            study: optuna.Study,
            args: argparse.Namespace,
            space: SearchSpace,
            folder: Path,
            data: RunData,
            processes: Processes,
            distillation: Distillation | None = None,
    ):
        self.study, self.args, self.space, self.folder = study, args, space, folder
        self.data, self.processes, self.distillation = data, processes, distillation
        self._number = -1  # of the trial at hand
        self._stop = StopSignal()

    def run(self, target: int) -> None:
        """Works until `target` trials of the study are finished, by whichever worker.

        Raises:
            Interrupted: After SIGTERM or SIGINT; a trial at hand is given out again.
            TrainingError: If a file cannot be written.
        """
        finished = min(_finished(self.study), target)
        with self._stop, tqdm(total=target, initial=finished, desc='trials', unit='trial') as bar:
            while bar.n < target:
                try:
                    self.study.optimize(self._objective, n_trials=1)
                except (optuna.exceptions.UpdateFinishedTrialError, ValueError, AssertionError):
                    # Any of these comes of a trial that others have ended: it depends on how far this worker is.
                    if not self._given_out_again():
                        raise
                    _logger.warning('This worker was silent for too long: another has its trial now.')
                except Interrupted:
                    _give_out_again(self.study, self.study.get_trials(deepcopy=False)[self._number])
                    raise
                write_best(self.study, self.args, self.space, self.folder)
                bar.update(min(_finished(self.study), target) - bar.n)
                if self._stop.signum:  # it came too late for the trial to heed it
                    raise Interrupted(self._stop.signum)

    def _given_out_again(self) -> bool:
        trials = self.study.get_trials(deepcopy=False)
        return any(self._number in RetryHeartbeatStaleTrialCallback.retry_history(trial) for trial in trials)

    def _objective(self, trial: Trial) -> float:
        self._number = trial.number
        trial.set_user_attr('worker', f'{socket.gethostname()}:{os.getpid()}')
        args = trial_args(self.args, self.space.suggest(trial))
        # A trial that is given out again goes on from the state its first worker left, where this machine has it.
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        original = RetryHeartbeatStaleTrialCallback.retried_trial_number(frozen)
        args.output, args.experiment = str(self.folder), f'trial-{trial.number if original is None else original:05d}'
        args.resume = None if original is None else 'auto'
        _logger.info(f'Trial {trial.number}: {_describe(trial.params)}')
        try:
            top1 = self._train(trial, args)
        except optuna.TrialPruned:
            _drop_states(Path(args.output, args.experiment))
            raise
        _drop_states(Path(args.output, args.experiment))
        return top1

    def _train(self, trial: Trial, args: argparse.Namespace) -> float:
        """Best top-1 accuracy on the held-out images, in percent."""
        state = read_resumed_state(args, self.processes)
        try:
            trainer = build_trainer(args, self.data, self.processes, state, _TrialTrainer, self.distillation)
            trainer.trial, trainer.stop = trial, self._stop
            with closing(RunFolder(args, start_epoch=trainer.epoch)) as folder:
                trainer.fit(folder)
        except (TrainingError, torch.OutOfMemoryError) as e:
            if isinstance(e.__cause__, OSError):
                raise
            trial.set_user_attr('error', one_line(e))
            raise optuna.TrialPruned(one_line(e)) from None
        return trainer.best['top1']


# Arguments of a run, and of its model, that the trials set; of a recipe they are replaced.
_SEARCHED = {
    '--opt': ', or give --opts', '--sched': ', or give --scheds', '--lr': '', '--decay-rate': '', '--decay-epochs': '',
    '--decay-milestones': '', 'scale': ', or give --scales', 'cardinality': ', or give --cardinalities',
    'growth_rate': ', or give --growth-rates'}


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
        args.decay_milestones = [max(1, args.epochs // 2) + first, max(1, 3 * args.epochs // 4) + first]
    check_args(args)
    return args


def _drop_states(folder: Path) -> None:
    for path in folder.glob('checkpoint*.safetensors'):
        path.unlink()


def _describe(params: Mapping[str, Any]) -> str:
    return ', '.join(f'{name} {value:.3g}' if isinstance(value, float) else f'{name} {value}'
                     for name, value in params.items())


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _best_trial(study: optuna.Study) -> FrozenTrial | None:
    return study.best_trial if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) else None


def write_best(study: optuna.Study, args: argparse.Namespace, space: SearchSpace, folder: Path) -> Path | None:
    """Writes the best trial's values, with what the study holds fixed, as the recipe `best.yaml`.

    Returns:
        Its path; None where no trial is complete.
    """
    trial = _best_trial(study)
    if trial is None:
        return None
    found = saved_args(trial_args(args, space.suggest(optuna.trial.FixedTrial(trial.params))))
    defaults = vars(build_parser().parse_args([]))
    recipe = {
        key: value for key, value in found.items() if key not in _NOT_IN_RECIPE and value != defaults.get(key)}
    path = folder / 'best.yaml'
    write_text(
        path,
        f'# Trial {trial.number} of study {study.study_name}: top-1 {trial.value:.2f} on {args.hold_out} held-out '
        f'training images.\n' + yaml.safe_dump(recipe, sort_keys=False))
    return path


def write_trials(study: optuna.Study, folder: Path) -> None:
    """Writes `trials.csv`: one row a trial."""
    trials = study.get_trials(deepcopy=False)
    names = sorted({name for trial in trials for name in trial.params})
    write_csv(
        folder / 'trials.csv', ['number', 'state', 'epochs', 'top1', *names, 'worker', 'error'],
        ([t.number, t.state.name.lower(), t.last_step or 0, '' if t.value is None else t.value,
          *(t.params.get(name, '') for name in names), t.user_attrs.get('worker', ''), t.user_attrs.get('error', '')]
         for t in trials))


def draw_plots(study: optuna.Study, folder: Path) -> None:
    """Draws `history.png` and `importance.png`, where matplotlib is there and the trials allow it."""
    if not has_matplotlib():
        return
    from matplotlib import rc_context
    from optuna.visualization import matplotlib as plots
    for name, plot in (('history', plots.plot_optimization_history), ('importance', plots.plot_param_importances)):
        with rc_context():  # Optuna sets a style for the whole process
            try:
                figure = plot(study).figure
            except (ValueError, RuntimeError) as e:
                _logger.warning(f'{name}.png is not drawn: {e}')
                continue
            figure.tight_layout()
            save_figure(figure, folder / f'{name}.png')


def _build_parser() -> argparse.ArgumentParser:
    space = SearchSpace()
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net search', allow_abbrev=False,
        description='Search hyper-parameters of Dense2Net on held-out training images.',
        epilog="All other arguments are train_cifar.py's and hold for every trial: --recipe, --hold-out, --epochs, ...")
    parser.add_argument('--study', required=True, metavar='NAME', help='name of the study, new or to go on with')
    parser.add_argument('--storage', metavar='URL', help='database of the study (SQLite in its folder)')
    parser.add_argument('--trials', type=int, default=100, metavar='N', help=(
        'finished trials that the study is to have, over all workers (%(default)s)'))
    parser.add_argument('--heartbeat', type=int, default=60, metavar='S', help=(
        'seconds between signs of life; after three without one a trial is given out again (%(default)s)'))
    for name, kind, choices in (
            ('scales', int, None), ('cardinalities', int, None), ('growth-rates', int, None),
            ('opts', str, list_optimizers()), ('scheds', str, SCHEDULES)):
        default = getattr(space, name.replace('-', '_'))
        parser.add_argument(
            f'--{name}', type=kind, nargs='+', default=default, choices=choices, metavar='VALUE',
            help=f'({" ".join(map(str, default))})')
    return parser


def search(args: argparse.Namespace, train_args: argparse.Namespace, space: SearchSpace) -> None:
    """Works on a study, then writes its tables, plots and best recipe."""
    folder = Path(train_args.output, args.study)
    if not args.trials and not args.storage and not (folder / 'study.db').exists():
        raise ValueError(f'--trials 0 writes what a study holds, and there is no study {args.study} in {folder.parent}')
    folder.mkdir(parents=True, exist_ok=True)
    url = args.storage or f'sqlite:///{folder / "study.db"}'
    study = open_study(args.study, url, space, train_args.epochs, args.heartbeat)
    check_same_study(study, train_args, space)
    # On its own, whatever started it: workers share the study and no trial.
    processes = Processes(find_device(train_args.device))
    data = build_data(train_args)
    teacher = build_distillation(train_args, data, processes.device)
    Worker(study, train_args, space, folder, data, processes, teacher).run(args.trials)
    path = write_best(study, train_args, space, folder)
    write_trials(study, folder)
    draw_plots(study, folder)
    if path is not None:
        best = study.best_trial
        print(f'best: trial {best.number}, top-1 {best.value:.2f} held out; {_describe(best.params)}')
        print(f'recipe: {path}')


def main(argv: list[str] | None = None) -> int:
    """Runs a worker; returns the exit code: 0, 1 (fault), 2 (bad arguments) or 128 + a signal's number."""
    setup_default_logging()
    warnings.filterwarnings('ignore', category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    args, rest = _build_parser().parse_known_args(argv)
    try:
        for word in rest:
            name = word.partition('=')[0]
            if name in _SEARCHED:
                raise ValueError(f'{name} is searched: leave it out{_SEARCHED[name]}')
        # The trials' schedules are the search's: the default one, plateau, does not go with a warm-up.
        train_args = parse_args([*rest, '--sched', next((s for s in args.scheds if s != 'plateau'), 'constant')])
        for sched in args.scheds:
            trial_args(train_args, dict(sched=sched))
        for name, why in _NOT_FOR_A_SEARCH.items():
            if getattr(train_args, name):
                raise ValueError(f'{option(name)} is not for a search: {why}')
        models = list_models(module='dense2net')
        if get_arch_name(train_args.model) not in models:
            raise ValueError(
                f'--model {train_args.model} is no Dense2Net: the search is over one of {", ".join(models)}')
        if not train_args.hold_out:
            raise ValueError('the search judges by held-out training images: give --hold-out N (5000 for CIFAR-100)')
        if args.trials < 0 or args.heartbeat < 1:
            raise ValueError(f'--trials must be at least 0 and --heartbeat 1, got {args.trials} and {args.heartbeat}')
        space = SearchSpace(
            args.scales, args.cardinalities, args.growth_rates, args.opts, args.scheds,
            bn_size=train_args.model_kwargs.get('bn_size', 4))
    except (ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    try:
        search(args, train_args, space)
    except Interrupted as e:
        print(f'{e}: a trial at hand is given out again, the same command goes on', file=sys.stderr)
        return 128 + e.signum
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, TrainingError, optuna.exceptions.OptunaError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    return 0
