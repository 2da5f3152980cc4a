"""A run of a converted model: trained, gone on with, tested, reported, exported and published as any other."""
import csv
import itertools
import json

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from timm.models import save_for_hf
from training_runs import arguments, assert_same_run, run_here

import timm_dense2net  # noqa: F401
from timm_dense2net import evaluate, export, predict, publish, report
from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.convert import METADATA_KEY, conversion_metadata, convert_res2net
from timm_dense2net.counts import count_macs, count_params
from timm_dense2net.package import package_run
from timm_dense2net.trained import load_trained

SCALE = 2


def train(folder, *more, name='run'):
    return run_here(arguments(folder, '--res2net-scale', SCALE, *more, name=name))


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    assert train(folder, '--epochs', 2) == 0
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8))


def test_figures_are_those_of_the_converted_model(output):
    plain = timm.create_model('test_resnet', num_classes=10, device='meta')
    size = count_params(plain), count_macs(plain, (3, 8, 8))
    converted = convert_res2net(plain, SCALE)
    result = json.loads((output / 'run' / 'result.json').read_text())
    assert (result['params'], result['macs']) == (count_params(converted), count_macs(converted, (3, 8, 8)))
    assert result['params'] < size[0] and result['macs'] < size[1] and result['res2net_scale'] == SCALE
    assert yaml.safe_load((output / 'run' / 'args.yaml').read_text())['res2net_scale'] == SCALE
    for name in ('last', 'best'):
        with safe_open(output / 'run' / f'{name}.safetensors', 'pt') as f:
            assert json.loads(f.metadata()[METADATA_KEY]) == converted.res2net_conversion


def test_report_tells_the_converted_run_from_the_plain_one(output, tmp_path, capsys):
    assert run_here(arguments(tmp_path, '--epochs', 1, name='plain')) == 0
    results = tmp_path / 'results.csv'
    assert report.main([str(output / 'run'), str(tmp_path / 'plain'), '--results', str(results)]) == 0
    rows = list(csv.DictReader(results.open()))
    words = {row['run']: row['overrides'].split() for row in rows}
    assert words.keys() == {'plain', 'run'}
    assert f'res2net_scale={SCALE}' in words['run'] and not any('res2net' in word for word in words['plain'])
    assert capsys.readouterr().out.count('`test_resnet`') == 2


def test_resumed_run_is_the_same(output, tmp_path):
    assert train(tmp_path, '--epochs', 1) == 0
    assert run_here(['--resume', tmp_path / 'run', '--epochs', 2]) == 0
    assert_same_run(output / 'run', tmp_path / 'run')


def test_a_run_from_other_layers_goes_on_with_them(tmp_path):
    model = convert_res2net(timm.create_model('test_resnet', num_classes=10), SCALE, act_layer='silu')
    first = tmp_path / 'first.safetensors'
    save_weights(first, model.state_dict(), dict(model='test_resnet', **conversion_metadata(model)))
    begun, whole = (train(tmp_path, '--initial-checkpoint', first, '--epochs', n, name=name)
                    for n, name in ((1, 'begun'), (2, 'whole')))
    assert begun == whole == 0
    assert run_here(['--resume', tmp_path / 'begun', '--epochs', 2]) == 0
    assert_same_run(tmp_path / 'whole', tmp_path / 'begun')
    assert load_trained(None, tmp_path / 'begun').model.res2net_conversion['act_layer'] == 'silu'


def test_evaluated_predicted_and_exported(output, tmp_path, capsys):
    result = json.loads((output / 'run' / 'result.json').read_text())
    run = str(output / 'run')
    assert evaluate.main(['--checkpoint', run, '--dataset', 'digits', '--device', 'cpu']) == 0
    assert f'top-1 {result["test_top1"]:.2f} %' in capsys.readouterr().out
    assert run_here(['--eval-only', '--checkpoint', run, '--dataset', 'digits', '--img-size', 8]) == 0
    assert f'top-1 {result["test_top1"]:.2f}' in capsys.readouterr().out
    Image.new('RGB', (8, 8), (128, 128, 128)).save(tmp_path / 'grey.png')
    assert predict.main([str(tmp_path / 'grey.png'), '--checkpoint', run]) == 0
    trained = load_trained(checkpoint=run)
    # torch.export wants larger images for the net's strides than the digits are.
    trained.data_config['input_size'] = (3, 32, 32)
    parities = export.export_model(trained, tmp_path / 'net.pt2', 'torch-export')
    assert len(parities) == 4 and (tmp_path / 'net.pt2').exists()


@pytest.fixture(scope='module')
def hub_folder(output):
    return publish.write_hub_folder(output / 'run', 'owner/net', output / 'hub')


def test_published_model_loads_by_timm(output, hub_folder):
    expected = logits(load_trained(checkpoint=output / 'run').model)
    model = timm.create_model(f'local-dir:{hub_folder}', pretrained=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(load_trained(f'local-dir:{hub_folder}').model), expected, rtol=0, atol=0)
    other = timm.create_model(f'local-dir:{hub_folder}', pretrained=True, num_classes=3)
    assert other.res2net_conversion['scale'] == SCALE and logits(other).shape == (2, 3)
    backbone = timm.create_model(f'local-dir:{hub_folder}', pretrained=True, features_only=True, out_indices=(1, 2))
    assert [f.shape[1] for f in logits(backbone)] == backbone.feature_info.channels()
    assert 'res2net_converted' not in timm.list_models()  # which sweeps create without arguments
    args = ('--model', f'local-dir:{hub_folder}', '--pretrained', '--epochs', 1)
    assert run_here(arguments(output, *args, name='on')) == 0
    assert run_here(['--resume', output / 'on', '--epochs', 2]) == 0
    again = load_trained(checkpoint=output / 'on').model
    assert again.res2net_conversion == model.res2net_conversion
    assert '`test_resnet`' in (hub_folder / 'README.md').read_text()


