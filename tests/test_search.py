"""The hyper-parameter search: what it may propose, what it cuts short, and workers that share a study, one killed."""
import csv
import functools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

optuna = pytest.importorskip('optuna', reason='the search needs Optuna')
pytest.importorskip('sklearn', reason='the trials train on its digits')

import training_runs  # noqa: E402
from optuna.storages import RetryHeartbeatStaleTrialCallback  # noqa: E402
from optuna.trial import FixedTrial, TrialState  # noqa: E402

from timm_dense2net import search, search_space  # noqa: E402
from timm_dense2net.checkpoint import load_weights  # noqa: E402
from timm_dense2net.dense2net import SplitHierarchyConv2d  # noqa: E402
from timm_dense2net.interrupt import Interrupted  # noqa: E402
from timm_dense2net.options import parse_args  # noqa: E402
from timm_dense2net.search import Worker, main  # noqa: E402
from timm_dense2net.search_space import SearchSpace, ValidSampler, trial_args  # noqa: E402
from timm_dense2net.study import (  # noqa: E402
    check_same_study, draw_plots, may_be_pruned, open_study, write_best, write_trials)

pytestmark = pytest.mark.filterwarnings('ignore::optuna.exceptions.ExperimentalWarning')

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# Thin nets on a handful of digits: what is tested is the search.
TRAIN_ARGS = (
    '--recipe', 'nano', '--hold-out', '1300', '--img-size', '8', '--no-amp', '-b', '8', '-vb', '325', '--device', 'cpu',
    '--growth-rates', '2', '4', '--scales', '2', '4', '--cardinalities', '1', '2', '4')


def command(output, *args):
    return [
        sys.executable, '-m', 'timm_dense2net', 'search', '--study', 'study', '--output', str(output), *TRAIN_ARGS,
        *args]


@pytest.fixture
def start():
    """Starts a worker by the command; those that are still there when the test ends are killed."""
    workers = []

    def start(output, *args):
        environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parents[1]))
        with open(output / f'worker-{len(workers)}.log', 'wb') as log:
            workers.append(subprocess.Popen(
                command(output, *args), env=environment, stdout=log, stderr=subprocess.STDOUT))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
        worker.wait(10)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError('it did not happen in time')


def base_args(*args):
    return parse_args(['--recipe', 'nano', '--hold-out', '1300', *args])


def test_cardinalities_follow_the_layer():
    space = SearchSpace()
    assert space.valid_cardinalities(32, 8) == [1, 2, 4, 8, 16]  # 16 channels cannot be in 32 groups
    assert space.valid_cardinalities(32, 4) == [1, 2, 4, 8, 16, 32]
    assert space.valid_cardinalities(12, 2) == [1, 2, 4, 8]
    with pytest.raises(ValueError, match='growth rate 12 with scale 8 can have none of the cardinalities 4, 32'):
        SearchSpace(scales=(8,), growth_rates=(12,), cardinalities=(4, 32))


def test_only_valid_combinations_are_proposed():
    """Even when the wide groups are the ones that are rewarded, past the sampler's random start."""
    space = SearchSpace()
    study = optuna.create_study(direction='maximize', sampler=ValidSampler(space, seed=0))
    for _ in range(60):
        trial = study.ask()
        kwargs = space.suggest(trial)['model_kwargs']
        SplitHierarchyConv2d(4 * kwargs['growth_rate'], kwargs['scale'], kwargs['cardinality'], device='meta')
        study.tell(trial, kwargs['cardinality'] + kwargs['scale'])
    assert {t.params['cardinality'] for t in study.trials} == {1, 2, 4, 8, 16, 32}
    assert len({str(t.distributions['cardinality']) for t in study.trials}) == 1
    best = [t.params['cardinality'] for t in study.trials[30:]]
    assert sum(c >= 16 for c in best) > 15  # it learns all the same


def suggested(**params):
    defaults = dict(growth_rate=32, scale=4, cardinality=1, opt='sgd', lr=0.1, sched='cosine')
    return SearchSpace().suggest(FixedTrial(dict(defaults, **params)))


