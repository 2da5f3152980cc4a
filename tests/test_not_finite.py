"""Weights that are not numbers, or give none, are refused wherever they are read: no figure is made of them."""
import math

import pytest
import timm
import torch
from PIL import Image
from training_runs import arguments, run_here

from timm_dense2net.__main__ import main
from timm_dense2net.checkpoint import save_weights

MODEL = 'dense2net40_k12_s4'


def save_broken(path, name, value, model=MODEL):
    weights = timm.create_model(model, num_classes=10).state_dict()
    weights[name].view(-1)[0] = value
    save_weights(path, weights, dict(model=model, model_args='{}', num_classes='10'))
    return path


def assert_refused(code, capsys, *words):
    out, err = capsys.readouterr()
    assert code in (1, 2) and not out
    assert err.count('error: ') == 1 and 'Traceback' not in err
    assert all(word in err for word in words), err


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('command', [
    ['predict', 'picture.png', '--checkpoint'],
    ['evaluate', '--dataset', 'digits', '--checkpoint'],
    ['export', '--output', 'model.onnx', '--checkpoint'],
    ['enlarge', '--model', 'dense2net121d_s4', '--output', 'large.safetensors'],
])
def test_commands_refuse_weights_that_are_not_finite(tmp_path, monkeypatch, capsys, command, value):
    monkeypatch.chdir(tmp_path)
    save_broken('weights.safetensors', 'features.norm5.bias', value)
    Image.new('RGB', (32, 32)).save('picture.png')
    assert_refused(
        main([*command, 'weights.safetensors']), capsys,
        'weights.safetensors: features.norm5.bias holds values that are not finite')
    assert {path.name for path in tmp_path.iterdir()} == {'weights.safetensors', 'picture.png'}


@pytest.mark.parametrize('option', ['--pretrained-path', '--initial-checkpoint', '--kd-pretrained-path'])
def test_training_does_not_begin_with_them(tmp_path, capsys, option):
    weights = save_broken(tmp_path / 'weights.safetensors', 'bn1.bias', math.nan, 'test_resnet')
    code = run_here(arguments(tmp_path / 'output', option, weights))
    assert_refused(code, capsys, 'weights.safetensors: bn1.bias holds values that are not finite')
    assert not (tmp_path / 'output').exists()


def test_nor_does_it_evaluate_them(tmp_path, capsys):
    weights = save_broken(tmp_path / 'weights.safetensors', 'bn1.bias', math.nan, 'test_resnet')
    assert_refused(
        run_here(['--eval-only', '--checkpoint', weights, '--dataset', 'digits']), capsys, 'bn1.bias holds values')


def test_pretrained_weights_are_looked_at_too(tmp_path, capsys):
    model = timm.create_model('test_resnet', num_classes=10)
    torch.nn.init.constant_(model.bn1.bias, math.nan)
    timm.models.save_for_hf(model, str(tmp_path / 'folder'), safe_serialization=True)
    name = f'local-dir:{tmp_path}/folder'
    assert_refused(
        main(['evaluate', '--model', name, '--pretrained', '--dataset', 'digits']), capsys, name, 'bn1.bias holds')
    assert_refused(
        run_here(arguments(tmp_path / 'output', '--model', name, '--pretrained')), capsys, name, 'bn1.bias holds')


@pytest.mark.parametrize('command, words', [
    (['predict', 'picture.png'], ['weights.safetensors: probabilities are not finite']),
    (['evaluate', '--dataset', 'digits'], ['the logits of 360 of 360 images are not finite']),
])
def test_finite_weights_that_give_no_numbers(tmp_path, monkeypatch, capsys, command, words):
    """A variance below zero, as of a file that was altered."""
    monkeypatch.chdir(tmp_path)
    save_broken('weights.safetensors', 'features.norm5.running_var', -1.)
    Image.new('RGB', (32, 32)).save('picture.png')
    assert_refused(main([*command, '--checkpoint', 'weights.safetensors']), capsys, *words)
    assert {path.name for path in tmp_path.iterdir()} == {'weights.safetensors', 'picture.png'}


def test_the_trainers_evaluation_of_them(tmp_path, capsys):
    weights = save_broken(tmp_path / 'weights.safetensors', 'features.norm5.running_var', -1.)
    assert_refused(
        run_here(['--eval-only', '--checkpoint', weights, '--dataset', 'digits']), capsys, 'the test loss is nan')