def test_training_goes_on_from_converted_weights(output, tmp_path, capsys):
    last = output / 'run' / 'last.safetensors'
    args = ('--initial-checkpoint', last, '--epochs', 1, '--lr', 0)
    assert train(tmp_path, *args) == 0
    weights, before = load_weights(tmp_path / 'run' / 'last.safetensors')[0], load_weights(last)[0]
    # Of a learning rate of 0 nothing but batch norm's statistics changes.
    names = [name for name in before if 'running' not in name and 'num_batches' not in name]
    assert all(torch.equal(weights[name], before[name]) for name in names)
    for scale in ((), ('--res2net-scale', 4)):
        assert run_here(arguments(tmp_path, *args, *scale, name='other')) == 1
        assert f'converted at scale {SCALE}: give --res2net-scale {SCALE}' in capsys.readouterr().err
    assert run_here(arguments(tmp_path, '--pretrained-path', last, name='other')) == 1
    assert f'give --res2net-scale {SCALE}\n' in capsys.readouterr().err


def test_converted_weights_with_another_head(output, tmp_path):
    last = output / 'run' / 'last.safetensors'
    for split, grey in itertools.product(('train', 'val'), (0, 100, 200)):
        (tmp_path / 'data' / split / str(grey)).mkdir(parents=True)
        Image.new('RGB', (8, 8), (grey, grey, 50)).save(tmp_path / 'data' / split / str(grey) / 'image.png')
    argv = ['--dataset', tmp_path / 'data', '--img-size', 8, '-b', 3, '--pretrained-path', output / 'run', '--lr', 0]
    assert train(tmp_path, *argv, '--epochs', 1) == 0
    assert run_here(['--resume', tmp_path / 'run', '--epochs', 2]) == 0
    weights, metadata = load_weights(tmp_path / 'run' / 'last.safetensors')
    before = load_weights(last)[0]
    assert metadata['model'] == 'test_resnet' and weights['fc.weight'].shape[0] == 3
    convs = [name for name in before if '.convs.' in name and name.endswith('weight')]
    assert convs and all(torch.equal(weights[name], before[name]) for name in convs)
    assert load_trained(None, tmp_path / 'run').model.res2net_conversion['scale'] == SCALE


def test_random_layers_are_not_frozen(output, tmp_path, capsys):
    freeze = ('--freeze-stages', 1, '--epochs', 1, '--initial-checkpoint')
    assert run_here(arguments(tmp_path, '--epochs', 1, name='plain')) == 0
    assert train(tmp_path, *freeze, tmp_path / 'plain' / 'last.safetensors') == 1
    assert '--freeze-stages keeps weights as they are' in capsys.readouterr().err
    assert train(tmp_path, *freeze, output / 'run' / 'last.safetensors') == 0


def test_pretrained_weights_are_converted(tmp_path):
    model = timm.create_model('test_resnet')
    save_for_hf(model, str(tmp_path / 'hub'), safe_serialization=True)
    source = f'local-dir:{tmp_path / "hub"}'
    assert train(tmp_path, '--epochs', 1, '--lr', 0, '--model', source, '--pretrained') == 0
    weights, metadata = load_weights(tmp_path / 'run' / 'last.safetensors')
    replaced = json.loads(metadata[METADATA_KEY])['replaced']
    assert replaced
    kept = [
        name for name, _ in model.named_parameters()
        if name.startswith('layer') and name.removesuffix('.weight') not in replaced]
    assert all(torch.equal(weights[name], model.get_parameter(name)) for name in kept) and len(kept) > 10


@pytest.mark.parametrize('args, code, message', [
    (('--res2net-scale', 1), 2, '--res2net-scale must be at least 2, got 1'),
    (('--res2net-scale', 2, '--model', 'test_vit', '--img-size', 160), 1, 'can be replaced at scale 2 (it has none)'),
    (('--res2net-scale', 7), 1, 'test_resnet: no 3x3 convolution of ResNet can be replaced at scale 7 ('),
])
def test_errors(args, code, message, tmp_path, capsys):
    assert run_here(arguments(tmp_path, *args)) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: ') and message in error
    assert not list(tmp_path.iterdir())


def test_another_scale_is_refused_when_a_run_goes_on(output, capsys):
    assert run_here(['--resume', output / 'run', '--res2net-scale', 4]) == 2
    assert f'was started with res2net_scale {SCALE}, it cannot go on with 4' in capsys.readouterr().err


def test_converted_weights_are_not_packaged(tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    save_weights(run / 'last.safetensors', {}, {'model': 'resnet18', 'num_classes': '100', METADATA_KEY: '{}'})
    with pytest.raises(ValueError, match='converted resnet18'):
        package_run(run, 'quick')