def epoch_rates(args):
    optimizer = torch.optim.SGD([torch.zeros(1)], args.lr)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    rates = []
    for epoch in range(args.epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        for update in range(10):
            scheduler.step_update(10 * epoch + update + 1)
        scheduler.step(epoch + 1)
    return rates


def test_trial_arguments():
    base = base_args('--epochs', '9', '--model-kwargs', 'bn_size=2')
    args = trial_args(base, suggested(sched='step', decay_rate=0.2, cardinality=8))
    assert (args.opt, args.lr, args.sched, args.decay_rate, args.decay_epochs) == ('sgd', 0.1, 'step', 0.2, 3)
    assert args.model_kwargs == dict(bn_size=2, growth_rate=32, scale=4, cardinality=8)
    args = trial_args(base, suggested(sched='plateau', decay_rate=0.5))
    assert args.sched == 'plateau' and args.warmup_epochs == 0 and not args.sched_on_updates
    values = dict(sched='multistep', decay_rate=0.1, growth_rate=32, scale=4, cardinality=1, opt='sgd', lr=0.1)
    for more in (['--sched-on-updates'], ['--no-sched-on-updates']):
        other = base_args('--epochs', '9', '--warmup-epochs', '0', *more)
        args = trial_args(other, SearchSpace(scheds=('multistep',)).suggest(FixedTrial(values)))
        # The rates of the epochs, as timm's schedules make them.
        assert epoch_rates(args) == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 3)
        other = base_args('--epochs', '8', '--warmup-epochs', '0', *more)
        args = trial_args(other, suggested(sched='step', decay_rate=0.1))
        assert epoch_rates(args) == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 2)
        other = base_args('--epochs', '2', '--warmup-epochs', '0', *more)
        args = trial_args(other, SearchSpace(scheds=('multistep',)).suggest(FixedTrial(values)))
        assert len(args.decay_milestones) == 1
    args = trial_args(base, suggested(opt='adamw', lr_adaptive=0.002))
    assert (args.opt, args.lr) == ('adamw', 0.002)
    assert base.model_kwargs == dict(bn_size=2) and base.sched == 'cosine'


def test_successive_halving(tmp_path):
    """Of nine epochs, the worse two thirds see one, and the worse of the rest three."""
    study = open_study('study', f'sqlite:///{tmp_path}/study.db', SearchSpace(), epochs=9)
    epochs = []
    for quality in range(9, 0, -1):
        trial = study.ask()
        for epoch in range(1, 10):
            trial.report(quality + epoch / 100, epoch)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, quality)
        epochs.append(epoch)
    assert epochs[0] == 9  # the best one
    assert all(e == 1 for e in epochs[3:]) and set(epochs) <= {1, 3, 9}


@pytest.mark.parametrize('epochs, last', [(1, 0), (2, 1), (3, 2), (9, 3), (30, 9), (100, 33)])
def test_what_is_almost_trained_is_not_ended(epochs, last):
    assert [epoch for epoch in range(1, epochs + 1) if may_be_pruned(epoch, epochs)] == list(range(1, last + 1))


@pytest.mark.parametrize('epochs, state', [(1, 'complete'), (2, 'pruned')])
def test_a_trial_ends_where_the_pruner_says_so(epochs, state, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.trial.Trial, 'should_prune', lambda self: True)
    argv = ['--study', 'study', '--output', str(tmp_path), *TRAIN_ARGS, '--warmup-epochs', '0']
    argv += ['--epochs', str(epochs), '--trials', '1']
    assert main(argv) == 0
    row = next(csv.DictReader((tmp_path / 'study' / 'trials.csv').open()))
    assert (row['state'], row['epochs']) == (state, '1')


@pytest.mark.parametrize('opt, adaptive', [('nesterov', False), ('sgdw', False), ('lamb', True)])
def test_rates_of_other_optimizers(opt, adaptive):
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    SearchSpace(opts=(opt,)).suggest(trial)
    assert ('lr_adaptive' in trial.params) == adaptive and ('lr' in trial.params) != adaptive


