"""Fine-tuning on an image folder of other classes and sizes, from packaged weights and from files of weights."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image, ImageDraw
from training_runs import ROOT, assert_same_run, finish, read_state, run_here, start

from timm_dense2net.build import build_data
from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.cifar import CIFAR100_STD
from timm_dense2net.freeze import freeze_stages
from timm_dense2net.options import parse_args
from timm_dense2net.packaged import packaged_file
from timm_dense2net.results import read_run
from timm_dense2net.start import pretrained_overlay
from timm_dense2net.trained import load_trained

MODEL = 'dense2net40_k12_s4'
PACKAGED = packaged_file(f'{MODEL}.sprint_40_k12_c100')
SHAPES = ('cross', 'disc', 'frame', 'ring', 'up')

# timm's scripts are in neither its wheel nor its sdist, and the tests fetch nothing.
TIMM_TRAIN_SCRIPT = os.environ.get('TIMM_TRAIN_SCRIPT')
needs_timm_scripts = pytest.mark.skipif(not TIMM_TRAIN_SCRIPT, reason=(
    "TIMM_TRAIN_SCRIPT is not set: clone github.com/huggingface/pytorch-image-models and set it to that folder's "
    'train.py'))


def draw_shape(shape, rng, size):
    """A shape of random colour, place and size on noise."""
    width, height = size
    image = Image.fromarray(rng.integers(0, 160, (height, width, 3), dtype=np.uint8))
    draw, r = ImageDraw.Draw(image), int(rng.integers(7, 13))
    x, y = int(rng.integers(r, width - r)), int(rng.integers(r, height - r))
    colour = tuple(rng.integers(100, 256, 3).tolist())
    left, top, right, bottom = box = x - r, y - r, x + r, y + r
    if shape in ('disc', 'ring'):
        draw.ellipse(box, **(dict(fill=colour) if shape == 'disc' else dict(outline=colour, width=3)))
    elif shape in ('square', 'frame'):
        draw.rectangle(box, **(dict(fill=colour) if shape == 'square' else dict(outline=colour, width=3)))
    elif shape == 'cross':
        draw.line((left, y, right, y), fill=colour, width=4)
        draw.line((x, top, x, bottom), fill=colour, width=4)
    elif shape == 'saltire':
        draw.line(box, fill=colour, width=4)
        draw.line((left, bottom, right, top), fill=colour, width=4)
    else:
        tip, base = (top, bottom) if shape == 'up' else (bottom, top)
        draw.polygon([(x, tip), (left, base), (right, base)], fill=colour)
    return image


def write_folder(root, shapes, train, validation, size, seed):
    """An image folder as timm reads it: SPLIT/CLASS/FILE."""
    rng = np.random.default_rng(seed)
    for split, count in (('train', train), ('validation', validation)):
        for shape in shapes:
            folder = root / split / shape
            folder.mkdir(parents=True)
            for i in range(count):
                draw_shape(shape, rng, size).save(folder / f'{i}.png')
    return root


def arguments(data, output, name, *more):
    """The command line of a short run on an image folder."""
    argv = [
        '--dataset', data, '--output', output, '--experiment', name, '--device', 'cpu', '--model', MODEL, '--img-size',
        '28', '--epochs', '5', '-b', '10', '--lr', '0.05', '--opt', 'sgd', '--sched', 'cosine', '--sched-on-updates',
        '--early-stop-patience', '0', '--hflip', '0', '--crop-padding', '2', *more]
    return [str(item) for item in argv]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """Ten training pictures of each shape, of another size than the weights' and not square."""
    return write_folder(tmp_path_factory.mktemp('shapes') / 'data', SHAPES, 10, 20, (48, 40), seed=2)


