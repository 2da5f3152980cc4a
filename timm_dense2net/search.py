"""Searches scale, cardinality, growth rate, learning rate and its decay, and optimizer, on Optuna.

    python -m timm_dense2net search --study wide --trials 100 --recipe quick --hold-out 5000
    python -m timm_dense2net search --study wide --trials 100 --storage postgresql+psycopg://USER@HOST/DB ...

Every start of the command is one worker; as many as one likes, on one machine (SQLite, the default) or on several (a
PostgreSQL or MySQL URL), share a study. A study goes on where it was left. Arguments that are not named here are those
of train_cifar.py and hold for every trial.
"""
from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from timm.models import get_arch_name, list_models
from timm.optim import list_optimizers
from timm.utils import setup_default_logging
from tqdm import tqdm

try:
    import optuna
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from optuna.trial import Trial
    from sqlalchemy import URL
except ImportError as e:
    raise ImportError("the search needs Optuna: pip install -e '.[search]'") from e

from .build import RunData, build_data, build_distillation, build_trainer
from .distillation import Distillation
from .distributed import Processes, find_device
from .errors import one_line
from .interrupt import Interrupted, StopSignal
from .names import option
from .options import SCHEDULES, parse_args
from .runs import RunFolder, read_resumed_state
from .search_space import SearchSpace, trial_args
from .study import (
    check_same_study, draw_plots, finished_trials, give_out_again, may_be_pruned, open_study, write_best, write_trials)
from .trainer import Trainer, TrainingError
from .training_state import CHECKPOINT_FILE, PREVIOUS_FILE

__all__ = ['Worker', 'search', 'main']

_logger = logging.getLogger(__name__)

# Arguments of a run, and of its model, that the trials set; of a recipe they are replaced.
_SEARCHED = {
    '--opt': ', or give --opts', '--sched': ', or give --scheds', '--lr': '', '--decay-rate': '', '--decay-epochs': '',
    '--decay-milestones': '', 'scale': ', or give --scales', 'cardinality': ', or give --cardinalities',
    'growth_rate': ', or give --growth-rates'}

_NOT_FOR_A_SEARCH = {
    'resume': 'the same command goes on with its study',
    'experiment': 'the trials have names of their own',
    'eval_only': 'it trains',
    'log_wandb': 'it logs one run a process, and a search makes many (see its trials.csv)',
    'res2net_scale': 'it is over Dense2Nets as they are created, their scale by --scales',
}


class _TrialTrainer(Trainer):
    """Reports each epoch to the study and ends where the pruner says so."""

    trial: Trial

    def _end_epoch(self) -> None:
        super()._end_epoch()
        self.trial.report(self.last['top1'], self.epoch)
        # The pruner would end it later, too.
        if may_be_pruned(self.epoch, self.epochs) and self.trial.should_prune():
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
        finished = finished_trials(self.study)
        with self._stop, tqdm(total=target, initial=min(finished, target), desc='trials', unit='trial') as bar:
            while finished < target:
                try:
                    self.study.optimize(self._objective, n_trials=1)
                except (optuna.exceptions.UpdateFinishedTrialError, ValueError, AssertionError):
                    # Any of these comes of a trial that others have ended: it depends on how far this worker is.
                    if not self._given_out_again():
                        raise
                    _logger.warning('This worker was silent for too long: another has its trial now.')
                except Interrupted:
                    give_out_again(self.study, self.study.get_trials(deepcopy=False)[self._number])
                    raise
                write_best(self.study, self.args, self.space, self.folder)
                before, finished = finished, finished_trials(self.study)
                bar.update(min(finished, target) - before)
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
            with closing(RunFolder(args, None if state is None else trainer.epoch)) as folder:
                trainer.fit(folder)
        except (TrainingError, torch.OutOfMemoryError) as e:
            if isinstance(e.__cause__, OSError):
                raise
            trial.set_user_attr('error', one_line(e))
            raise optuna.TrialPruned(one_line(e)) from None
        return trainer.best['top1']


def _drop_states(folder: Path) -> None:
    for name in (CHECKPOINT_FILE, PREVIOUS_FILE):
        (folder / name).unlink(missing_ok=True)


def _describe(params: Mapping[str, Any]) -> str:
    return ', '.join(f'{name} {value:.3g}' if isinstance(value, float) else f'{name} {value}'
                     for name, value in params.items())


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
    # On its own, whatever started it: workers share the study and no trial.
    processes = Processes(find_device(train_args.device))
    data = build_data(train_args)
    teacher = build_distillation(train_args, data, processes.device)
    # Made last, so that a mistake in the arguments leaves no study that holds it.
    folder.mkdir(parents=True, exist_ok=True)
    url = args.storage or URL.create('sqlite', database=str(folder / 'study.db')).render_as_string()
    study = open_study(args.study, url, space, train_args.epochs, args.heartbeat)
    check_same_study(study, train_args, space)
    Worker(study, train_args, space, folder, data, processes, teacher).run(args.trials)
    path = write_best(study, train_args, space, folder)
    write_trials(study, folder)
    draw_plots(study, folder)
    if path is not None:
        best = study.best_trial
        print(f'best: trial {best.number}, top-1 {best.value:.2f} held out; {_describe(best.params)}')
        print(f'recipe: {path}')


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace, SearchSpace]:
    """The command's own arguments, those of all trials, and what is searched.

    Raises:
        ValueError: If a value cannot be, naming it.
        OSError: If a recipe cannot be read.
    """
    args, rest = _build_parser().parse_known_args(argv)
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
    return args, train_args, space


def main(argv: list[str] | None = None) -> int:
    """Runs a worker; returns the exit code: 0, 1 (fault), 2 (bad arguments) or 128 + a signal's number."""
    setup_default_logging()
    warnings.filterwarnings('ignore', category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    try:
        args, train_args, space = _parse(argv)
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