def test_reports_and_recipe(tmp_path):
    space, base = SearchSpace(), base_args('--epochs', '3', '--output', str(tmp_path))
    study = optuna.create_study(direction='maximize', study_name='study', sampler=ValidSampler(space, seed=1))
    assert write_best(study, base, space, tmp_path) is None
    for i in range(12):
        trial = study.ask()
        values = space.suggest(trial)
        trial.report(50., 1)
        study.tell(trial, 50. + values['model_kwargs']['scale'] + i / 100)
    path = write_best(study, base, space, tmp_path)
    assert path.read_text().startswith(f'# Trial {study.best_trial.number} of study study: top-1 58.')
    args = parse_args(['--recipe', str(path)])
    expected = trial_args(base, space.suggest(FixedTrial(study.best_params)))
    for key in ('model', 'model_kwargs', 'opt', 'lr', 'sched', 'decay_rate', 'epochs', 'dataset', 'batch_size'):
        assert getattr(args, key) == getattr(expected, key), key
    assert args.hold_out == 0 and args.output != str(tmp_path)
    write_trials(study, tmp_path)
    rows = list(csv.DictReader((tmp_path / 'trials.csv').open()))
    assert len(rows) == 12 and rows[3]['state'] == 'complete' and rows[3]['epochs'] == '1'
    assert float(rows[3]['top1']) == study.trials[3].value
    pytest.importorskip('matplotlib', reason='the plots need it')
    draw_plots(study, tmp_path)
    for name in ('history', 'importance'):
        assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('args, message', [
    (['--study', 's', '--recipe', 'nano'], 'give --hold-out N'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--experiment', 'x'], '--experiment is not for a search'),
    (['--study', 's', '--hold-out', '9', '--res2net-scale', '4'], '--res2net-scale is not for a search: it is over'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--log-wandb'], '--log-wandb'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--scheds', 'cosine', 'none', '--layer-decay', '0.9'],
     '--sched constant'),
    (['--study', 's', '--recipe', 'nono', '--hold-out', '9'], 'no recipe'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--opt=adamw'],
     '--opt is searched: leave it out, or give --opts'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--model-kwargs', 'bn_size=2', 'scale=4'],
     'scale is searched'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--model-kwargs', 'bn_size=4.5'],
     'bn_size must be a whole number of at least 1, got 4.5'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--trials', '-1'], '--trials must be at least 0'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--storage', 'nosql://me:secret@host/db'],
     'nosql://...@host/db'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--scales', '3'], 'none of the cardinalities'),
    (['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--model', 'resnet18'], 'resnet18 is no Dense2Net'),
])
def test_errors(args, message, tmp_path, capsys):
    # Only of a database it is known no sooner than when it is opened.
    assert main([*args, '--output', str(tmp_path)]) == (1 if '--storage' in args else 2)
    assert '--storage' in args or not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and 'secret' not in error


def test_a_study_goes_on_with_what_it_was_begun_with(tmp_path):
    url = f'sqlite:///{tmp_path / "study.db"}'
    study = open_study('study', url, SearchSpace(), 8)
    check_same_study(study, base_args(), SearchSpace())
    again = open_study('study', url, SearchSpace(), 8)
    check_same_study(again, base_args('--workers', '1', '--device', 'cpu', '--output', str(tmp_path)), SearchSpace())
    for args, space, message in (
            (base_args('--epochs', '9'), SearchSpace(), '--epochs 8, it cannot go on with 9'),
            (base_args('--hold-out', '100'), SearchSpace(), '--hold-out 1300, it cannot go on with 100'),
            (base_args(), SearchSpace(scales=(2, 4)), r'--scales \[2, 4, 8\], it cannot go on with \[2, 4\]')):
        with pytest.raises(ValueError, match=f'study study was begun with {message}'):
            check_same_study(again, args, space)


def test_a_mistake_begins_no_study(tmp_path, capsys):
    argv = ['--study', 's', '--recipe', 'nano', '--hold-out', '1437', '--output', str(tmp_path)]
    assert main(argv) == 1
    assert '1437 images cannot be held out of 1437' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_study_in_a_folder_of_any_name(tmp_path, monkeypatch):
    folder = tmp_path / 'a?b=c d'
    # A bar that shows nothing (TQDM_DISABLE) counts nothing either.
    monkeypatch.setattr(search, 'tqdm', functools.partial(search.tqdm, disable=True))
    argv = ['--study', 's', '--output', str(folder), *TRAIN_ARGS, '--trials', '1', '--epochs', '2']
    assert main(argv) == 0
    assert (folder / 's' / 'study.db').is_file() and (folder / 's' / 'trials.csv').is_file()


