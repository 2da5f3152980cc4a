"""The training job: one step, evaluation, and whole small runs with the options that change them."""
import csv
import json
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
import yaml
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import accuracy
from training_runs import arguments, assert_same_run, finish, read_state, read_summary_rows, run_here, start

from timm_dense2net import build, runs, trainer, training_form
from timm_dense2net.augment import AugmentConfig, ProgressiveResize
from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.counts import count_macs
from timm_dense2net.curves import read_summary
from timm_dense2net.distributed import Processes
from timm_dense2net.engine import TrainStep, evaluate, predict
from timm_dense2net.interrupt import StopSignal
from timm_dense2net.options import parse_args
from timm_dense2net.runs import RunFolder
from timm_dense2net.trained import load_trained
from timm_dense2net.trainer import Trainer, TrainingError


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()


def batches(count, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 2, 2, dtype=torch.double, generator=generator),
         torch.randint(5, (size,), generator=generator)) for _ in range(count)]


def update(model, groups, **kwargs):
    step = TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), **kwargs)
    return [step(group) for group in groups]


def test_step_is_the_optimizers_own():
    model, expected = linear_model(), linear_model()
    optimizer = torch.optim.SGD(expected.parameters(), 0.1, momentum=0.9)
    for images, targets in batches(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(images).float(), targets).backward()
        optimizer.step()
    update(model, [[batch] for batch in batches(3)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))


def test_accumulated_batches_are_one_batch():
    whole, parts = linear_model(), linear_model()
    group = batches(4)
    joined = tuple(map(torch.cat, zip(*group)))
    figures = update(whole, [[joined]])[0]
    part_figures = update(parts, [group])[0]
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(whole.parameters(), parts.parameters()))
    assert part_figures.shape == (2, 4)
    assert torch.allclose(part_figures[0].mean(), figures[0, 0]) and part_figures[1].sum() == figures[1, 0]


def test_clipping_bounds_the_update():
    model, before = linear_model(), linear_model()
    update(model, [batches(1)], clip_grad=1e-3)
    change = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters())])
    assert change.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-4)


def test_second_order_optimizer(monkeypatch, tmp_path):
    """AdaHessian differentiates the gradients; it cannot in the training form."""
    monkeypatch.setattr(training_form, '_enabled', True)
    before, model = linear_model(), linear_model()
    step = TrainStep(model, nn.CrossEntropyLoss(), create_optimizer_v2(model, 'adahessian', lr=0.1))
    step(batches(1))
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    more = ['--opt', 'adahessian', '--model', 'dense2net40_k12_s4', '--model-kwargs', 'block_config=[1]']
    assert run_here(arguments(tmp_path, *more, '--drop', 0, '--epochs', 1)) == 0
    assert training_form._enabled


def test_evaluation_weighs_every_image_alike():
    """The last batch is short: the mean is over images, not over batches."""
    model = linear_model()
    data = [*batches(2), *batches(1, size=1)]
    images, targets = map(torch.cat, zip(*data))
    # What another process has seen is added; this one may have had no image.
    assert evaluate(model, [], reduce=lambda total: total + torch.tensor([6., 1., 2., 4.]).double()) == dict(
        loss=1.5, top1=25., top5=50.)
    metrics = evaluate(model, data)
    logits = model(images).float()
    top1, top5 = accuracy(logits, targets, topk=(1, 5))
    assert metrics['top1'] == pytest.approx(top1.item()) and metrics['top5'] == pytest.approx(top5.item())
    assert metrics['loss'] == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    predicted, same_targets = predict(model, data)
    assert torch.allclose(predicted, logits) and torch.equal(same_targets, targets)


def test_macs_are_those_of_the_layers():
    model, macs = timm.create_model('dense2net40_k12_s4', num_classes=100).eval(), []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, _, output: macs.append(output.numel() * m.weight[0].numel()))
    model(torch.zeros(1, 3, 32, 32))
    assert sum(macs) == count_macs(model, (3, 32, 32)) > 1e6


