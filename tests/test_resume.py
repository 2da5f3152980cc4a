"""A run that is killed, stopped or finds its files damaged goes on to the same end, bit for bit."""
import json
import math
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from test_data import write_folder
from training_runs import (
    arguments, assert_same_run, drop_privileges, finish, kill, read_state, read_summary_rows, run_here, start, wait_for)

from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.distributed import Processes
from timm_dense2net.files import LEFTOVERS
from timm_dense2net.options import parse_args
from timm_dense2net.runs import RunFolder, read_resumed_state
from timm_dense2net.trainer import Trainer
from timm_dense2net.training_state import CHECKPOINT_FILE, PREVIOUS_FILE, save_state


@pytest.fixture(scope='module')
def timed_reference(tmp_path_factory):
    """A run that nothing interrupted, and the seconds it took."""
    output = tmp_path_factory.mktemp('reference')
    for name in ('warm-up', 'run'):  # the first of all processes waits for the fork server's imports
        begin = time.monotonic()
        assert finish(start(arguments(output, name=name), output / 'log')) == 0, (output / 'log').read_text()
    return output / 'run', time.monotonic() - begin


@pytest.fixture(scope='module')
def reference(timed_reference):
    return timed_reference[0]


def complete(output, *more):
    """Goes on with a run to its end."""
    process = start(arguments(output, '--resume', 'auto', *more), output / 'log')
    assert finish(process) == 0, (output / 'log').read_text()
    return output / 'run'


def test_killed_at_random_moments(tmp_path, timed_reference):
    """Any moment: while data is loaded, in a step, in evaluation, in a write."""
    reference, seconds = timed_reference
    draw, kills = random.Random(0), 0
    for _ in range(20):
        process = start(arguments(tmp_path, '--resume', 'auto'), tmp_path / 'log', _pause_in_fsync)
        process.join(seconds * draw.uniform(0.05, 0.33))  # no machine gets by with two kills
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        kill(process)
        kills += 1
    assert kills > 2
    assert_same_run(complete(tmp_path), reference)


def _pause_in_fsync():
    """Makes every synced write last, the file being there under its temporary name."""
    fsync = os.fsync

    def slow(descriptor):
        time.sleep(0.02)
        fsync(descriptor)
    os.fsync = slow


def _pause_in_replace():
    """Makes a pause before and after every rename of a checkpoint."""
    replace = os.replace

    def slow(source, target):
        pause = 0.02 if 'checkpoint' in str(source) else 0
        time.sleep(pause)
        replace(source, target)
        time.sleep(pause)
    os.replace = slow


@pytest.mark.parametrize('moment', ['writing', 'written', 'between_renames', 'renamed'])
def test_killed_while_a_checkpoint_is_written(tmp_path, reference, moment):
    path = tmp_path / 'run' / CHECKPOINT_FILE
    previous = path.with_name(PREVIOUS_FILE)

    def temporary():
        return any(path.parent.glob('.checkpoint' + LEFTOVERS[2:]))

    happened = {
        'writing': lambda: previous.exists() and temporary() and path.exists(),
        'written': lambda: previous.exists() and temporary() and path.exists(),
        'between_renames': lambda: previous.exists() and temporary() and not path.exists(),
        'renamed': lambda: previous.exists() and path.exists() and not temporary(),
    }[moment]
    prepare = _pause_in_fsync if moment == 'writing' else _pause_in_replace
    for _ in range(2):
        process = start(arguments(tmp_path, '--resume', 'auto'), tmp_path / 'log', prepare)
        assert wait_for(happened, process)
        kill(process)
        assert happened()
    assert_same_run(complete(tmp_path), reference)


def interrupted(output):
    """A run killed in mid-epoch, its last state and the one before it being whole."""
    process = start(arguments(output), output / 'log', _pause_in_fsync)
    previous, best = output / 'run' / PREVIOUS_FILE, output / 'run' / 'best.safetensors'
    assert wait_for(lambda: previous.exists() and best.exists(), process)
    kill(process)
    return output / 'run' / CHECKPOINT_FILE


