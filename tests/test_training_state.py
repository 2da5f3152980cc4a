"""Training states: what goes in comes out, damage is known, nothing runs when they are read."""
import hashlib
import io
import os
import pickle

import pytest
import torch

from timm_dense2net.rng import rng_state, set_rng_state
from timm_dense2net.training_state import (
    CHECKPOINT_FILE, PREVIOUS_FILE, CorruptCheckpointError, dump_state, load_state, read_state_bytes, save_state)

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


def test_tensors_keep_their_layout():
    state = load_state(dump_state({'number': 0, 'x': torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}))
    assert state['x'].is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_read_again_is_told_when_it_is_saved(tmp_path):
    with pytest.raises(TypeError, match='cannot hold builtins.object'):
        save_state(tmp_path, {'number': 0, 'a': object()})
    assert not os.listdir(tmp_path)


def test_every_altered_byte_is_noticed():
    data = dump_state(STATE)
    for position in range(0, len(data), 7):
        altered = bytearray(data)
        altered[position] ^= 4
        with pytest.raises(CorruptCheckpointError):
            load_state(bytes(altered))


@pytest.mark.parametrize('length', [0, 4, 100, -1])
def test_every_cut_is_noticed(length):
    with pytest.raises(CorruptCheckpointError):
        load_state(dump_state(STATE)[:length])


def test_weights_are_no_state(tmp_path):
    torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'model.pth')
    with pytest.raises(CorruptCheckpointError, match='torn, altered or no training state'):
        load_state((tmp_path / 'model.pth').read_bytes())


def test_no_code_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'sprung'),)

    file = io.BytesIO()
    torch.save({'number': Trap()}, file)
    with pytest.raises(pickle.UnpicklingError):
        load_state(file.getvalue() + hashlib.sha256(file.getvalue()).digest())
    assert not (tmp_path / 'sprung').exists()


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='no run folder or checkpoint'):
        read_state_bytes(tmp_path / 'nothing')


def test_the_state_before_is_kept_and_used(tmp_path, caplog):
    assert read_state_bytes(tmp_path) is None
    for number in range(3):
        save_state(tmp_path, {'number': number})
    assert load_state(read_state_bytes(tmp_path)) == {'number': 2}
    assert load_state(read_state_bytes(tmp_path / PREVIOUS_FILE)) == {'number': 1}
    assert sorted(os.listdir(tmp_path)) == sorted((CHECKPOINT_FILE, PREVIOUS_FILE))
    (tmp_path / CHECKPOINT_FILE).write_bytes(b'torn')
    assert load_state(read_state_bytes(tmp_path)) == {'number': 1}
    assert 'using checkpoint-prev.pth.tar instead' in caplog.text
    (tmp_path / PREVIOUS_FILE).write_bytes(b'torn')
    with pytest.raises(CorruptCheckpointError, match=f'{CHECKPOINT_FILE}.*{PREVIOUS_FILE}'):
        read_state_bytes(tmp_path)


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
    state = load_state(dump_state({'number': 0, 'rng': rng_state(device)}))['rng']
    first, second = draw(), draw()
    set_rng_state(state, device)
    assert [draw(), draw()] == [first, second]