@pytest.fixture(scope='module')
def runs(tmp_path_factory, shapes):
    """Runs of equal budget, trained side by side: from nothing, and from the packaged weights in three ways."""
    root = tmp_path_factory.mktemp('runs')
    ways = dict(
        scratch=[],
        tuned=['--pretrained'],
        decayed=['--pretrained', '--layer-decay', '0.9'],
        frozen=['--pretrained-path', PACKAGED, '--freeze-stages', '1'])
    logs = {name: root / f'{name}.log' for name in ways}
    processes = {name: start(arguments(shapes, root, name, *more), logs[name]) for name, more in ways.items()}
    for name, process in processes.items():
        assert finish(process, 900) == 0, logs[name].read_text()
    return {name: root / name for name in ways}


def top1_of(run):
    return json.loads((run / 'result.json').read_text())['test_top1']


def test_packaged_weights_beat_a_start_from_nothing(runs):
    top1 = {name: top1_of(run) for name, run in runs.items()}
    print(top1)
    params = {json.loads((run / 'result.json').read_text())['params'] for run in runs.values()}
    assert len(params) == 1
    assert min(top1['tuned'], top1['decayed'], top1['frozen']) >= top1['scratch'] + 10., top1


def run_script(log, *words):
    """Starts Python on one thread with this package to be found, its output going to the file `log`."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with open(log, 'w') as f:
        return subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=f, stderr=subprocess.STDOUT,
            env=dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS='1'))


def finish_scripts(scripts, seconds=900):
    """Waits for processes, given by log; none may fail, and none is left behind."""
    try:
        for log, process in scripts.items():
            assert process.wait(seconds) == 0, log.read_text()
    finally:
        for process in scripts.values():
            process.kill()
            process.wait()


@pytest.fixture(scope='module')
def timm_runs(tmp_path_factory, shapes):
    """Runs of equal budget of timm's own train.py, side by side: from nothing, and from packaged weights."""
    root = tmp_path_factory.mktemp('timm_runs')
    common = [
        '--model', MODEL, '--num-classes', '5', '--img-size', '32', '--device', 'cpu', '-j', '0', '--epochs', '5', '-b',
        '10', '--lr', '0.05', '--warmup-epochs', '0', '--sched-on-updates', '--scale', '0.6', '1', '--hflip', '0',
        '--checkpoint-hist', '1', '--output', root]
    decay = ['--pretrained', '--layer-decay', '0.9']
    with_models = ['-m', 'timm_dense2net', TIMM_TRAIN_SCRIPT, shapes]
    by_module = [TIMM_TRAIN_SCRIPT, '--device-modules', 'timm_dense2net', '--data-dir', shapes]
    ways = dict(
        scratch=with_models,
        tuned=[*with_models, '--pretrained'],
        decayed=[*with_models, *decay],
        from_file=[*by_module, *decay, '--pretrained-path', PACKAGED])
    logs = {name: root / f'{name}.log' for name in ways}
    finish_scripts({
        logs[name]: run_script(logs[name], *words, *common, '--experiment', name) for name, words in ways.items()})
    return {name: root / name for name in ways}


def timm_summary(run):
    """The rows of summary.csv of timm's train.py, an epoch a row."""
    with open(run / 'summary.csv', newline='') as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


@needs_timm_scripts
def test_packaged_weights_beat_a_start_from_nothing_in_timms_train_script(timm_runs):
    summaries = {name: timm_summary(run) for name, run in timm_runs.items()}
    top1 = {name: rows[-1]['eval_top1'] for name, rows in summaries.items()}
    print(top1)
    assert {len(rows) for rows in summaries.values()} == {5}
    assert min(top1['tuned'], top1['decayed']) >= top1['scratch'] + 10., top1
    assert summaries['from_file'] == summaries['decayed']
    # The mean over the optimizer's groups, which layer decay makes smaller.
    rate = {name: rows[0]['lr'] for name, rows in summaries.items()}
    assert rate['decayed'] < rate['tuned'] == rate['scratch']


