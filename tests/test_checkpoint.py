"""Files of weights and training states: what goes in comes out, damage is known, nothing runs when they are read."""
import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3

from timm_dense2net.checkpoint import (
    CHECKPOINT_FILE, PREVIOUS_FILE, CorruptCheckpointError, dump_state, load_metadata, load_state, load_weights,
    read_state_bytes, save_state, save_weights)
from timm_dense2net.cifar import CIFAR100_STD
from timm_dense2net.rng import rng_state, set_rng_state
from timm_dense2net.trained import load_trained

STATE = dict(
    weights={
        'a': torch.randn(3, 4), 'half': torch.randn(5).bfloat16(), 'count': torch.tensor(7), 'none': torch.empty(0)},
    optimizer={'state': {0: {'momentum': torch.randn(2, 2)}, 1: {}}, 'betas': (0.9, 0.999)},
    text='x', nothing=None, yes=True, infinite=float('inf'), tenth=0.1, dtype=torch.bfloat16, items=[1, [2, {'b': 3}]])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_state_comes_back_as_it_was():
    assert same(load_state(dump_state(STATE)), STATE)


def test_tied_and_transposed_tensors():
    weight = torch.randn(4, 3)
    state = dict(a=weight, b=weight, c=weight.t(), d=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert same(load_state(dump_state(state)), state)


def test_what_cannot_be_saved_is_named():
    with pytest.raises(TypeError, match=r'state\.a\.0: a object cannot be saved'):
        dump_state({'a': [object()]})


def test_every_altered_byte_is_noticed():
    data = dump_state(STATE)
    for position in range(0, len(data), 7):
        altered = bytearray(data)
        altered[position] ^= 4
        try:
            changed = load_state(bytes(altered))
        except CorruptCheckpointError:
            continue
        # Only padding may change: the state is the same.
        assert same(changed, STATE), f'byte {position}'


@pytest.mark.parametrize('length', [0, 4, 100, -1])
def test_every_cut_is_noticed(length):
    with pytest.raises(CorruptCheckpointError):
        load_state(dump_state(STATE)[:length])


def test_other_safetensors_files_are_no_states():
    for metadata in (None, {'model': 'resnet18'}):
        with pytest.raises(CorruptCheckpointError, match='no training state, but a file of weights'):
            load_state(safetensors.torch.save({'a': torch.ones(1)}, metadata))


@pytest.mark.parametrize('load', [load_weights, load_metadata])
def test_a_training_state_is_no_weights(tmp_path, load):
    with pytest.raises(ValueError, match='is a training state, for --resume; last.safetensors'):
        load(save_state(tmp_path, STATE))


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


def test_no_code_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'sprung'),)

    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CorruptCheckpointError):
        read_state_bytes(tmp_path)
    with pytest.raises(ValueError, match='not a whole safetensors file'):
        load_weights(path)
    assert not (tmp_path / 'sprung').exists()


def test_the_state_before_is_kept_and_used(tmp_path, caplog):
    assert read_state_bytes(tmp_path) is None
    for number in range(3):
        save_state(tmp_path, {'number': number})
    assert load_state(read_state_bytes(tmp_path)) == {'number': 2}
    assert load_state(read_state_bytes(tmp_path / PREVIOUS_FILE)) == {'number': 1}
    assert sorted(os.listdir(tmp_path)) == sorted((CHECKPOINT_FILE, PREVIOUS_FILE))
    (tmp_path / CHECKPOINT_FILE).write_bytes(b'torn')
    assert load_state(read_state_bytes(tmp_path)) == {'number': 1}
    assert 'using checkpoint-prev.safetensors instead' in caplog.text
    (tmp_path / PREVIOUS_FILE).write_bytes(b'torn')
    with pytest.raises(CorruptCheckpointError, match=f'{CHECKPOINT_FILE}.*{PREVIOUS_FILE}'):
        read_state_bytes(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='no run folder or checkpoint'):
        read_state_bytes(tmp_path / 'nothing')
    with pytest.raises(FileNotFoundError, match='no weights'):
        load_weights(tmp_path / 'nothing')


def test_weights_are_read_by_timm(tmp_path):
    model, other = (timm.create_model('dense2net40_k12_s4', num_classes=10) for _ in range(2))
    model = model.to(memory_format=torch.channels_last)
    path = tmp_path / 'weights.safetensors'
    save_weights(path, model.state_dict(), {'model': 'dense2net40_k12_s4'})
    weights, metadata = load_weights(path)
    assert metadata == {'model': 'dense2net40_k12_s4', 'format': 'pt'} and same(weights, dict(model.state_dict()))
    load_checkpoint(other, str(path))
    assert same(dict(other.state_dict()), weights)


def test_failed_write_leaves_the_file_and_nothing_else(tmp_path, monkeypatch):
    save_state(tmp_path, {'number': 1})
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()

    def fail(descriptor):
        raise OSError(28, os.strerror(28))
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='No space left on device'):
        save_state(tmp_path, {'number': 2})
    assert os.listdir(tmp_path) == [CHECKPOINT_FILE] and (tmp_path / CHECKPOINT_FILE).read_bytes() == before


def test_random_states_go_on_where_they_were():
    import random

    import numpy as np

    def draw():
        return [
            torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss(0, 1)]

    device = torch.device('cpu')
    random.gauss(0, 1), np.random.randn()  # leaves half a pair of normal numbers behind
    state = load_state(dump_state(rng_state(device)))
    first, second = draw(), draw()
    set_rng_state(state, device)
    assert [draw(), draw()] == [first, second]