def test_macs_of_a_model_that_hands_parameters_to_its_modules():
    model = timm.create_model('cait_xxs24_224', img_size=64, device='meta')
    linear = 24 * 12 * 192 ** 2 * 16  # blocks, matrices of width x width in each, tokens
    assert linear < count_macs(model, (3, 64, 64)) < 1.1 * linear


def test_run_leaves_what_it_should(tmp_path):
    """Files, figures and weights of a run; evaluation of them gives the same."""
    assert run_here(arguments(tmp_path, '--epochs', '2')) == 0
    run = tmp_path / 'run'
    names = {path.name for path in run.iterdir()}
    assert names >= {
        'args.yaml', 'summary.csv', 'curves.png', 'last.safetensors', 'best.safetensors', 'checkpoint.pth.tar',
        'checkpoint-prev.pth.tar', 'result.json', 'report.json', 'per_class.csv', 'confusion_matrix.csv',
        'confusion_matrix.png'}
    assert [name for name in names if name.startswith('.')] == ['.lock']

    with open(run / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == [
        'epoch', 'train_loss', 'train_top1', 'train_seconds', 'train_images_per_second', 'eval_loss', 'eval_top1',
        'eval_top5', 'lr']
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert float(rows[1]['train_loss']) < float(rows[0]['train_loss'])

    result = json.loads((run / 'result.json').read_text())
    assert result['test_top1'] == pytest.approx(float(rows[1]['eval_top1']), abs=1e-3)
    assert result['best_top1'] == max(float(row['eval_top1']) for row in rows)
    assert (result['epochs'], result['ema'], result['seed'], result['tested']) == (2, True, 1, 'last')

    weights, metadata = load_weights(run / 'last.safetensors')
    model = timm.create_model(metadata['model'], num_classes=int(metadata['num_classes']))
    model.load_state_dict(weights)
    state = read_state(run)
    assert all(torch.equal(weights[name], state['state_dict_ema'][name]) for name in weights)
    assert not all(torch.equal(weights[name], state['state_dict'][name]) for name in weights)
    from_state, metadata_of_state = load_weights(run / 'checkpoint.pth.tar')
    assert all(torch.equal(weights[name], from_state[name]) for name in weights)
    assert metadata_of_state.items() <= metadata.items()
    arguments_in_file = json.loads(metadata['args'])
    assert arguments_in_file['lr'] == 0.05 and str(tmp_path) not in json.dumps(metadata)
    assert yaml.safe_load((run / 'args.yaml').read_text())['lr'] == 0.05


def run(tmp_path, *more, name='run'):
    log = tmp_path / f'{name}.log'
    code = finish(start(arguments(tmp_path, *more, name=name), log))
    assert code == 0, log.read_text()
    return tmp_path / name, log.read_text()


def make_trainer(tmp_path, *more):
    args = parse_args(arguments(tmp_path, *more))
    return build.build_trainer(args, build.build_data(args), Processes(torch.device('cpu')))


def test_evaluation_only(tmp_path, capsys):
    folder, _ = run(tmp_path, '--epochs', '1')
    result = json.loads((folder / 'result.json').read_text())
    for path in (folder, folder / 'best.safetensors'):  # the size is that of the weights
        assert run_here(['--eval-only', '--checkpoint', path, '--dataset', 'digits']) == 0
        assert f'test top-1 {result["test_top1"]:.2f}, top-5 {result["test_top5"]:.2f}' in capsys.readouterr().out
    assert run_here(['--eval-only', '--checkpoint', tmp_path, '--dataset', 'digits']) == 1
    assert 'no weights at' in capsys.readouterr().err
    weights, metadata = load_weights(folder / 'last.safetensors')
    # As it was trained and tested; the model's own would be 0.95.
    assert load_trained(checkpoint=folder).data_config['crop_pct'] == 1.
    del metadata['model']
    save_weights(tmp_path / 'nameless.safetensors', weights, metadata)
    evaluation = ['--eval-only', '--checkpoint', tmp_path / 'nameless.safetensors', '--dataset', 'digits']
    assert run_here([*evaluation, '--model', 'test_resnet']) == 0
    assert f'test top-1 {result["test_top1"]:.2f}' in capsys.readouterr().out
    assert run_here([*evaluation, '--model', 'test_resnet', '--model-kwargs', 'channels=(8,16,24,32)']) == 1
    assert 'does not fit test_resnet' in capsys.readouterr().err
    assert run_here([*evaluation, '--model', 'test_resnet', '--model-kwargs', 'global_pool=foo']) == 1
    assert 'does not fit test_resnet' in capsys.readouterr().err
    # A model that is named goes before what the file says.
    evaluation[2] = folder
    assert run_here([*evaluation, '--model', 'resnet18']) == 1
    assert capsys.readouterr().err.endswith('does not fit resnet18: it is of test_resnet\n')


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    weights = []
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        folder, _ = run(tmp_path, '--epochs', '1', '--seed', seed, name=name)
        weights.append(load_weights(folder / 'last.safetensors')[0])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_plateau_decays_and_training_stops_early(tmp_path):
    """A rate too small to learn anything: it decays each time the loss does not fall, then the run ends."""
    folder, log = run(
        tmp_path, '--lr', '1e-6', '--no-model-ema', '--epochs', '30', '--early-stop-patience', '4', '--drop', '0',
        '--model-kwargs', 'norm_layer=groupnorm1', '--decay-rate', '0.5')
    rows = read_summary_rows(folder)
    assert len(rows) < 30
    tops = [float(row['eval_top1']) for row in rows]
    assert max(tops[:-4]) >= max(tops[-4:])
    assert float(rows[-1]['lr']) < 1e-6
    assert_plateau_lowers_the_rate(rows, 1e-6, factor=0.5, patience=0)
    assert json.loads((folder / 'result.json').read_text())['epochs'] == len(rows)
    assert 'Stopped early, after 4 epochs without a better validation top-1' in log


def assert_plateau_lowers_the_rate(rows, lr, **kwargs):
    """The rates are those that torch's schedule gives for the validation losses."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **kwargs)
    for row in rows:
        assert float(row['lr']) == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-6)
        scheduler.step(float(row['eval_loss']))


def test_plateau_watches_the_loss(tmp_path):
    """Not top-1, which rises here where the loss does not fall, and the other way round."""
    trainer = make_trainer(tmp_path, '--lr', '0.1', '--patience-epochs', '1', '--decay-rate', '0.3')
    losses, tops = (5., 4., 4.5, 4.5, 3., 3.5, 2.), (9., 8., 7., 10., 11., 10., 9.)
    rows = []
    for loss, top1 in zip(losses, tops):
        rows.append(dict(lr=trainer.lr, eval_loss=loss))
        trainer.last = dict(loss=loss, top1=top1)
        trainer.seconds['epoch_train'] = 1.
        trainer._end_epoch()
    assert len({row['lr'] for row in rows}) == 2
    assert_plateau_lowers_the_rate(rows, 0.1, factor=0.3, patience=1)


def test_arguments_reach_what_they_are_for(tmp_path):
    trainer = make_trainer(
        tmp_path, '--hflip', 0.25, '--crop-padding', 2, '--cutout-holes', 1, '--cutout-length', 3, '--mixup', 0.3,
        '--cutmix', 0.7, '--mixup-prob', 0.6, '--mixup-switch-prob', 0.4, '--mixup-off-epoch', 2, '--smoothing', 0.05,
        '--initial-img-size', 4, '--full-size-epoch', 2, '-vb', 100, '--clip-grad', 0.5, '--clip-mode', 'value',
        '--drop', 0.3, '--drop-path', 0.2, '--model', 'dense2net40_k12_s4', '--model-kwargs', 'block_config=(1,1,2)',
        '--grad-checkpointing')
    plain = AugmentConfig(hflip=0., crop_padding=0)
    assert trainer.train_loader.config == AugmentConfig(
        hflip=0.25, crop_padding=2, cutout_holes=1, cutout_length=3, mixup=0.3, cutmix=0.7, mixup_prob=0.6,
        mixup_switch_prob=0.4, mixup_off_epoch=2, smoothing=0.05)
    assert trainer.train_loader.progressive == ProgressiveResize(4, 2)
    assert trainer.eval_loader.config == plain and trainer.eval_loader.progressive is None
    assert (trainer.train_loader.batch_size, trainer.eval_loader.batch_size) == (256, 100)
    assert (trainer.step.clip_grad, trainer.step.clip_mode) == (0.5, 'value')
    assert isinstance(trainer.step.loss_fn, SoftTargetCrossEntropy)  # smoothed when they are mixed
    assert make_trainer(tmp_path, '--smoothing', 0.05).step.loss_fn.smoothing == 0.05
    last_layer = trainer.model.features.denseblock3.denselayer2
    rates = trainer.model.head_drop.p, last_layer.drop_path.drop_prob
    assert rates == pytest.approx((0.3, 0.2)) and last_layer.grad_checkpointing
    assert make_trainer(tmp_path, '--no-aug').train_loader.config == plain


def test_a_second_interrupt_acts_at_once():
    before, stop = signal.getsignal(signal.SIGINT), StopSignal()
    with pytest.raises(KeyboardInterrupt), stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_in_another_thread(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path, '--epochs', '1')
    with ThreadPoolExecutor(1) as thread:
        thread.submit(trainer.fit).result()
    assert trainer.finished and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize('error, told', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.'),
     'CUDA out of memory. Tried to allocate 20.00 MiB. A smaller --batch-size'),
    (RuntimeError('DataLoader worker (pid 1) is killed by signal: Killed. '),
     'DataLoader worker (pid 1) is killed by signal: Killed. Fewer --workers'),
])
def test_too_little_memory_is_one_message(tmp_path, monkeypatch, capsys, error, told):
    def fail(*args):
        raise error

    monkeypatch.setattr(Trainer, '_train_epoch', fail)
    assert run_here(arguments(tmp_path)) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'error: {told}')


def test_only_the_plateau_schedule_stops_early_unasked(tmp_path):
    for sched, stops in (('plateau', True), ('cosine', False)):
        trainer = make_trainer(tmp_path, '--sched', sched)
        assert not trainer.finished
        trainer.epochs_without_gain = 25
        assert trainer.finished == stops


def test_the_optimizers_own_arguments(tmp_path):
    trainer = make_trainer(tmp_path, '--opt', 'adamw', '--opt-eps', '1e-6', '--opt-betas', '0.8', '0.95')
    assert [(group['eps'], tuple(group['betas'])) for group in trainer.optimizer.param_groups] == [(1e-6, (0.8, 0.95))]
    with pytest.raises(ValueError, match='--opt adamw --opt-betas 0.8: .*index out of range'):  # it takes two
        make_trainer(tmp_path, '--opt', 'adamw', '--opt-betas', '0.8')


def _note_loaders():
    """Prints which images a loader is made of, and when; of two epochs the first is the better one."""
    def evaluate(self):
        original_evaluate(self)
        if self.epoch == 1:
            self.last = dict(self.last, top1=0.)

    original_evaluate = trainer.Trainer._evaluate
    trainer.Trainer._evaluate = evaluate

    def noting(where):
        def build_loader(args, images, *rest, **kwargs):
            print('loader', where, len(images))
            return original(args, images, *rest, **kwargs)
        return build_loader
    original = build.build_loader
    build.build_loader, runs.build_loader = noting('training'), noting('test')


def test_hold_out_touches_the_test_split_once(tmp_path, capsys):
    """Every epoch is judged by the held-out images; the weights that are tested are those chosen by them."""
    process = start(arguments(tmp_path, '--hold-out', '300', '--epochs', '2'), tmp_path / 'log', _note_loaders)
    assert finish(process) == 0, (tmp_path / 'log').read_text()
    lines = [line for line in (tmp_path / 'log').read_text().splitlines() if line.startswith('loader')]
    assert lines == [f'loader training {1437 - 300}', 'loader training 300', 'loader test 360']
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert (result['tested'], result['hold_out']) == ('best', 300)
    best = load_weights(tmp_path / 'run' / 'best.safetensors')[1]
    assert float(best['top1']) == pytest.approx(result['best_top1'], abs=1e-3) and result['best_epoch'] == 0
    tops = []
    for name in ('best.safetensors', '', 'last.safetensors'):  # the folder alone means what was tested
        assert run_here(['--eval-only', '--checkpoint', tmp_path / 'run' / name, '--dataset', 'digits']) == 0
        tops.append(re.search(r'test top-1 ([\d.]+)', capsys.readouterr().out)[1])
    assert tops[0] == tops[1] == f'{result["test_top1"]:.2f}' != tops[2]


@pytest.mark.parametrize('more', [
    ['--amp', '--channels-last', '--grad-accum-steps', '2', '--clip-grad', '1', '--torchcompile', 'aot_eager'],
    ['--grad-checkpointing'],
    ['--amp', '--amp-dtype', 'float16', '--channels-last', '--grad-accum-steps', '3', '--clip-grad', '1'],
    ['--mixup', '0.2', '--cutmix', '1', '--mixup-off-epoch', '1', '--smoothing', '0.1', '--aa', 'cifar10',
     '--cutout-holes', '1', '--sched', 'cosine', '--sched-on-updates', '--warmup-epochs', '1', '--opt', 'adamw',
     '--lr', '0.002', '--layer-decay', '0.8'],
])
def test_options_work_together(tmp_path, more):
    model = ['--model', 'dense2net40_k12_s4', '--model-kwargs', 'block_config=[1, 1, 1]', '-b', '64']
    folder, _ = run(tmp_path, *model, *more, '--epochs', '2')
    rows = read_summary_rows(folder)
    assert float(rows[1]['train_loss']) < float(rows[0]['train_loss']) or '--mixup' in more
    assert float(rows[1]['eval_loss']) < 2.4


SMALL = ['--model', 'dense2net40_k12_s4', '--model-kwargs', 'block_config=[1, 1, 1]', '-b', '64', '--epochs', '1']


@pytest.mark.parametrize('more, dtype', [
    ([], torch.float32), (['--amp'], torch.bfloat16), (['--amp', '--amp-dtype', 'float16'], torch.float16)])
def test_precision_layout_and_accumulation(tmp_path, more, dtype):
    trainer = make_trainer(tmp_path, *SMALL, '--channels-last', '--grad-accum-steps', '3', *more)
    seen = set()

    def note(conv, inputs, output):
        tensors = (inputs[0], conv.weight)
        seen.add((output.dtype, all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)))

    trainer.model.features.conv0.register_forward_hook(note)
    trainer.fit()
    assert seen == {(dtype, True)}
    assert len(trainer.train_loader) == 22 and trainer.updates == 8
    assert (trainer.scaler is not None) == (dtype == torch.float16)


@pytest.mark.parametrize('more', [
    ['--sched', 'multistep', '--decay-milestones', '1'], ['--sched', 'tanh'],
    ['--sched', 'cosine', '--warmup-epochs', '1'], ['--sched', 'cosine', '--sched-on-updates']])
def test_a_state_of_before_the_first_step_has_the_first_rate(tmp_path, more):
    before, after = (make_trainer(tmp_path, *more, '--epochs', '3') for _ in range(2))
    after.load_state_dict(before.state_dict())
    assert after.lr == before.lr


def test_torchcompile_compiles(tmp_path):
    trainer = make_trainer(tmp_path, '--torchcompile', 'aot_eager')
    assert isinstance(trainer.step.model, torch._dynamo.OptimizedModule)


def test_layers_of_other_nets_are_not_compiled(tmp_path):
    with pytest.raises(ValueError, match='--torchcompile-layers: test_resnet has no compile_layers'):
        make_trainer(tmp_path, '--torchcompile-layers')


def test_layers_are_not_compiled_for_second_derivatives(tmp_path):
    with pytest.raises(ValueError, match='--opt adahessian .* --torchcompile-layers'):
        make_trainer(
            tmp_path, '--model', 'dense2net40_k12_s4', '--img-size', '32', '--opt', 'adahessian', '--drop', '0',
            '--torchcompile-layers')


def test_a_cuda_graph_is_of_one_batch():
    with pytest.raises(ValueError, match='one batch, got 2'):
        update(linear_model(), [batches(2)], cuda_graph=True)


def test_a_cuda_graph_is_for_a_gpu(tmp_path):
    folder, _ = run(tmp_path, '--epochs', '1')
    with_graph, _ = run(tmp_path, '--epochs', '1', '--cuda-graph', name='graph')
    assert_same_run(with_graph, folder)


def test_training_figures_are_those_of_the_images(tmp_path):
    """At rate 0 the mean over an epoch's batches is the accuracy on the training images it took."""
    trainer = make_trainer(
        tmp_path, *SMALL, '--lr', '0', '--no-aug', '--drop', '0', '--no-model-ema', '--model-kwargs',
        'block_config=[1, 1, 1]', 'norm_layer=groupnorm1')
    batches = list(trainer.train_loader.epoch(0))
    trainer.fit()
    expected = evaluate(trainer.model, batches)
    trainer.batch_metrics.zero_()
    trainer.epoch = trainer.batches_done = 0
    trainer.seconds['epoch_train'] = 1.
    trainer._train_epoch()
    figures = trainer._train_metrics()
    assert figures['top1'] == pytest.approx(expected['top1'], abs=0.1) and figures['top1'] > 0
    assert figures['loss'] == pytest.approx(expected['loss'], rel=1e-4)


def test_of_a_mixed_image_the_larger_part_counts():
    model = nn.Flatten()
    step = TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
    logits = torch.tensor([[3., 1., 0.], [0., 1., 3.]], requires_grad=True)
    assert step([(logits, torch.tensor([[0.6, 0.4, 0.], [0., 0.3, 0.7]]))])[1].tolist() == [2.]


def test_a_run_that_writes_nothing_names_no_folder(tmp_path):
    trainer = make_trainer(tmp_path, '--lr', '1e20', '--log-interval', '1', '--epochs', '2')
    with pytest.raises(TrainingError, match='epoch 1, step') as info:
        trainer.fit()
    assert 'is kept in' not in str(info.value) and not list(tmp_path.iterdir())


def test_loggers_get_the_rows_of_the_summary(tmp_path, monkeypatch):
    scalars, logged, closed = {}, [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            scalars['purge_step'] = purge_step

        def add_scalar(self, name, value, epoch):
            scalars[name, epoch] = value

        def flush(self):
            pass

        def close(self):
            closed.append(self)

    def install(name, **attributes):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    wandb = install('wandb', init=lambda **kwargs: logged.append(kwargs), log=logged.append)
    monkeypatch.setattr('timm.utils.summary.wandb', wandb, raising=False)
    install('tensorboard')
    install('torch.utils.tensorboard', SummaryWriter=SummaryWriter)
    argv = arguments(tmp_path, '--epochs', '2', '--log-tensorboard', '--log-wandb')
    assert run_here(argv) == 0
    with open(tmp_path / 'run' / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert scalars.pop('purge_step') == 0 and len(closed) == 1
    assert logged[0]['name'] == 'run' and len(logged) == 3
    for epoch, row in enumerate(rows):
        noted = {name.replace('/', '_'): value for (name, e), value in scalars.items() if e == epoch}
        for figures in (noted, logged[1 + epoch]):
            assert {name: float(figures[name]) for name in row if name != 'epoch'} == pytest.approx(
                {name: float(value) for name, value in row.items() if name != 'epoch'})


def test_layer_decay_scales_the_rate(tmp_path):
    """Also under 'plateau', whose scheduler is torch's."""
    run(tmp_path, '--epochs', '1', '--layer-decay', '0.5', '--sched', 'plateau', '--cooldown-epochs', '3')
    state = read_state(tmp_path / 'run')
    assert state['plateau']['cooldown'] == 3
    groups = state['optimizer']['param_groups']
    assert len({group['lr'] for group in groups}) > 2
    assert all(group['lr'] == pytest.approx(0.05 * group['lr_scale']) for group in groups)


def test_weight_decay_is_on_all_parameters(tmp_path):
    run(tmp_path, '--epochs', '1')
    groups = read_state(tmp_path / 'run')['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [1e-4]


def test_initial_checkpoint(tmp_path, capsys):
    folder, _ = run(tmp_path, '--epochs', '1', '--no-model-ema', name='first')
    more = ['--epochs', '1', '--no-model-ema', '--lr', '0', '--initial-checkpoint', folder / 'last.safetensors']
    run(tmp_path, *more, name='second')
    run(tmp_path, *more[:-1], folder, name='by folder')
    first, second, third = (
        load_weights(tmp_path / name / 'last.safetensors')[0] for name in ('first', 'second', 'by folder'))
    assert all(torch.equal(second[name], third[name]) for name in second)
    names = dict(timm.create_model('test_resnet').named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in names if name in first)
    assert run_here(arguments(tmp_path, *more, '--model', 'resnet18', name='third')) == 1
    assert 'error: resnet18' in capsys.readouterr().err


@pytest.mark.parametrize('more, words', [
    (['--model', 'dense2net121_s44'], ["no model 'dense2net121_s44'", 'dense2net121_s4']),
    (['--model-kwargs', 'growht_rate=3'], ['test_resnet', 'growht_rate']),
    (['--dataset', 'torch/cifar100', '--data-dir', 'nowhere'], ['torch/cifar100', 'nowhere']),
    (['--num-classes', '7'], ['digits', '10 classes', '7']),
    (['--batch-size', '5000'], ['1437', '5000']),
    (['--hold-out', '5000'], ['5000', '1437']),
    (['--hflip', '2'], ['--hflip must be between 0 and 1', '2']),
    (['--aa', 'imagenet'], ['--aa must be', 'cifar10', 'imagenet']),
    (['--device', 'cuda:99'], ['cuda:99']),
    (['--torchcompile', 'eager', '--grad-checkpointing'], ['--torchcompile eager', 'aot_eager']),
    (['--opt', 'nesterow_adamw'], ["timm has no optimizer 'nesterow_adamw'"]),
    (['--opt', 'fusedadam'], ['--opt fusedadam', 'APEX']),
    (['--seed', str(1 << 32)], ['--seed must be in [0, 2^32)', '4294967296']),
    (['--sched', 'rsqrt'], ['--sched rsqrt', '--warmup-epochs']),
    (['--pretrained', '--model', 'dense2net169_s8'], ['dense2net169_s8', 'pretrained']),
    (['--mean', '0.5', '0.5'], ['--mean', '3 values', '0.5, 0.5']),
    (['--std', 'nan', '1', '1'], ['--std must be finite', 'nan']),
    (['--lr', 'inf'], ['--lr must be finite', 'inf']),
    (['--img-size', '0'], ['--img-size must be at least 1', '0']),
    (['--min-lr', '-1'], ['--min-lr must be at least 0', '-1']),
    (['--decay-epochs', '0'], ['--decay-epochs must be above 0', '0']),
    (['--decay-rate', '1'], ['--decay-rate must be below 1', 'plateau']),
    (['--decay-milestones', '75', '50'], ['--decay-milestones', 'above the one before', '[75, 50]']),
    (['--decay-milestones', '-5', '50'], ['--decay-milestones', 'from 1 on', '[-5, 50]']),
    (['--clip-grad', '-1'], ['--clip-grad must be above 0', '-1']),
    (['--momentum', '2'], ['--momentum must be in [0, 1)', '2']),
    (['--layer-decay', '0'], ['--layer-decay must be in (0, 1]', '0']),
    (['--layer-decay', '0.9', '--sched', 'none'], ['--layer-decay', '--sched constant']),
    (['--decay-epochs', '90', '--sched', 'wsd'], ['wsd', '90']),
    (['--model-ema-decay', '3'], ['--model-ema-decay must be in [0, 1)', '3']),
    (['--model-kwargs', 'foo'], ['--model-kwargs takes KEY=VALUE', "'foo'"]),
    (['--model-kwargs', 'checkpoint_path=x.pth'], ['--model-kwargs: checkpoint_path is set by --initial-checkpoint']),
    (['--model-kwargs', 'features_only=True'], ['--model-kwargs: features_only']),
    (['--model-kwargs', 'drop_rate=0.5'], ['--model-kwargs: drop_rate is set by --drop']),
    (['--model', 'dense2net40_k12_s4', '--model-kwargs', 'block_config=6'], ['block_config must be a list', '6']),
    (['--dataset', 'folder'], ['an image folder is named by --data-dir']),
    (['--model', 'dense2net40_k12_s4', '--model-kwargs', 'act_layer=foo'], ["unknown act_layer 'foo'", 'relu']),
    (['--model', 'dense2net40_k12_s4', '--model-kwargs', 'norm_layer=foo'], ["norm_layer 'foo'", 'batchnorm2d']),
    (['--model', 'wide_resnet28_10', '--model-kwargs', 'norm_layer=groupnorm'], ["norm_layer 'groupnorm'", '16']),
    (['--initial-checkpoint', 'nowhere.pth'], ['no weights at nowhere.pth']),
    (['--initial-checkpoint', __file__], [f'{__file__}: not a whole safetensors file']),
    (['--resume', 'nowhere/at/all'], ['--resume nowhere/at/all: no run is there', 'no such file or folder']),
    (['--model', 'test_vit'], ['test_vit does not take images of 3x8x8', 'made for 160x160', '--img-size 160']),
    (['--model', 'test_vit', '--model-kwargs', 'img_size=64'], ['does not take images of 3x8x8', '--img-size 64']),
    (['--model', 'dense2net121_s4', '--initial-img-size', '4', '--full-size-epoch', '2'],
     ['--initial-img-size 4: dense2net121_s4 does not take images of 3x4x4', 'at least']),
])
def test_user_mistakes_are_one_message(tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    assert run_here(arguments(tmp_path, *more)) in (1, 2)
    error = capsys.readouterr().err
    assert error.count('error: ') == 1 and 'Traceback' not in error
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_time_of_training_is_that_of_its_steps(tmp_path, monkeypatch):
    now = 0.

    def takes(seconds, owner, name):
        original = getattr(owner, name)

        def slow(*args, **kwargs):
            nonlocal now
            now += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(trainer, 'time', SimpleNamespace(perf_counter=lambda: now))
    takes(1, trainer.TrainStep, '__call__')
    takes(10, trainer, 'evaluate')
    takes(100, RunFolder, 'add_epoch')
    takes(1000, trainer, 'save_state')
    assert run_here(arguments(tmp_path, '--epochs', '2', '--checkpoint-interval', '3')) == 0
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    steps = result['updates']
    rows = read_summary(tmp_path / 'run' / 'summary.csv')
    assert rows['train_images_per_second'] == [result['batch_size']] * 2
    assert result['images_per_second'] == result['batch_size']
    saves = 1 + steps // 3 + 2  # at the beginning, every third step and after each epoch
    assert result['train_seconds'] == steps + 2 * 10 + 2 * 100 + saves * 1000


def test_ema_follows_timm():
    """The EMA that is saved is ModelEmaV3's, updated with the number of updates so that it warms up."""
    from timm.utils import ModelEmaV3

    from timm_dense2net.trainer import Trainer
    args = parse_args(['--model-ema', '--model-ema-warmup', '--lr', '0.1', '--device', 'cpu'])
    model = linear_model().float()
    data = [(images.float(), targets) for images, targets in batches(3)]

    class Loader:
        config = AugmentConfig()

        def __len__(self):
            return len(data)

        def epoch(self, epoch, start_step=0):
            return iter(data[start_step:])

    trainer = Trainer(args, model, Loader(), Loader(), {}, Processes(torch.device('cpu')))
    expected_model = deepcopy(model)
    expected = ModelEmaV3(expected_model, decay=0.9998, use_warmup=True)
    optimizer = torch.optim.SGD(expected_model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for number, (images, targets) in enumerate(data, start=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected_model(images), targets).backward()
        optimizer.step()
        expected.update(expected_model, step=number)
    trainer._train_epoch()
    for ours, theirs in zip(trainer.model_to_keep.parameters(), expected.module.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-7)
