"""The export command: ONNX and torch.export files, held to the model on other batch and image sizes than exported."""
import hashlib
import json
import os
import subprocess
import sys
import zipfile

import pytest
import timm
import torch

import timm_dense2net
from timm_dense2net.checkpoint import load_weights, save_weights
from timm_dense2net.export import ExportError, check_parity, main
from timm_dense2net.trained import load_trained

MODEL = 'dense2net40_k12_s4'
NAMES = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox']
VARIANTS = {
    'plain': dict(block_config=(2, 1)),
    'se_grouped': dict(block_config=(1, 1, 1), attn_layer='se', cardinality=3),
}
SHAPES = [(1, 3, 32, 32), (7, 3, 32, 32), (2, 3, 45, 19), (3, 3, 96, 64)]


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_random(path, seed=0, **model_args):
    """Weights as after training: the statistics of the norms are not 0 and 1."""
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, num_classes=len(NAMES), **model_args)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 2)
            torch.nn.init.normal_(module.weight)  # of both signs
            torch.nn.init.normal_(module.bias)
    save_weights(path, model.state_dict(), dict(
        model=MODEL, model_args=json.dumps(model_args), input_size='[3, 32, 32]', mean='[0.5, 0.4, 0.3]',
        std='[0.3, 0.2, 0.1]', class_names=json.dumps(NAMES)))
    return path


@pytest.fixture
def weights(variant, tmp_path_factory):
    return save_random(tmp_path_factory.mktemp(variant) / 'last.safetensors', **VARIANTS[variant])


def assert_same_logits(model, forward):
    for seed, shape in enumerate(SHAPES):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = model(images)
        assert expected.std() > 0.01
        torch.testing.assert_close(forward(images), expected, atol=1e-4, rtol=1e-4)


def check_metadata(metadata, fused):
    assert metadata['model'] == MODEL
    assert metadata['class_names'] == NAMES
    assert metadata['input_size'] == [3, 32, 32]
    assert metadata['mean'] == [0.5, 0.4, 0.3]
    assert metadata['std'] == [0.3, 0.2, 0.1]
    assert metadata['interpolation'] == 'bicubic'
    assert metadata['fused'] is fused


# Between them the two formats see both variants in both forms.
@pytest.mark.parametrize('variant, fuse', [('plain', True), ('se_grouped', False)])
def test_onnx(weights, fuse, tmp_path, capfd):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    assert main(['--checkpoint', str(weights), '--output', str(path), *['--fuse'] * fuse]) == 0
    assert [item.name for item in tmp_path.iterdir()] == ['model.onnx']

    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    assert session.get_outputs()[0].shape == ['batch', len(NAMES)]
    assert_same_logits(
        load_trained(checkpoint=weights).model,
        lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0]))
    properties = session.get_modelmeta().custom_metadata_map
    check_metadata({k: v if k in ('model', 'interpolation', 'crop_mode', 'timm_dense2net') else json.loads(v)
                    for k, v in properties.items()}, fuse)

    out = capfd.readouterr().out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in out
    assert '1x3x32x32' in out and '2x3x33x63' in out
    assert 'PyTorch fused' in out and 'ONNX Runtime' in out
    assert '[torch.onnx]' not in out
    times = [line.split() for line in out.splitlines() if ' ms (' in line]
    assert [row[0] for row in times] == ['1', '8']
    assert all(float(value) > 0 for row in times for value in row[1::3])


# Runs where this package is not: what the file needs is PyTorch alone.
ALONE = '''
import json, sys, torch
files = {'metadata.json': ''}
model = torch.export.load(sys.argv[1], extra_files=files).module()
cases = torch.load(sys.argv[2], weights_only=True)
for images, logits in cases:
    torch.testing.assert_close(model(images), logits, atol=1e-4, rtol=1e-4)
assert not any(name.startswith('timm') for name in sys.modules)
print(files['metadata.json'])
'''


def test_a_net_without_an_inference_form_is_not_called_fused(tmp_path):
    weights, path = save_random(tmp_path / 'last.safetensors', block_config=(1,), act_layer='silu'), tmp_path / 'x.pt2'
    assert main(['--checkpoint', str(weights), '--format', 'torch-export', '--output', str(path), '--fuse']) == 0
    files = {'metadata.json': ''}
    torch.export.load(path, extra_files=files)
    check_metadata(json.loads(files['metadata.json']), False)