def test_results_of_no_study(tmp_path, capsys):
    argv = ['--study', 's', '--recipe', 'nano', '--hold-out', '9', '--trials', '0', '--output', str(tmp_path)]
    assert main(argv) == 1
    assert f'there is no study s in {tmp_path}' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_trial_that_diverges_ends_there(tmp_path, monkeypatch):
    monkeypatch.setattr(search_space, '_LR_RANGES', {'lr': (1e19, 1e20)})
    argv = ['--study', 'study', '--output', str(tmp_path), *TRAIN_ARGS, '--opts', 'sgd', '--scheds', 'cosine']
    assert main([*argv, '--epochs', '2', '--trials', '1']) == 0
    trials = tmp_path / 'study' / 'trials.csv'
    row = next(csv.DictReader(trials.open()))
    assert row['state'] == 'pruned' and ('the loss is' in row['error'] or 'not finite' in row['error']), row
    trials.unlink()
    assert main([*argv, '--epochs', '2', '--trials', '0']) == 0  # writes what there is, and trains nothing
    assert len(list(csv.DictReader(trials.open()))) == 1


class SilentWorker(Worker):
    """Its first trial is taken from it while it trains."""

    def _train(self, trial, args):
        if trial.number == 0:
            storage = self.study._storage
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            storage.get_heartbeat_stale_trial_callback()(self.study, storage.get_trial(trial._trial_id))
            if self.reports:
                trial.report(1., 1)
        return 50.


@pytest.mark.parametrize('reports', [False, True])
def test_worker_that_was_taken_for_dead(tmp_path, reports):
    space, base = SearchSpace(), base_args('--output', str(tmp_path))
    study = open_study('study', f'sqlite:///{tmp_path}/study.db', space, epochs=3)
    worker = SilentWorker(study, base, space, tmp_path, None, None)
    worker.reports = reports
    worker.run(1)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[1].params == study.trials[0].params


class LateSignal(Worker):
    """A signal comes when its first trial has looked for one for the last time."""

    def _train(self, trial, args):
        os.kill(os.getpid(), signal.SIGTERM)
        return 50.


def test_signal_at_a_trials_end_is_heeded(tmp_path):
    space, base = SearchSpace(), base_args('--output', str(tmp_path))
    study = open_study('study', f'sqlite:///{tmp_path}/study.db', space, epochs=3)
    with pytest.raises(Interrupted):
        LateSignal(study, base, space, tmp_path, None, None).run(9)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE]


def test_stop_and_go_on(tmp_path, start):
    """A stopped worker's trial is given out again and goes on at the batch where it was stopped."""
    args = ('--trials', '1', '--epochs', '12')
    summary = tmp_path / 'study' / 'trial-00000' / 'summary.csv'
    worker = start(tmp_path, *args)
    wait_for(lambda: summary.exists() and len(summary.read_text().splitlines()) > 2)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(300) == 128 + signal.SIGTERM
    assert (summary.parent / 'checkpoint.pth.tar').exists()
    rows = summary.read_text().splitlines()
    study = optuna.load_study(study_name='study', storage=f'sqlite:///{tmp_path}/study/study.db')
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert study.trials[0].params == study.trials[1].params
    assert start(tmp_path, *args).wait(300) == 0
    again = summary.read_text().splitlines()
    assert again[:len(rows)] == rows and [row.split(',')[0] for row in again[1:]] == [str(i) for i in range(12)]
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    with open(summary, newline='') as f:
        tops = [float(row['eval_top1']) for row in csv.DictReader(f)]
    assert study.trials[1].intermediate_values == pytest.approx(dict(enumerate(tops, start=1)))
    assert study.trials[1].value == pytest.approx(max(tops))
    assert [p.name for p in (tmp_path / 'study').glob('trial-*')] == ['trial-00000']
    assert not list(summary.parent.glob('checkpoint*'))
    for name in ('best.yaml', 'trials.csv'):
        assert (tmp_path / 'study' / name).exists()


