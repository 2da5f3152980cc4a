"""Files of weights: what goes in comes out, damage is known, nothing runs when they are read."""
import argparse
import json
import os
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3

from timm_dense2net.checkpoint import load_metadata, load_weights, save_weights
from timm_dense2net.cifar import CIFAR100_STD
from timm_dense2net.trained import load_trained


@pytest.mark.parametrize('ema', [False, True])
def test_a_checkpoint_of_timms_train_is_weights(tmp_path, ema):
    model_args = dict(act_layer='silu', global_pool='max')
    model, averaged = (timm.create_model('dense2net40_k12_s4', num_classes=10, **model_args) for _ in range(2))
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), lr=0.1),
        argparse.Namespace(
            model='dense2net40_k12_s4', model_kwargs=dict(act_layer='silu'), gp='max', img_size=48, input_size=None,
            mean=[0.1, 0.2, 0.3], std=None, crop_pct=0.9, interpolation=''),
        ModelEmaV3(averaged) if ema else None, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0)
    path = tmp_path / 'last.pth.tar'
    weights, metadata = load_weights(path)
    assert metadata == load_metadata(path) and metadata['model'] == 'dense2net40_k12_s4'
    assert json.loads(metadata['model_args']) == model_args
    expected = (averaged if ema else model).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = (averaged if ema else model).eval()(x)
        trained = load_trained(checkpoint=path)
        assert torch.equal(trained.model(x), logits)
    config = trained.data_config
    assert (config['input_size'], config['mean'], config['crop_pct']) == ((3, 48, 48), (0.1, 0.2, 0.3), 0.9)
    assert config['std'] == CIFAR100_STD and config['interpolation'] == 'bicubic'


@pytest.mark.parametrize('saved', [{}, {'arch': 'dense2net'}])  # as timm's CheckpointSaver calls it without arguments
def test_a_file_that_names_no_model(tmp_path, saved):
    path = tmp_path / 'model.pth'
    torch.save(saved | {'state_dict': {'a': torch.ones(1)}}, path)
    assert load_weights(path) == ({'a': torch.ones(1)}, {})


def test_arguments_that_are_not_of_timms_train_are_left_alone(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save({'args': {'lr': 1}, 'state_dict': {'a': torch.ones(1)}}, path)
    assert load_weights(path) == ({'a': torch.ones(1)}, {})


def test_a_checkpoint_of_another_layout_is_named(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save({'epoch': 3, 'net': {'a': torch.ones(1)}}, path)
    with pytest.raises(ValueError, match='model.pth: no state dict.*epoch, net are no tensors'):
        load_weights(path)


def test_a_file_in_the_format_before_torch_16(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save({'state_dict': {'module.a': torch.ones(1)}}, path, _use_new_zipfile_serialization=False)
    assert load_weights(path) == ({'a': torch.ones(1)}, {})
    assert load_metadata(path) == {}


def test_names_without_the_prefixes_of_wrapped_models(tmp_path):
    path = tmp_path / 'model.safetensors'
    save_weights(path, {'_orig_mod.module.a': torch.ones(1)}, {})
    assert load_weights(path)[0] == {'a': torch.ones(1)}


@pytest.mark.parametrize('content', ['object', 'torn', 'archive', 'misnamed'])
def test_torch_files_without_weights(tmp_path, content):
    path = tmp_path / ('model.safetensors' if content == 'misnamed' else 'model.pth')
    torch.save(Path('somewhere') if content == 'object' else {'a': torch.ones(100)}, path)
    if content == 'torn':
        path.write_bytes(path.read_bytes()[:600])
    if content == 'archive':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('notes.txt', 'no weights')
    for load in (load_weights, load_metadata):
        with pytest.raises(ValueError, match=f'{path.name}: no weights that torch reads'):
            load(path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='no weights'):
        load_weights(tmp_path / 'nothing')


def test_weights_are_read_by_timm(tmp_path):
    model, other = (timm.create_model('dense2net40_k12_s4', num_classes=10) for _ in range(2))
    model = model.to(memory_format=torch.channels_last)
    path = tmp_path / 'weights.safetensors'
    save_weights(path, model.state_dict(), {'model': 'dense2net40_k12_s4'})
    weights, metadata = load_weights(path)
    assert metadata == {'model': 'dense2net40_k12_s4', 'format': 'pt'}
    load_checkpoint(other, str(path))
    for read in (weights, other.state_dict()):
        assert read.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.items())


def test_no_code_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'sprung'),)

    path = tmp_path / 'model.pth'
    torch.save({'state_dict': Trap()}, path)
    for load in (load_weights, load_metadata):
        with pytest.raises(ValueError, match='weights_only'):
            load(path)
    assert not (tmp_path / 'sprung').exists()