@needs_timm_scripts
def test_timms_validate_script_finds_what_its_train_script_saw(timm_runs, shapes, tmp_path):
    """In the form for inference too; it lies beside train.py."""
    script = Path(TIMM_TRAIN_SCRIPT).with_name('validate.py')
    words = [
        '-m', 'timm_dense2net', script, shapes, '--model', MODEL, '--num-classes', '5', '--img-size', '32', '--device',
        'cpu', '-j', '0', '-b', '50', '--checkpoint', timm_runs['decayed'] / 'last.pth.tar']
    plain, fused = tmp_path / 'plain.log', tmp_path / 'fused.log'
    finish_scripts({plain: run_script(plain, *words), fused: run_script(fused, *words, '--reparam')})
    expected = timm_summary(timm_runs['decayed'])[-1]['eval_top1']
    for log in (plain, fused):
        assert json.loads(log.read_text().split('--result')[1])['top1'] == expected, log.read_text()


def test_frozen_stages_stay_as_they_are(runs):
    """Statistics too; what is behind them moves, and the weights load as those of any run."""
    before, after = load_weights(PACKAGED)[0], load_weights(runs['frozen'] / 'last.safetensors')[0]
    frozen = ('features.conv0', 'features.denseblock1', 'features.transition1')
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].to(tensor.dtype))}
    assert not [name for name in moved if name.startswith(frozen)]
    assert {'features.denseblock2.denselayer1.conv1.weight', 'features.norm5.running_mean'} <= moved
    assert load_trained(checkpoint=runs['frozen']).class_names == SHAPES
    groups = read_state(runs['frozen'])['optimizer']['param_groups']
    model = timm.create_model(MODEL)
    trained = [name for name, _ in model.named_parameters() if not name.startswith(frozen)]
    momenta = read_state(runs['frozen'])['optimizer']['state']
    assert len(momenta) == len(trained) and len(groups) == 1


def test_mean_and_std_are_those_of_the_weights(runs):
    metadata = load_weights(PACKAGED)[1]
    expected = [json.loads(metadata[key]) for key in ('mean', 'std')]
    for name in ('tuned', 'frozen'):
        args = yaml.safe_load((runs[name] / 'args.yaml').read_text())
        assert np.allclose([args['mean'], args['std']], expected, atol=1e-6)
    assert yaml.safe_load((runs['scratch'] / 'args.yaml').read_text())['mean'] is None


@pytest.mark.parametrize('name, stem, last', [
    ('test_resnet', 'conv1.0', 'layer4'), ('test_vit', 'patch_embed.proj', 'blocks.5'),
    ('test_efficientnet', 'conv_stem', 'blocks.4'), ('test_convnext', 'stem.0', 'stages.3'),
    ('densenet121_cifar', 'features.conv0', 'features.denseblock4')])