def _cut(path):
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def _empty(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('damage', [_cut, _flip_a_bit, _empty, Path.unlink])
def test_damaged_checkpoint_falls_back_on_the_one_before(tmp_path, reference, damage):
    damage(interrupted(tmp_path))
    assert_same_run(complete(tmp_path), reference)
    if damage is not Path.unlink:
        assert 'using checkpoint-prev.pth.tar instead' in (tmp_path / 'log').read_text()


def test_best_weights_of_an_epoch_that_is_trained_anew_are_not_kept(tmp_path):
    """The state is that of before an epoch, the best weights are of this epoch, and it does worse the second time."""
    argv = arguments(tmp_path, '--epochs', '1', '--checkpoint-interval', '0', '--hold-out', '256')
    assert run_here(argv) == 0
    path = tmp_path / 'run'
    state = read_state(path)
    state['early_stop']['best']['top1'] = 99.
    save_state(path, state)
    weights, metadata = load_weights(path / 'best.safetensors')
    save_weights(path / 'best.safetensors', weights, metadata | dict(epoch='1', top1='99.9'))
    assert run_here(['--resume', path, '--epochs', '2']) == 0
    result, metadata = json.loads((path / 'result.json').read_text()), load_weights(path / 'best.safetensors')[1]
    assert metadata['top1'] == f'{result["best_top1"]:.4f}' and metadata['epoch'] == str(result['best_epoch'])


def test_a_signal_at_the_end_of_training_ends_the_run_before_its_test(tmp_path, monkeypatch):
    save_last = Trainer._save_weights

    def save_and_be_asked(trainer, is_best):
        save_last(trainer, is_best)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, '_save_weights', save_and_be_asked)
    assert run_here(arguments(tmp_path, '--epochs', '1')) == 128 + signal.SIGTERM
    assert not (tmp_path / 'run' / 'result.json').exists()
    assert run_here(['--resume', tmp_path / 'run']) == 0
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['epochs'] == 1


def test_no_whole_checkpoint_is_one_message(tmp_path, capsys):
    path = interrupted(tmp_path)
    _cut(path)
    _flip_a_bit(path.with_name(PREVIOUS_FILE))
    before = sorted(path.parent.iterdir())
    assert run_here(arguments(tmp_path, '--resume', 'auto')) == 1
    error = capsys.readouterr().err
    assert error.count('error:') == 1 and CHECKPOINT_FILE in error and PREVIOUS_FILE in error and 'SHA-256' in error
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends(tmp_path, reference, signum):
    process = start(arguments(tmp_path, '--checkpoint-interval', '0'), tmp_path / 'log', _pause_in_fsync)
    assert wait_for((tmp_path / 'run' / 'summary.csv').exists, process)
    os.kill(process.pid, signum)
    assert finish(process) == 128 + signum
    assert f'{signum.name}: the state is saved' in (tmp_path / 'log').read_text()
    state = read_state(tmp_path / 'run')
    assert state['position']['updates'] and not (tmp_path / 'run' / 'result.json').exists()
    assert_same_run(complete(tmp_path, '--checkpoint-interval', '0'), reference)


def test_loss_that_is_not_finite(tmp_path, capsys):
    """The step is named, and the last good state stays."""
    argv = arguments(tmp_path, '--lr', '1e20', '--log-interval', '1')
    assert run_here(argv) == 1
    error = capsys.readouterr().err
    assert 'the loss is' in error and 'epoch 1, step 2 of 5' in error and 'Traceback' not in error
    state = read_state(tmp_path / 'run')
    assert all(tensor.isfinite().all() for tensor in state['state_dict'].values())
    assert not list((tmp_path / 'run').glob(LEFTOVERS))


def test_weight_that_is_not_finite_is_not_saved(tmp_path, capsys):
    """The weights break one step before the loss shows it, just where a state would be saved."""
    argv = arguments(tmp_path, '--lr', '1e38', '--weight-decay', '1e6', '--checkpoint-interval', '1')
    assert run_here(argv) == 1
    assert 'is not finite' in capsys.readouterr().err
    assert all(tensor.isfinite().all() for tensor in read_state(tmp_path / 'run')['state_dict'].values())


def _break_a_weight():
    """A weight breaks in the last step of the second epoch of five batches, where no loss shows it any more."""
    after_update = Trainer._after_update

    def broken(self):
        after_update(self)
        if self.updates == 10:
            next(self.model.parameters()).data.view(-1)[0] = math.nan
    Trainer._after_update = broken