@pytest.fixture
def postgresql():
    """URL of a PostgreSQL server of our own, on a free port."""
    programs = sorted(Path('/usr/lib/postgresql').glob('*/bin'))
    path = os.pathsep.join([os.environ['PATH'], *map(str, programs[-1:])])
    if not shutil.which('initdb', path=path):
        pytest.skip('PostgreSQL is not installed')
    pytest.importorskip('psycopg', reason='the PostgreSQL driver psycopg is not installed')
    user = None
    if os.geteuid() == 0:  # the server refuses to run as root
        user = next((u.pw_name for u in pwd.getpwall() if u.pw_name in ('postgres', 'nobody')), None)
        if user is None:
            pytest.skip('PostgreSQL does not run as root, and there is no other user')
    folder = Path(tempfile.mkdtemp(prefix='postgresql-'))
    try:
        if user:
            shutil.chown(folder, user)
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        run = dict(user=user, cwd=folder, env=dict(os.environ, PATH=path, LC_ALL='C'), check=True, capture_output=True)
        initdb = shutil.which('initdb', path=path)
        subprocess.run([initdb, '-D', 'data', '-U', 'search', '-E', 'UTF8', '--auth=trust', '--no-sync'], **run)
        control = [shutil.which('pg_ctl', path=path), '-D', 'data', '-w']
        options = f'-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off'
        subprocess.run([*control, '-l', 'log', '-o', options, 'start'], **dict(
            run, capture_output=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        try:
            yield f'postgresql+psycopg://search@127.0.0.1:{port}/postgres'
        finally:
            subprocess.run([*control, '-m', 'immediate', 'stop'], **run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def numbers_taken_over(trial):
    """Numbers of the trials, by workers that fell silent, which this one does again."""
    return RetryHeartbeatStaleTrialCallback.retry_history(trial)


@pytest.mark.parametrize('database', ['sqlite', 'postgresql'])
def test_several_workers_one_of_them_killed(database, tmp_path, request):
    """Nothing here depends on how fast the machine is, nor on a live worker not being taken for dead."""
    url = f'sqlite:///{tmp_path}/study.db'
    if database == 'postgresql':
        url = request.getfixturevalue('postgresql')
    args = ['--study', 'study', '--output', str(tmp_path), *TRAIN_ARGS, '--storage', url, '--heartbeat', '2']
    args += ['--epochs', '3', '--model-kwargs', 'block_config=(1,1)']
    workers = []

    def start_worker():
        workers.append(training_runs.start(
            [*args, '--trials', '1000'], tmp_path / f'worker-{len(workers)}.log', main=main))

    def trials_of(worker):
        name = f'{socket.gethostname()}:{worker.pid}'
        return [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get('worker') == name]

    try:
        for _ in range(3):  # together, on a database without tables
            start_worker()
        wait_for(lambda: list((tmp_path / 'study').glob('trial-*')))
        study = optuna.load_study(study_name='study', storage=url)
        wait_for(lambda: all(map(trials_of, workers)))
        victim = None
        while victim is None:
            killed = workers.pop(0)
            training_runs.kill(killed)
            # Seldom it was between two trials.
            victim = next((t for t in trials_of(killed) if t.state == TrialState.RUNNING), None)
            if victim is None:
                start_worker()
                wait_for(lambda: all(map(trials_of, workers)))
        again = wait_for(lambda: next((
            t for t in study.get_trials(deepcopy=False)
            if t.state in FINISHED and victim.number in numbers_taken_over(t)), None))
        assert any(again in trials_of(worker) for worker in workers)
        assert again.params.items() >= victim.params.items()
        assert study.get_trials()[victim.number].state == TrialState.FAIL
        for worker in workers:  # whatever they are at, in a trial or between two
            worker.terminate()
        for worker in workers:
            assert training_runs.finish(worker) == 128 + signal.SIGTERM
    finally:
        for worker in workers:
            worker.kill()

    # One worker goes on with what the others left, to the number of trials it is asked for.
    target = len(study.get_trials(states=FINISHED)) + 2
    assert main([*args, '--trials', str(target)]) == 0
    trials = study.get_trials()
    assert sum(t.state in FINISHED for t in trials) == target
    space = SearchSpace(scales=(2, 4), cardinalities=(1, 2, 4), growth_rates=(2, 4))
    for t in trials:
        if 'cardinality' in t.params:
            assert t.params['cardinality'] in space.valid_cardinalities(t.params['growth_rate'], t.params['scale'])
    rows = list(csv.DictReader((tmp_path / 'study' / 'trials.csv').open()))
    assert [int(row['number']) for row in rows] == list(range(len(trials)))
    recipe = str(tmp_path / 'study' / 'best.yaml')
    assert training_runs.run_here(['--recipe', recipe, '--output', tmp_path, '--experiment', 'best']) == 0
    weights = load_weights(tmp_path / 'best' / 'last.safetensors')[0]
    best = study.best_params
    assert weights['features.conv0.weight'].shape[0] == 2 * best['growth_rate']
    assert weights['features.denseblock1.denselayer1.conv2.convs.0.weight'].shape[0] == (
        4 * best['growth_rate'] // best['scale'])