def test_freezing_holds_in_any_timm_model(name, stem, last):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    freeze_stages(model, 1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    size = timm.get_pretrained_cfg(name).input_size
    model.train()(torch.randn(2, *size)).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    moved = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert not [key for key in moved if key.startswith(stem)]
    assert [key for key in moved if key.startswith(last)]
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(before) - len(moved) >= len(frozen) > 0


def test_a_model_without_stages_is_named():
    with pytest.raises(ValueError, match='--freeze-stages: timm does not group the layers of PoolingVisionTransformer'):
        freeze_stages(timm.create_model('pit_ti_224', device='meta'), 1)


def test_mean_and_std_are_those_of_the_weights_that_model_kwargs_name(tmp_path):
    overlay = 'pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}'
    args = parse_args(digits(tmp_path, 'run', '--model', MODEL, '--pretrained', '--model-kwargs', overlay))
    data = build_data(args)
    assert data.mean == (0.1, 0.2, 0.3) and data.std == CIFAR100_STD


def test_the_head_is_kept_for_the_same_classes(tmp_path):
    state_dict, metadata = load_weights(PACKAGED)
    names = json.loads(metadata['class_names'])
    model = timm.create_model(MODEL)
    assert pretrained_overlay(PACKAGED, model, names)['num_classes'] == 100
    assert pretrained_overlay(PACKAGED, model, names[::-1])['num_classes'] == 0
    bare = tmp_path / 'bare.safetensors'
    save_weights(bare, state_dict, {})
    overlay = pretrained_overlay(bare, model, names[::-1])
    assert overlay['num_classes'] == 100 and 'mean' not in overlay
    one, three = (
        timm.create_model(
            MODEL, pretrained=True, in_chans=chans, pretrained_cfg_overlay=overlay)
        for chans in (1, 3))
    assert torch.equal(three.classifier.weight, state_dict['classifier.weight'].float())
    assert torch.allclose(one.features.conv0.weight, three.features.conv0.weight.sum(1, keepdim=True), atol=1e-2)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A run of a tiny model on digits."""
    root = tmp_path_factory.mktemp('tiny')
    process = start(digits(root, 'first', '--lr', '0.05'), root / 'log')
    assert finish(process) == 0, (root / 'log').read_text()
    return root / 'first'


def digits(output, name, *more):
    argv = [
        '--dataset', 'digits', '--img-size', '8', '--model', 'test_resnet', '--epochs', '1', '-b', '256', '--device',
        'cpu', '--output', output, '--experiment', name, *more]
    return [str(item) for item in argv]


def test_goes_on_without_the_weights_it_started_from(tmp_path, tiny):
    """Frozen stages and all; and the run's files do not tell where the weights lay."""
    weights = tmp_path / 'somebody' / 'first.safetensors'
    weights.parent.mkdir()
    weights.write_bytes((tiny / 'last.safetensors').read_bytes())
    more = ['--pretrained-path', weights, '--freeze-stages', '2', '--sched', 'none', '--epochs', '2', '--lr', '0.01']
    for name in ('straight', 'resumed'):
        stop = ['--epochs', '1'] if name == 'resumed' else []
        assert finish(start(digits(tmp_path, name, *more, *stop), tmp_path / f'{name}.log')) == 0
    weights.unlink()
    again = ['--resume', str(tmp_path / 'resumed'), '--epochs', '2']
    assert finish(start(again, tmp_path / 'again.log')) == 0, (tmp_path / 'again.log').read_text()
    assert_same_run(tmp_path / 'straight', tmp_path / 'resumed')
    assert 'somebody' not in json.dumps(load_weights(tmp_path / 'resumed' / 'last.safetensors')[1])
    assert 'somebody' not in (tmp_path / 'resumed' / 'result.json').read_text()


def test_packaged_weights_start_a_model_with_attention(tmp_path):
    """By name; where nothing is learned all but the attention stays as it was."""
    argv = digits(tmp_path, 'run', '--pretrained-path', f'{MODEL}.sprint_40_k12_c100', '--lr', '0', '--model', MODEL)
    assert finish(start([*argv, '--model-kwargs', 'attn_layer=se'], tmp_path / 'log')) == 0
    trained, weights = load_weights(tmp_path / 'run' / 'last.safetensors')[0], load_weights(PACKAGED)[0]
    unlike = [name for name in trained if name not in weights or not torch.equal(trained[name], weights[name].float())]
    learned = [name for name in unlike if 'running_' not in name and not name.endswith('num_batches_tracked')]
    assert learned and all('.attn.' in name or name.startswith('classifier.') for name in learned)
    assert weights.keys() <= trained.keys() and len(trained) - len(weights) == 4 * 18  # two convolutions a layer


def test_an_overlay_is_not_told_to_others(tmp_path, tiny):
    file = str(tiny / 'last.safetensors')
    overlay = f'pretrained_cfg_overlay={dict(file=file, num_classes=10)}'
    process = start(digits(tmp_path, 'run', '--pretrained', '--model-kwargs', overlay), tmp_path / 'log')
    assert finish(process) == 0, (tmp_path / 'log').read_text()
    assert file not in json.dumps(load_weights(tmp_path / 'run' / 'last.safetensors')[1])
    assert file not in (tmp_path / 'run' / 'result.json').read_text()
    assert load_trained(checkpoint=tmp_path / 'run').model.num_classes == 10


def test_weights_of_a_folder_model_need_the_folder_no_more(tmp_path):
    """A model named local-dir: is written as the architecture that it is, with its arguments."""
    model = timm.create_model(MODEL, block_config=(1, 1, 1), num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path / 'somebody'), safe_serialization=True)
    argv = digits(tmp_path, 'run', '--model', f'local-dir:{tmp_path}/somebody', '--pretrained', '--lr', '0')
    assert finish(start(argv, tmp_path / 'log')) == 0, (tmp_path / 'log').read_text()
    assert 'somebody' not in json.dumps(load_weights(tmp_path / 'run' / 'last.safetensors')[1])
    assert json.loads((tmp_path / 'run' / 'result.json').read_text())['model'] == MODEL
    assert 'somebody' not in read_run(tmp_path / 'run').overrides
    trained = load_trained(checkpoint=tmp_path / 'run').model
    assert torch.equal(trained.classifier.weight, model.classifier.weight)


