"""A study: its database, what holds for all its trials, and what it has found, as files."""
from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import optuna
import yaml
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from .figures import has_matplotlib, save_figure
from .files import write_csv, write_text
from .names import option
from .options import HOST_ARGS, SPEED_ARGS, build_parser, saved_args
from .public_args import public_args
from .search_space import SearchSpace, ValidSampler, trial_args

__all__ = [
    'check_same_study', 'draw_plots', 'finished_trials', 'give_out_again', 'may_be_pruned', 'open_study',
    'write_best', 'write_trials']

_logger = logging.getLogger(__name__)

# What each worker of a study may have of its own; the schedule is searched.
_OF_A_WORKER = HOST_ARGS | SPEED_ARGS | {'recipe', 'sched'}

# Where a run lies, how it is watched and what it may look at: no part of what is found.
_NOT_IN_RECIPE = HOST_ARGS | {'recipe', 'output', 'experiment', 'data_dir', 'hold_out'}


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
        heartbeat_stale_trial_callback=give_out_again)
    return optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, direction='maximize', sampler=ValidSampler(space),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=_first_rung(epochs), reduction_factor=3))


def _first_rung(epochs: int) -> int:
    """Epochs after which a trial may first end, a ninth of all."""
    return max(1, epochs // 9)


def may_be_pruned(epoch: int, epochs: int) -> bool:
    """Whether a trial of `epochs` may be ended after `epoch`: later what is almost trained is trained, and counts."""
    return epoch < epochs and epoch <= 3 * _first_rung(epochs)


with warnings.catch_warnings():
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    give_out_again = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)


def _open_storage(url: str, **kwargs) -> RDBStorage:
    """Opens the database; workers that start together may each try to make its tables, and all but one fail."""
    import sqlalchemy.exc
    for _ in range(10):
        try:
            return RDBStorage(url, **kwargs)
        except ImportError as e:
            raise ValueError(f'--storage {_without_password(url)}: its driver is not installed ({e})') from e
        except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as e:
            raise ValueError(f'--storage {_without_password(url)}: {_first_line(e)}') from e
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as e:
            error = e
            time.sleep(0.5)
    raise ValueError(f'--storage {_without_password(url)}: {_first_line(error)}') from error


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


def finished_trials(study: optuna.Study) -> int:
    """Number of trials that are complete or were ended by the pruner."""
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
