"""Training by two processes: the same result as by one, one writer, and a lost worker replaced."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, TIMES, TRAIN_SCRIPT, arguments, assert_same_run, differences, finish, read_state, start

from timm_dense2net.checkpoint import load_weights
from timm_dense2net.training_state import CHECKPOINT_FILE, save_state

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason='torch was built without gloo')

# Group norm and no dropout: nothing depends on how a batch is divided among processes.
UNDIVIDED = ['--model-kwargs', 'norm_layer=groupnorm1', '--drop', '0', '--epochs', '1', '--lr', '0.01']


def torchrun(argv, max_restarts=0, script=TRAIN_SCRIPT):
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts',
        str(max_restarts), '--monitor-interval', '0.1', str(script), *map(str, argv)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def completed(process, code=0):
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, output
    return output


def workers(process):
    """Ids of the training processes that a torchrun process started."""
    found = []
    for task in Path(f'/proc/{process.pid}/task').iterdir():
        for pid in (task / 'children').read_text().split():
            if TRAIN_SCRIPT.name in Path(f'/proc/{pid}/cmdline').read_text():
                found.append(int(pid))
    return found


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """A run of two processes that nothing interrupted, with batch norm, EMA, dropout and mid-epoch checkpoints."""
    output = tmp_path_factory.mktemp('two')
    completed(torchrun(arguments(output, '-b', '64', '--log-interval', '1')))
    return output / 'run'


def test_same_as_one_process(tmp_path):
    """128 images a batch, as one share of 128 or two of 64."""
    assert finish(start(arguments(tmp_path, *UNDIVIDED, '-b', '128', name='one'), tmp_path / 'log')) == 0
    completed(torchrun(arguments(tmp_path, *UNDIVIDED, '-b', '64', name='two')))
    one, two = (load_weights(tmp_path / name / 'last.safetensors')[0] for name in ('one', 'two'))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    rows = []
    for name in ('one', 'two'):
        with open(tmp_path / name / 'summary.csv', newline='') as f:
            rows.append([float(value) for key, value in next(csv.DictReader(f)).items() if key not in TIMES])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    assert read_state(tmp_path / 'two')['position'] == read_state(tmp_path / 'one')['position']


@pytest.mark.parametrize('refusal', ['already holds a run', 'Not a directory'])
def test_what_one_process_refuses_is_one_message(tmp_path, two_processes, refusal):
    """Process 0 alone looks at the run's folder, and makes it."""
    output = two_processes.parent
    if refusal == 'Not a directory':
        output = tmp_path / 'file'
        output.touch()
    told = completed(torchrun(arguments(output, '-b', '64')), code=1)
    assert told.count('error: ') == 1 and refusal in told
    assert 'train_cifar.py", line' not in told, told


def test_only_process_0_tells_how_it_goes(tmp_path, two_processes):
    shutil.copytree(two_processes, tmp_path / 'run')
    told = completed(torchrun(['--resume', tmp_path / 'run', '--epochs', '4']))
    assert told.count('Going on after 3 epochs') == 1


def test_lost_worker_is_replaced(tmp_path, two_processes):
    """One of two workers is killed in mid-epoch; torchrun starts both anew and they end at the same bits."""
    argv = arguments(tmp_path, '-b', '64', '--log-interval', '1', '--resume', 'auto')
    process = torchrun(argv, max_restarts=1)
    wait_for((tmp_path / 'run' / 'summary.csv').exists, process)
    first = workers(process)
    assert len(first) == 2
    os.kill(first[1], signal.SIGKILL)
    output = completed(process)
    assert 'Going on after' in output
    assert_same_run(tmp_path / 'run', two_processes)


def test_signal_to_all_is_agreed_on(tmp_path):
    """torchrun hands SIGTERM on; the workers agree on a step, save and end."""
    process = torchrun(arguments(tmp_path, '-b', '64', '--log-interval', '1', '--epochs', '1000'))
    wait_for((tmp_path / 'run' / 'summary.csv').exists, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and 'SIGTERM: the state is saved' in output
    state = read_state(tmp_path / 'run')
    assert state['position']['updates'] > 0 and len(state['processes']) == 2


LOSS_OF_ONE_BREAKS = '''
import math
import sys

import train_cifar
from timm_dense2net.engine import TrainStep

step = TrainStep.__call__


def broken(self, batches):
    figures = step(self, batches)
    return figures * math.nan if train_cifar.started.rank == 1 else figures


def start(device):
    train_cifar.started = start_processes(device)
    return train_cifar.started


start_processes, train_cifar.start_processes = train_cifar.start_processes, start
TrainStep.__call__ = broken
sys.exit(train_cifar.main())
'''


def test_what_one_process_alone_sees_ends_all(tmp_path):
    script = tmp_path / 'broken.py'
    script.write_text(LOSS_OF_ONE_BREAKS)
    told = completed(torchrun(arguments(tmp_path, '-b', '64', '--log-interval', '1'), script=script), code=1)
    assert told.count('error: the loss is nan at epoch 1, step 1 of') == 1, told
    assert 'peer' not in told and 'broken.py", line' not in told, told


def test_running_statistics_are_averaged(two_processes):
    first, second = (process['model'] for process in read_state(two_processes)['processes'])
    assert any('running_mean' in name for name in first) and not differences(first, second)


def test_dist_bn_averages_or_takes_those_of_the_first(tmp_path):
    """Running statistics of one epoch, which no step of training depends on, as each process has its own."""
    states = {}
    for mode in ('', 'reduce', 'broadcast'):
        name = mode or 'own'
        completed(torchrun(arguments(tmp_path, '-b', '64', '--epochs', '1', f'--dist-bn={mode}', name=name)))
        states[name] = [process['model'] for process in read_state(tmp_path / name)['processes']]
    statistics = [key for key in states['own'][0] if key.endswith(('running_mean', 'running_var'))]
    first, second = states['own']
    assert statistics and all(not torch.equal(first[key], second[key]) for key in statistics)
    for key in statistics:
        for reduced, broadcast in zip(states['reduce'], states['broadcast']):
            torch.testing.assert_close(reduced[key], (first[key] + second[key]) / 2)
            assert torch.equal(broadcast[key], first[key])


def test_one_process_goes_on_where_two_were(tmp_path, two_processes):
    """At an epoch's end the number of processes may change; within one it may not."""
    shutil.copytree(two_processes, tmp_path / 'run')
    assert len(read_state(tmp_path / 'run')['processes']) == 2
    log = tmp_path / 'log'
    argv = ['--resume', str(tmp_path / 'run'), '--epochs', '4', '-b', '128']
    assert finish(start(argv, log)) == 0, log.read_text()
    assert 'Saved by 2 processes, 1 go on' in log.read_text()
    assert (tmp_path / 'run' / CHECKPOINT_FILE).exists() and read_state(tmp_path / 'run')['position']['epoch'] == 4

    state = read_state(two_processes)
    state['position']['batches_done'] = 1
    shutil.copytree(two_processes, tmp_path / 'within')
    save_state(tmp_path / 'within', state)
    argv = ['--resume', str(tmp_path / 'within'), '--epochs', '4', '-b', '128']
    assert finish(start(argv, tmp_path / 'refused')) == 1
    assert 'within an epoch by 2 processes, now there are 1' in (tmp_path / 'refused').read_text()
