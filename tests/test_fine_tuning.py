"""Weights of one image folder help on another, with other classes and sizes, against a start from nothing."""
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from training_runs import run_here

from timm_dense2net.checkpoint import load_weights

MODEL_KWARGS = ['--model-kwargs', 'block_config=(2,2,2)']
SOURCE_CLASSES = ('disc', 'down', 'frame', 'ring', 'saltire', 'square')
TARGET_CLASSES = ('cross', 'up')


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


def train(data, output, name, *more):
    """Trains a run; returns its folder."""
    argv = [
        '--dataset', data, '--output', output, '--experiment', name, '--device', 'cpu', '--model', 'dense2net40_k12_s4',
        *MODEL_KWARGS, '--opt', 'sgd', '--sched', 'cosine', '--sched-on-updates', '--early-stop-patience', '0',
        '--hflip', '0', '--crop-padding', '2', *more]
    assert run_here(argv) == 0
    return output / name


def top1_of(run):
    return json.loads((run / 'result.json').read_text())['test_top1']


@pytest.fixture(scope='module')
def source_run(tmp_path_factory):
    """Six shapes on square pictures."""
    root = tmp_path_factory.mktemp('source')
    data = write_folder(root / 'data', SOURCE_CLASSES, 64, 8, (32, 32), seed=1)
    run = train(data, root, 'run', '--img-size', '24', '--epochs', '10', '-b', '24', '--lr', '0.1')
    assert top1_of(run) > 80.
    return run


@pytest.fixture(scope='module')
def target_data(tmp_path_factory):
    """Ten training pictures each of two other shapes, of another size and not square."""
    return write_folder(tmp_path_factory.mktemp('target') / 'data', TARGET_CLASSES, 10, 30, (48, 40), seed=2)


def from_weights(run):
    """Options that start a run from another's weights, whose classes are not the same."""
    overlay = dict(file=str(run / 'last.safetensors'), num_classes=len(SOURCE_CLASSES))
    return ['--pretrained', *MODEL_KWARGS, f'pretrained_cfg_overlay={overlay}']


def test_weights_beat_a_start_from_nothing(tmp_path, source_run, target_data):
    budget = ['--img-size', '28', '--epochs', '5', '-b', '10', '--lr', '0.05']
    scratch = top1_of(train(target_data, tmp_path, 'scratch', *budget))
    tuned = top1_of(train(target_data, tmp_path, 'tuned', *budget, *from_weights(source_run)))
    decayed = top1_of(
        train(target_data, tmp_path, 'decayed', *budget, *from_weights(source_run), '--layer-decay', '0.7'))
    assert min(tuned, decayed) >= max(75., scratch + 10.), f'scratch {scratch}, tuned {tuned}, decayed {decayed}'


def test_all_but_the_classifier_is_taken_over(tmp_path, source_run, target_data):
    """At a learning rate of zero nothing moves, but for the classifier, which is new and has two classes."""
    run = train(
        target_data, tmp_path, 'still', '--img-size', '28', '--epochs', '1', '-b', '20', '--lr', '0',
        *from_weights(source_run))
    before, after = (load_weights(path / 'last.safetensors')[0] for path in (source_run, run))
    assert after['classifier.weight'].shape[0] == len(TARGET_CLASSES)
    model = timm.create_model('dense2net40_k12_s4', block_config=(2, 2, 2))
    for name, _ in model.named_parameters():
        assert name.startswith('classifier.') or torch.equal(before[name], after[name]), name