def test_weight_that_is_not_finite_at_an_epochs_end(tmp_path):
    argv = arguments(tmp_path, '--checkpoint-interval', '0', '--log-interval', '1')
    process = start(argv, tmp_path / 'log', _break_a_weight)
    assert finish(process) == 1
    log = (tmp_path / 'log').read_text()
    assert 'is not finite after epoch 2, step 5 of 5' in log and 'Traceback' not in log
    assert len(read_summary_rows(tmp_path / 'run')) == 1
    for name in ('last', 'best'):
        weights, metadata = load_weights(tmp_path / 'run' / f'{name}.safetensors')
        assert metadata['epoch'] == '0' and all(tensor.isfinite().all() for tensor in weights.values())


def _limit_files():
    """Writes beyond 100 kB fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_write_that_fails_loses_nothing(tmp_path, reference):
    before = interrupted(tmp_path).read_bytes()
    process = start(arguments(tmp_path, '--resume', 'auto'), tmp_path / 'log', _limit_files)
    assert finish(process) == 1
    log = (tmp_path / 'log').read_text()
    assert log.count('error:') == 1 and 'File too large' in log and '--resume' in log
    assert (tmp_path / 'run' / CHECKPOINT_FILE).read_bytes() == before
    assert_same_run(complete(tmp_path), reference)


def test_a_first_write_that_fails_names_nothing_to_go_on_from(tmp_path):
    process = start(arguments(tmp_path), tmp_path / 'log', _limit_files)
    assert finish(process) == 1
    log = (tmp_path / 'log').read_text()
    assert 'File too large; nothing is trained yet' in log and 'Traceback' not in log
    complete(tmp_path)


def test_read_only_folder_is_one_message(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        process = start(arguments(folder), tmp_path / 'log', drop_privileges)
        assert finish(process) == 1
        assert not os.listdir(folder)
    log = (tmp_path / 'log').read_text()
    assert log.count('error:') == 1 and 'Permission denied' in log and 'epoch' not in log


def test_resume_by_folder_keeps_the_arguments(tmp_path, reference):
    interrupted(tmp_path)
    # Rows of epochs that are trained again are replaced.
    with open(tmp_path / 'run' / 'summary.csv', 'a') as f:
        f.write('7,1,1,1,1,1,1,1,1\n')
    process = start(['--resume', str(tmp_path / 'run')], tmp_path / 'log')
    assert finish(process) == 0, (tmp_path / 'log').read_text()
    assert_same_run(tmp_path / 'run', reference)
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['drop'] == 0.2


def test_resume_may_last_longer_but_not_learn_otherwise(tmp_path, reference, capsys):
    path = interrupted(tmp_path)
    assert run_here(['--resume', path.parent, '--lr', '0.5']) == 2
    error = capsys.readouterr().err
    assert 'lr 0.05' in error and '0.5' in error
    weights = path.parent / 'last.safetensors'
    assert f'--initial-checkpoint {weights}' in error
    weights.unlink()  # as before the end of the first epoch
    assert run_here(['--resume', path.parent, '--lr', '0.5']) == 2
    assert '--initial-checkpoint' not in capsys.readouterr().err
    process = start(['--resume', str(path), '--epochs', '4'], tmp_path / 'log')  # the state itself may be named
    assert finish(process) == 0, (tmp_path / 'log').read_text()
    rows = read_summary_rows(path.parent)
    assert len(rows) == 4 and rows[:3] == read_summary_rows(reference)


def test_weights_of_a_later_epoch_are_not_tested_as_an_earlier_state(tmp_path, reference, capsys):
    path = tmp_path / 'run'
    shutil.copytree(reference, path)
    before = (path / 'result.json').read_bytes()
    assert run_here(['--resume', path / PREVIOUS_FILE, '--epochs', '2']) == 1
    assert 'weights of a later epoch than its state' in capsys.readouterr().err
    assert (path / 'result.json').read_bytes() == before


def test_images_held_out_of_data_that_grew_are_refused(tmp_path, capsys):
    """Others would be held out, of which the run has trained on some."""
    path = tmp_path / 'run'
    assert run_here(arguments(tmp_path, '--epochs', '1', '--hold-out', '256')) == 0
    state, before = read_state(path), (path / 'result.json').read_bytes()
    assert state['train_images'] == 1437 - 256
    save_state(path, state | dict(train_images=1179))
    capsys.readouterr()
    assert run_here(['--resume', path, '--epochs', '2']) == 1
    assert 'beside 1179 that it trained on, now 1181 are left' in capsys.readouterr().err
    assert (path / 'result.json').read_bytes() == before
    save_state(path, state)
    assert run_here(['--resume', path, '--epochs', '2']) == 0


def test_run_that_is_there_is_not_overwritten(tmp_path, reference, capsys):
    assert run_here(arguments(reference.parent)) == 1
    assert 'already holds a run' in capsys.readouterr().err
    shutil.copytree(reference, tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoint*'))
    assert run_here(arguments(tmp_path)) == 1
    assert f'{tmp_path / "run"} already holds a finished run' in capsys.readouterr().err


def test_a_run_that_another_process_writes_is_left_alone(tmp_path, reference, capsys):
    shutil.copytree(reference, tmp_path / 'run')
    with closing(RunFolder(parse_args(['--resume', str(tmp_path / 'run')]), start_epoch=3)):
        before = (tmp_path / 'run' / 'args.yaml').read_bytes()
        assert run_here(['--resume', tmp_path / 'run', '--epochs', '9']) == 1
        assert f'{tmp_path / "run"} is being written by another process' in capsys.readouterr().err
        assert (tmp_path / 'run' / 'args.yaml').read_bytes() == before
    assert run_here(['--resume', tmp_path / 'run']) == 0


def test_a_run_begun_meanwhile_is_not_overwritten(tmp_path, reference):
    args = parse_args(list(map(str, arguments(tmp_path))))
    read_resumed_state(args, Processes(torch.device('cpu')))
    shutil.copytree(reference, tmp_path / 'run')
    for args.resume in (None, 'auto'):
        with pytest.raises(ValueError, match='already holds a run'):
            RunFolder(args)


def test_a_folder_has_a_name_of_its_own(tmp_path):
    with closing(RunFolder(parse_args(['--recipe', 'nano', '--output', str(tmp_path)]))) as folder:
        assert folder.path.parent == tmp_path and folder.path.name.endswith('-dense2net40_k12_s4-nano')


def test_runs_started_together_have_a_folder_each(tmp_path):
    names = set()
    for seed in range(20):
        args = parse_args(['--dataset', 'digits', '--output', str(tmp_path), '--seed', str(seed)])
        read_resumed_state(args, Processes(torch.device('cpu')))
        names.add(args.experiment)
    assert len(names) == 20


def test_schedule_goes_on_by_epochs_where_the_batch_is_another(tmp_path):
    more = ['--sched', 'cosine', '--sched-on-updates', '--no-model-ema']
    assert finish(start(arguments(tmp_path, *more, '--epochs', '2'), tmp_path / 'log')) == 0
    assert finish(start(['--resume', str(tmp_path / 'run'), '--epochs', '4', '-b', '64'], tmp_path / 'log')) == 0
    rates = [float(row['lr']) for row in read_summary_rows(tmp_path / 'run')]
    assert rates[2:] == pytest.approx([0.025 * (1 + math.cos(0.75 * math.pi)), 0.], abs=1e-6)


def test_a_run_that_goes_on_has_no_result_until_it_ends(tmp_path):
    with closing(RunFolder(parse_args(['--recipe', 'nano', '--output', str(tmp_path)]))) as folder:
        result = folder.path / 'result.json'
        result.write_text('{}')
        folder.add_epoch(0, dict(loss=2., top1=10.), dict(loss=2., top1=10.), 0.1)
        assert not result.exists()


def test_state_of_other_data_is_refused(tmp_path, capsys):
    path = interrupted(tmp_path)
    assert read_state(path.parent)['position']['batches_done']
    assert run_here(['--resume', path.parent, '-b', '64']) == 1
    message = 'an epoch of 5 batches of 256 images, now an epoch has'
    assert f'{message} 22 batches of 64 images' in capsys.readouterr().err
    assert run_here(['--resume', path.parent, '-b', '255']) == 1
    assert f'{message} 5 batches of 255 images' in capsys.readouterr().err


def test_images_may_be_moved_and_other_classes_are_refused(tmp_path, capsys):
    images = tmp_path / 'images'
    write_folder(images, ('a', 'b', 'c'), size=(8, 8))
    assert run_here(arguments(tmp_path, '--dataset', images, '-b', '9', '--epochs', '1')) == 0
    moved = tmp_path / 'elsewhere' / 'images'
    moved.parent.mkdir()
    images.rename(moved)
    assert run_here(['--resume', tmp_path / 'run', '--epochs', '2', '--dataset', moved]) == 0
    for split in ('train', 'val'):
        (moved / split / 'c').rename(moved / split / 'd')
    assert run_here(['--resume', tmp_path / 'run', '--epochs', '3']) == 1
    assert "the run began on other classes: 'c' where the data have 'd'" in capsys.readouterr().err


@pytest.mark.parametrize('content', ['epoch;lr\n0;0.1\n', '\ufeffepoch,lr\n0,0.1\n', 'epoch,lr\n0,0.1\nnull,0\n'])
def test_a_summary_that_was_altered_is_named_before_training(tmp_path, capsys, content):
    assert run_here(arguments(tmp_path, '--epochs', '1')) == 0
    (tmp_path / 'run' / 'summary.csv').write_text(content, encoding='utf-8')
    state = (tmp_path / 'run' / CHECKPOINT_FILE).read_bytes()
    assert run_here(['--resume', tmp_path / 'run', '--epochs', '2']) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f'error: {tmp_path}') and "summary.csv: not as timm's update_summary writes it" in error
    assert (tmp_path / 'run' / CHECKPOINT_FILE).read_bytes() == state


@pytest.mark.parametrize('lose', [lambda path: _cut(path), Path.unlink])
def test_a_run_goes_on_where_the_best_weights_are_lost(tmp_path, lose):
    path = interrupted(tmp_path).parent
    lose(path / 'best.safetensors')
    assert run_here(['--resume', path]) == 0
    load_weights(path / 'best.safetensors')


def test_a_run_goes_on_in_its_folder(tmp_path, capsys):
    path = interrupted(tmp_path)
    for more in (['--output', tmp_path / 'elsewhere'], ['--experiment', 'other']):
        assert run_here(['--resume', path.parent, *more]) == 2
        error = capsys.readouterr().err
        assert 'goes on in its own folder' in error and str(more[1]) in error
    assert run_here(['--resume', path.parent, '--output', tmp_path, '--experiment', 'run', '--epochs', '1']) == 0
    assert run_here(['--resume', path.parent, '--output', tmp_path.parent, '--epochs', '1']) == 0


def test_an_optimizer_that_draws_resumes_exactly(tmp_path):
    more = ['--opt', 'adahessian', '--drop', '0', '--epochs', '2']  # timm's, which draws from a generator of its own
    assert run_here(arguments(tmp_path, *more, name='reference')) == 0
    assert run_here(arguments(tmp_path, *more, '--epochs', '1')) == 0
    assert run_here(arguments(tmp_path, *more, '--resume', 'auto')) == 0  # another number of threads rounds otherwise
    assert_same_run(tmp_path / 'run', tmp_path / 'reference')


@pytest.mark.parametrize('sched, amp_dtype', [('cosine', 'bfloat16'), ('none', 'float16')])
def test_other_schedules_and_half_precision_resume_exactly(tmp_path, sched, amp_dtype):
    more = [
        '--model', 'dense2net40_k12_s4', '--model-kwargs', 'block_config=[1, 1, 1]', '--sched', sched, '--amp',
        '--amp-dtype', amp_dtype, '--channels-last', '--epochs', '2']
    more += ['--sched-on-updates', '--warmup-epochs', '1'] if sched == 'cosine' else []
    assert finish(start(arguments(tmp_path, *more, name='reference'), tmp_path / 'log')) == 0
    process = start(arguments(tmp_path, *more), tmp_path / 'log', _pause_in_fsync)
    assert wait_for((tmp_path / 'run' / PREVIOUS_FILE).exists, process)
    kill(process)
    assert (read_state(tmp_path / 'run')['scaler'] is not None) == (amp_dtype == 'float16')
    assert_same_run(complete(tmp_path, *more), tmp_path / 'reference')