@pytest.mark.parametrize('variant, fuse', [('plain', False), ('se_grouped', True)])
def test_torch_export(weights, fuse, tmp_path):
    path = tmp_path / 'model.pt2'
    assert main([
        '--checkpoint', str(weights), '--format', 'torch-export', '--output', str(path), *['--fuse'] * fuse]) == 0

    model = load_trained(checkpoint=weights).model
    with torch.no_grad():
        cases = [(images, model(images)) for images in map(torch.randn, SHAPES)]
    torch.save(cases, tmp_path / 'cases.pt')
    result = subprocess.run(
        [sys.executable, '-c', ALONE, str(path), str(tmp_path / 'cases.pt')],
        capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    check_metadata(json.loads(result.stdout), fuse)
    assert_no_pickle(path)


def assert_no_pickle(path):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        configs = [json.loads(archive.read(name)) for name in names if name.endswith('_config.json')]
        samples = [archive.read(name) for name in names if '/sample_inputs/' in name]
    assert len(configs) == 2 and any(config['config'] for config in configs)
    assert not any(tensor['use_pickle'] for config in configs for tensor in config['config'].values())
    assert not any(samples)


def torch_export(weights, output, *args):
    return main(['--checkpoint', str(weights), '--format', 'torch-export', '--output', str(output), *args])


def test_export_that_cannot_be_compared_leaves_no_file(tmp_path, capsys):
    # A variance below zero, as of a file that was altered: the logits are no numbers.
    weights = save_random(tmp_path / 'bad.safetensors', block_config=(1,))
    trained = load_trained(checkpoint=weights)
    state = trained.model.state_dict()
    state['features.norm5.running_var'][0] = -1.
    save_weights(weights, state, dict(trained.metadata))
    output = tmp_path / 'out' / 'model.pt2'
    output.parent.mkdir()
    output.write_bytes(b'the one before')
    assert torch_export(weights, output) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: the PyTorch model gives logits that are not finite for images of shape 1x3x32x32')
    assert output.read_bytes() == b'the one before'
    assert os.listdir(output.parent) == ['model.pt2']


def test_forms_may_differ_by_rounding_alone():
    model = timm.create_model(MODEL, block_config=(1, 1)).eval()
    with torch.no_grad():
        list(check_parity(model, lambda x: model(x) * (1 + 3e-5), (3, 32, 32)))
        with pytest.raises(ExportError, match='differs from the PyTorch model by'):
            list(check_parity(model, lambda x: model(x) * (1 + 3e-4), (3, 32, 32)))


def test_export_that_takes_fewer_sizes_leaves_no_file(tmp_path, monkeypatch, capsys):
    # Three transitions leave two pixels of 16 and one of 12.
    weights = save_random(tmp_path / 'small.safetensors', block_config=(1, 1, 1, 1))
    state, metadata = load_weights(weights)
    save_weights(weights, state, {**metadata, 'input_size': '[3, 16, 16]'})
    output = tmp_path / 'out' / 'model.pt2'
    output.parent.mkdir()
    assert torch_export(weights, output, '--fuse') == 0
    assert '1x3x16x16' in capsys.readouterr().out
    output.unlink()
    monkeypatch.setattr(timm_dense2net.export, '_parity_shapes', lambda *_: [(1, 3, 12, 16)])
    assert torch_export(weights, output, '--fuse') == 1
    err = capsys.readouterr().err
    assert err.startswith('error: the exported model does not take images of shape 1x3x12x16') and err.count('\n') == 1
    assert not os.listdir(output.parent)


def test_a_model_of_one_size_is_refused(tmp_path, capsys):
    save_weights(tmp_path / 'W', timm.create_model('test_vit').state_dict(), dict(model='test_vit'))
    assert main(['--checkpoint', str(tmp_path / 'W'), '--output', str(tmp_path / 'x.onnx')]) == 1
    assert 'takes images of one size only' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['W']


@pytest.mark.parametrize('args, code, message', [
    (['--output', 'x.onnx'], 2, 'name a model or a checkpoint'),
    (['--model', 'dense2net121_s99', '--output', 'x.onnx'], 2, 'dense2net121_s99'),
    (['--checkpoint', 'nowhere', '--output', 'x.onnx'], 2, 'nowhere'),
    (['--checkpoint', 'W', '--output', 'x.pt2'], 1, "x.pt2: files of --format onnx end in '.onnx'"),
])
def test_wrong_calls_give_one_line(args, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_random(tmp_path / 'W', block_config=(1,))
    assert main(args) == code
    err = capsys.readouterr().err
    assert err.startswith('error: ') and message in err and err.count('\n') == 1
    assert os.listdir(tmp_path) == ['W']