def test_the_tag_of_the_first_weights_is_not_that_of_the_run(tmp_path):
    argv = digits(tmp_path, 'run', '--model', f'{MODEL}.quick_c100', '--pretrained')
    assert finish(start(argv, tmp_path / 'log')) == 0, (tmp_path / 'log').read_text()
    metadata = load_weights(tmp_path / 'run' / 'last.safetensors')[1]
    assert metadata['model'] == json.loads((tmp_path / 'run' / 'result.json').read_text())['model'] == MODEL
    assert json.loads(metadata['args'])['model'] == f'{MODEL}.quick_c100'


@pytest.mark.parametrize('more, words', [
    (['--pretrained-path', 'nowhere'], ['no weights at nowhere']),
    (['--pretrained-path', 'torn.safetensors'], ['torn.safetensors', 'not a whole safetensors file']),
    (['--pretrained-path', 'model.pth'], ['model.pth', 'does not fit test_resnet', 'lacks some, bn1.bias']),
    (['--initial-checkpoint', PACKAGED, '--model', MODEL],
     [f'--initial-checkpoint {PACKAGED} does not fit', 'classifier.weight']),
    (['--pretrained-path', PACKAGED], ['does not fit test_resnet', MODEL, 'lacks some, bn1.bias']),
    (['--pretrained-path', PACKAGED, '--model', 'dense2net121_s4'], ['does not fit dense2net121_s4', MODEL]),
    (['--pretrained-path', f'{MODEL}.nano_c100'], [f'no weights at {MODEL}.nano_c100']),
    (['--pretrained-path', PACKAGED, '--eval-only'], ['--pretrained-path', '--checkpoint']),
    (['--pretrained-path', PACKAGED, '--initial-checkpoint', 'x'], ['--pretrained-path', '--initial-checkpoint']),
    (['--pretrained-path', PACKAGED, '--model', 'hf-hub:owner/net'], ['hf-hub:owner/net', 'architecture']),
    (['--pretrained-path', PACKAGED, '--model-kwargs', 'pretrained_cfg_overlay={}'], ['--pretrained-path', '_cfg']),
    (['--freeze-stages', '1'], ['--freeze-stages 1', '--pretrained-path']),
    (['--freeze-stages', '-1'], ['--freeze-stages', 'at least 0']),
    (['--pretrained', '--model', MODEL, '--freeze-stages', '4'], ['--freeze-stages', 'at most 3', '4']),
])
def test_mistakes_are_one_message(tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'torn.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0{"a":')
    torch.save({}, tmp_path / 'model.pth')
    assert run_here(digits('output', 'run', *more)) in (1, 2)
    error = capsys.readouterr().err
    assert error.count('error: ') == 1 and 'Traceback' not in error
    assert all(word in error for word in words), error
    assert not (tmp_path / 'output').exists()
