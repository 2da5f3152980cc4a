"""Data sets, their faults, and the batches made of them."""
import functools
import hashlib
import http.server
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_dense2net.augment import AugmentConfig, ProgressiveResize
from timm_dense2net.cifar import CIFAR100_CLASSES
from timm_dense2net.data import (
    _KNOWN_STATS, check_images, check_splits_agree, load_images, open_dataset)
from timm_dense2net.images import ImageArrays, ImageReader, dataset_stats, hold_out_split
from timm_dense2net.loader import BatchLoader

CIFAR100 = os.path.join(os.path.dirname(__file__), '..', '..', 'shared', 'cifar100')
STATS = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
EVERYTHING = AugmentConfig(auto_augment='cifar10', cutout_holes=1, mixup=0.2, cutmix=1., smoothing=0.1)


def make_arrays(count=50, classes=10, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageArrays(images, torch.arange(count) % classes, tuple(str(i) for i in range(classes)))


def make_loader(arrays, batch_size=10, **kwargs):
    return BatchLoader(arrays, batch_size, **{**dict(device='cpu', train=True, **STATS), **kwargs})


def write_folder(root, classes=('cat', 'dog'), count=3, size=(12, 12), splits=('train', 'val'), seed=0):
    rng = np.random.default_rng(seed)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{index}.png')
    return str(root)


def normalized(arrays):
    mean, std = (torch.tensor(STATS[name]).view(3, 1, 1) for name in ('mean', 'std'))
    return (arrays.images / 255. - mean) / std


def assert_same_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


# Data sets


def test_digits_split_is_whole_stratified_and_fixed():
    sklearn_datasets = pytest.importorskip('sklearn.datasets')
    train, test = load_images('digits', 'train'), load_images('digits', 'test')
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (3, 32, 32) and train.images.dtype == torch.uint8
    assert train.class_names == test.class_names == tuple('0123456789')
    share = torch.bincount(test.labels) / (torch.bincount(test.labels) + torch.bincount(train.labels))
    assert (share - 0.2).abs().max() < 0.005
    assert torch.equal(load_images('digits', 'test').images, test.images)

    # Decoding at the digits' own size leaves them as they are, so the two parts can be compared with the source.
    parts = [load_images('digits', split, img_size=8).images[:, 0] for split in ('train', 'test')]
    got = torch.cat(parts).flatten(1).numpy()
    source = np.rint(sklearn_datasets.load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, got)) == sorted(map(bytes, source))


def test_image_folder(tmp_path):
    root = write_folder(tmp_path, splits=('train', 'val'))
    train = load_images(root, 'train')
    assert train.images.shape == (6, 3, 12, 12) and train.images.is_contiguous()
    assert train.class_names == ('cat', 'dog') and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(tmp_path / 'train' / 'dog' / '1.png')).transpose(2, 0, 1)
    assert np.array_equal(train.images[4].numpy(), expected)
    test = load_images('', 'test', data_dir=root)
    assert not torch.equal(test.images, train.images)


def test_classes_of_a_folder_have_one_order(tmp_path):
    """In every process, where timm's depends on the hashes of the names."""
    code = '''
import sys
from timm_dense2net.data import open_dataset
print(list(open_dataset(sys.argv[1], 'train').reader.class_to_idx.items()))'''
    root = write_folder(tmp_path, ('10', '1', '01', '001'), 1, splits=('train',))
    orders = {
        subprocess.run(
            [sys.executable, '-c', code, root], env=os.environ | dict(PYTHONHASHSEED=seed), check=True,
            capture_output=True, text=True).stdout for seed in '012'}
    assert orders == {"[('001', 0), ('01', 1), ('1', 2), ('10', 3)]\n"}


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
def test_class_names_are_text(tmp_path):
    root = write_folder(tmp_path, ('a', os.fsdecode(b'\xff')))
    with pytest.raises(ValueError, match=r"the name of class '\\udcff' is not UTF-8; rename it"):
        load_images(root, 'train')


def test_one_class_is_not_enough(tmp_path):
    root = write_folder(tmp_path, ('a',))
    with pytest.raises(ValueError, match="train: has one class only, 'a'; there must be two or more"):
        load_images(root, 'train')


def test_an_image_lies_in_a_folder_of_its_class_alone(tmp_path):
    root = write_folder(tmp_path)
    stray = tmp_path / 'train' / 'stray.png'
    Image.new('RGB', (12, 12)).save(stray)
    with pytest.raises(ValueError, match=r'train.stray\.png: in no folder of a class'):
        load_images(root, 'train')
    (tmp_path / 'train' / 'dog' / 'cat').mkdir()
    stray.rename(tmp_path / 'train' / 'dog' / 'cat' / '0.png')
    with pytest.raises(ValueError, match=r'train.cat and .*dog.cat: two folders of one name'):
        load_images(root, 'train')


@pytest.mark.parametrize('suffix', ['bmp', 'gif', 'tif', 'webp', 'PNG'])
def test_pictures_of_other_formats_are_taken(tmp_path, suffix):
    root = write_folder(tmp_path, count=1)
    Image.open(tmp_path / 'train' / 'cat' / '0.png').save(tmp_path / 'train' / 'cat' / f'1.{suffix}')
    assert load_images(root, 'train').labels.tolist() == [0, 0, 1]


def test_images_of_16_bits(tmp_path):
    root = write_folder(tmp_path, count=1)
    levels = np.linspace(0, 65535, 144, dtype=np.uint16).reshape(12, 12)
    Image.fromarray(levels).save(tmp_path / 'train' / 'cat' / '0.png')
    images = load_images(root, 'train').images
    assert np.array_equal(images[0].numpy(), np.stack([levels >> 8] * 3))
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / 'train' / 'cat' / '1.tif')
    with pytest.raises(ValueError, match=r'1\.tif\) cannot be decoded: levels of 32 bits'):
        load_images(root, 'train')


@pytest.mark.parametrize('name', ['validation', 'val', 'test'])
def test_evaluation_folder_goes_by_timms_names(tmp_path, name):
    assert len(load_images(write_folder(tmp_path, splits=('train', name)), 'test')) == 6


def test_images_of_different_sizes_are_resized_as_timm_evaluates(tmp_path):
    root = write_folder(tmp_path, classes=('a',), size=(40, 25))
    write_folder(tmp_path, classes=('b',), size=(16, 16))
    with pytest.raises(ValueError, match='image 3 is 16 x 16, the first is 25 x 40; give img_size'):
        load_images(root, 'train')
    arrays = load_images(root, 'train', img_size=16)
    transform = create_transform(16, interpolation='bicubic', crop_pct=1., mean=(0.,) * 3, std=(1.,) * 3)
    expected = transform(Image.open(tmp_path / 'train' / 'a' / '0.png'))
    assert torch.equal(arrays.images[0], (expected * 255).round().to(torch.uint8))
    config = dict(interpolation='bilinear', crop_pct=0.5, crop_mode='squash')
    cropped = load_images(root, 'train', img_size=16, **config)
    for index, path in ((0, tmp_path / 'train' / 'a' / '0.png'), (3, tmp_path / 'train' / 'b' / '0.png')):
        expected = create_transform(16, mean=(0.,) * 3, std=(1.,) * 3, **config)(Image.open(path))
        assert torch.equal(cropped.images[index], (expected * 255).round().to(torch.uint8))
    same = np.asarray(Image.open(tmp_path / 'train' / 'b' / '2.png')).transpose(2, 0, 1)
    assert np.array_equal(arrays.images[5].numpy(), same)


def test_grey_and_palette_images_become_rgb(tmp_path):
    root = write_folder(tmp_path, classes=('a', 'b'), count=1)
    Image.open(tmp_path / 'train' / 'a' / '0.png').convert('L').save(tmp_path / 'train' / 'a' / '1.png')
    Image.open(tmp_path / 'train' / 'a' / '0.png').convert('P').save(tmp_path / 'train' / 'a' / '2.png')
    assert load_images(root, 'train').images.shape == (4, 3, 12, 12)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: not a folder'):
        load_images(str(tmp_path / 'nowhere'), 'train')
    with pytest.raises(ValueError, match='an image folder is named by --data-dir'):
        load_images('', 'train')
    root = write_folder(tmp_path, splits=('train',))
    with pytest.raises(FileNotFoundError, match='no folder for the test split, one of test, validation, val'):
        load_images(root, 'test')
    (tmp_path / 'val').mkdir()
    with pytest.raises(FileNotFoundError, match='val: no image in it'):
        load_images(root, 'test')
    with pytest.raises(ValueError, match="'holdout'"):
        load_images(root, 'holdout')


@pytest.mark.parametrize('content', [b'not an image', None])
def test_image_that_cannot_be_decoded_is_named(tmp_path, content):
    root = write_folder(tmp_path, size=(64, 64))
    victim = tmp_path / 'train' / 'dog' / '1.png'
    victim.write_bytes(content or victim.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r'image 4 \(.*dog.1\.png\) cannot be decoded') as error:
        load_images(root, 'train')
    assert '\n' not in str(error.value)


def test_image_of_a_torchvision_set_that_cannot_be_decoded_is_named(tmp_path):
    root = write_folder(tmp_path, size=(64, 64))
    victim = tmp_path / 'train' / 'dog' / '1.png'
    victim.write_bytes(victim.read_bytes()[:2000])
    with pytest.raises(ValueError, match='torch/image_folder train: image 4 cannot be decoded: .*truncated'):
        load_images('torch/image_folder', 'train', data_dir=root)


def test_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    root = write_folder(tmp_path, size=(64, 64))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(ValueError, match=r'image 0 \(.*png\) cannot be decoded: Image size \(4096 pixels\)'):
        load_images(root, 'train')


def test_wrong_classes_are_named(tmp_path):
    root = write_folder(tmp_path, classes=('cat', 'dog', 'eel'), splits=('train',))
    write_folder(tmp_path, classes=('cat', 'fox'), splits=('val',))
    train, test = load_images(root, 'train'), load_images(root, 'test')
    with pytest.raises(ValueError, match=r"3 classes.*2; only in training: \['dog', 'eel'\], only in test: \['fox'\]"):
        check_splits_agree(train, test)
    check_splits_agree(train, train)
    larger = load_images(root, 'train', img_size=16)
    with pytest.raises(ValueError, match='3x16x16 and the test images of 3x12x12: give --img-size'):
        check_splits_agree(larger, train)
    with pytest.raises(ValueError, match='has 3 classes, 10 are asked for'):
        load_images(root, 'train', num_classes=10)


def test_streamed_sets_are_refused():
    with pytest.raises(ValueError, match='tfds/cifar10: a streamed data set'):
        load_images('tfds/cifar10', 'train')


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """A data set in the original's format, 20 images a split, known to torchvision by its checksums."""
    from torchvision.datasets import CIFAR100 as TorchCifar100
    folder = tmp_path / TorchCifar100.base_folder
    folder.mkdir()
    names = [f'class{index}' for index in range(100)]
    rng = np.random.default_rng(0)
    files = {'meta': {'fine_label_names': names}}
    for split in ('train', 'test'):
        labels = rng.integers(100, size=20).tolist()
        files[split] = {'data': rng.integers(256, size=(20, 3072), dtype=np.uint8), 'fine_labels': labels}
    checksums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(TorchCifar100, 'train_list', [['train', checksums['train']]])
    monkeypatch.setattr(TorchCifar100, 'test_list', [['test', checksums['test']]])
    monkeypatch.setattr(TorchCifar100, 'meta', dict(TorchCifar100.meta, md5=checksums['meta']))
    return tmp_path, folder, files


def test_torch_cifar100(small_cifar100):
    root, folder, files = small_cifar100
    for split in ('train', 'test'):
        arrays = ImageReader(open_dataset('torch/cifar100', split, data_dir=str(root)), split).decode()
        assert np.array_equal(arrays.images.flatten(1).numpy(), files[split]['data'])
        assert arrays.labels.tolist() == files[split]['fine_labels']
        assert arrays.num_classes == 100 and arrays.class_names[3] == 'class3'
    with pytest.raises(ValueError, match='torch/cifar100 train: has 20 images, the whole of it has 50000'):
        load_images('torch/cifar100', 'train', data_dir=str(root))


def test_torch_cifar100_is_downloaded_and_its_checksum_checked(small_cifar100, monkeypatch):
    from torchvision.datasets import CIFAR100 as TorchCifar100
    root, folder, files = small_cifar100
    archive = shutil.make_archive(str(root / 'archive'), 'gztar', root_dir=root, base_dir=folder.name)
    with open(archive, 'rb') as file:
        checksum = hashlib.md5(file.read()).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    kwargs = dict(data_dir=str(root / 'new' / 'data'), download=True)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/{os.path.basename(archive)}'
        monkeypatch.setattr(TorchCifar100, 'url', url)
        monkeypatch.setattr(TorchCifar100, 'tgz_md5', '0' * 32)
        with pytest.raises(FileNotFoundError, match='torch/cifar100: not found or damaged'):
            open_dataset('torch/cifar100', 'train', **kwargs)
        monkeypatch.setattr(TorchCifar100, 'tgz_md5', checksum)
        assert len(open_dataset('torch/cifar100', 'train', **kwargs)) == 20
        server.shutdown()
    os.unlink(root / 'new' / 'data' / '.download.lock')
    assert len(open_dataset('torch/cifar100', 'train', **kwargs)) == 20  # already there
    assert not (root / 'new' / 'data' / '.download.lock').exists()  # nor could it be made on a read-only disk


def test_damaged_or_missing_torch_cifar100_is_named(small_cifar100):
    root, folder, _ = small_cifar100
    content = bytearray((folder / 'train').read_bytes())
    content[len(content) // 2] ^= 1
    (folder / 'train').write_bytes(content)
    message = 'torch/cifar100: not found in .*, or damaged .*--dataset-download.* images is named by --dataset'
    with pytest.raises(FileNotFoundError, match=message):
        load_images('torch/cifar100', 'train', data_dir=str(root))
    with pytest.raises(FileNotFoundError, match='torch/cifar100: not found'):
        load_images('torch/cifar100', 'train', data_dir=str(root / 'elsewhere'))
    with pytest.raises(ValueError, match='data_dir'):
        load_images('torch/cifar100', 'train')
    with pytest.raises(ValueError, match='torch/cifar1000: Unknown torchvision dataset'):
        load_images('torch/cifar1000', 'train', data_dir=str(root))


def write_parquet(root, count=12, classes=3, columns=('img', 'fine_label'), splits=('train', 'test')):
    datasets = pytest.importorskip('datasets')
    rng = np.random.default_rng(0)
    features = {columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=[f'c{i}' for i in range(classes)])}
    features['coarse_label'] = datasets.ClassLabel(names=['x', 'y'])
    pixels = {split: rng.integers(256, size=(count, 8, 8, 3), dtype=np.uint8) for split in splits}
    (root / 'data').mkdir(parents=True)
    for split in splits:
        data = {
            columns[0]: [Image.fromarray(image) for image in pixels[split]],
            columns[1]: [index % classes for index in range(count)],
            'coarse_label': [0] * count,
        }
        table = datasets.Dataset.from_dict(data, features=datasets.Features(features))
        table.to_parquet(str(root / 'data' / f'{split}-00000-of-00001.parquet'))
    return pixels


@pytest.mark.parametrize('columns', [('img', 'fine_label'), ('image', 'label'), ('photo', 'label')])
def test_parquet_folder_with_columns_found(tmp_path, columns):
    pixels = write_parquet(tmp_path / 'set', columns=columns)
    for split in ('train', 'test'):
        arrays = load_images(f'hfds/{tmp_path}/set', split, data_dir=str(tmp_path / 'cache'))
        assert np.array_equal(arrays.images.numpy(), pixels[split].transpose(0, 3, 1, 2))
        assert arrays.labels.tolist() == [index % 3 for index in range(12)]
        assert arrays.class_names == ('c0', 'c1', 'c2')


def test_parquet_columns_by_name(tmp_path):
    write_parquet(tmp_path / 'set')
    kwargs = dict(data_dir=str(tmp_path / 'cache'))
    with pytest.raises(ValueError, match=r"no column 'picture', only \['img', 'fine_label', 'coarse_label'\]"):
        load_images(f'hfds/{tmp_path}/set', 'train', input_key='picture', **kwargs)
    with pytest.raises(ValueError, match="no image of class 'y'"):
        load_images(f'hfds/{tmp_path}/set', 'train', target_key='coarse_label', **kwargs)
    with pytest.raises(ValueError, match="column 'img' holds images, not classes"):
        load_images(f'hfds/{tmp_path}/set', 'train', target_key='img', **kwargs)
    with pytest.raises(ValueError, match="column 'fine_label' holds no images"):
        load_images(f'hfds/{tmp_path}/set', 'train', input_key='fine_label', **kwargs)


def test_parquet_folder_of_fewer_images_than_its_card_says(tmp_path):
    write_parquet(tmp_path / 'set')
    splits = [dict(name='train', num_examples=24), dict(name='test', num_examples=12)]
    (tmp_path / 'set' / 'README.md').write_text(f'---\ndataset_info: {json.dumps(dict(splits=splits))}\n---\n')
    with pytest.raises(ValueError, match='set: NonMatchingSplitsSizesError: .*24'):
        load_images(f'hfds/{tmp_path}/set', 'train', data_dir=str(tmp_path / 'cache'))


def test_labels_that_are_no_indices_are_named(tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('string')})
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    (tmp_path / 'set').mkdir()
    table = datasets.Dataset.from_dict({'image': [image], 'label': ['cat']}, features=features)
    table.to_parquet(str(tmp_path / 'set' / 'train.parquet'))
    with pytest.raises(ValueError, match="labels must be class indices, that of image 0 is 'cat'"):
        load_images(f'hfds/{tmp_path}/set', 'train', data_dir=str(tmp_path / 'cache'))


@pytest.mark.parametrize('column, message', [
    ('image', 'image 1 cannot be decoded: not an image'),
    ('label', 'labels must be class indices, that of image 1 is None'),
])
def test_empty_cells_of_a_table_are_named(tmp_path, column, message):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
    cells = {'image': [Image.fromarray(np.zeros((4, 4, 3), np.uint8))] * 3, 'label': [0, 1, 0]}
    cells[column] = [cells[column][0], None, cells[column][2]]
    (tmp_path / 'set').mkdir()
    datasets.Dataset.from_dict(cells, features=features).to_parquet(str(tmp_path / 'set' / 'train.parquet'))
    with pytest.raises(ValueError, match=message):
        load_images(f'hfds/{tmp_path}/set', 'train', data_dir=str(tmp_path / 'cache'))


def test_parquet_validation_split_and_missing_split(tmp_path):
    write_parquet(tmp_path / 'set', splits=('train', 'validation'))
    cache = str(tmp_path / 'cache')
    assert len(load_images(f'hfds/{tmp_path}/set', 'test', data_dir=cache)) == 12
    write_parquet(tmp_path / 'other', splits=('train',))
    with pytest.raises(FileNotFoundError, match=r"no test split, only \['train'\]"):
        load_images(f'hfds/{tmp_path}/other', 'test', data_dir=cache)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        load_images(f'hfds/{tmp_path}/nowhere', 'test', data_dir=cache)


@pytest.mark.parametrize('damage', ['truncated', 'altered'])
def test_damaged_parquet_is_named(tmp_path, damage):
    write_parquet(tmp_path / 'set', count=300)
    victim = tmp_path / 'set' / 'data' / 'train-00000-of-00001.parquet'
    content = bytearray(victim.read_bytes())
    if damage == 'truncated':
        content = content[:len(content) // 2]
    else:
        # Where the first image's column begins: the page's header.
        content[4:200] = bytes(196)
    victim.write_bytes(content)
    with pytest.raises(ValueError, match='damaged: .*train-00000-of-00001.parquet: .') as error:
        load_images(f'hfds/{tmp_path}/set', 'train', data_dir=str(tmp_path / 'cache'))
    assert '\n' not in str(error.value).strip()


def test_real_cifar100(tmp_path):
    if not os.path.isdir(CIFAR100):
        pytest.skip('the real CIFAR-100 is not in ../shared/cifar100')
    pytest.importorskip('datasets')
    train = load_images(f'hfds/{CIFAR100}', 'train', data_dir=str(tmp_path), num_classes=100)
    assert train.images.shape == (50000, 3, 32, 32) and train.images.is_contiguous()
    assert torch.bincount(train.labels).tolist() == [500] * 100
    assert train.class_names[:3] == ('apple', 'aquarium_fish', 'baby')
    np.testing.assert_allclose(dataset_stats(train), _KNOWN_STATS['cifar100'], rtol=0, atol=1e-8)
    test = load_images(f'hfds/{CIFAR100}', 'test', data_dir=str(tmp_path), memory_limit=1)
    assert isinstance(test, ImageReader) and torch.bincount(test.labels).tolist() == [100] * 100
    check_splits_agree(train, test)
    shutil.rmtree(tmp_path)


# Checks and statistics


def make_cifar100(per_class=500):
    """Pixels of CIFAR-100's published mean and deviation, two levels a channel."""
    count = 100 * per_class
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    for channel, (mean, std) in enumerate(zip(*_KNOWN_STATS['cifar100'])):
        rng = np.random.default_rng(channel)
        values = rng.normal(size=count * 4)
        values = (values - values.mean()) / values.std() * std * 255 + mean * 255
        images[:, channel] = torch.from_numpy(values.clip(0, 255).round()).to(torch.uint8).view(count, 2, 2)
    names = tuple(str(i) for i in range(100))
    return ImageArrays(images, torch.arange(count) % 100, names)


def test_whole_cifar100_is_told_from_part_of_it():
    arrays = make_cifar100(100)
    check_images(arrays, 'hfds/uoft-cs/cifar100', 'test')
    check_images(arrays.subset(range(200)), 'somewhere', 'test')
    with pytest.raises(ValueError, match='cifar100/ test: has 9999 images, the whole of it has 10000'):
        check_images(arrays.subset(range(9999)), 'hfds/../cifar100/', 'test')
    coarse = ImageArrays(arrays.images, arrays.labels % 20, arrays.class_names[:20])
    check_images(coarse, 'torch/cifar100', 'test', own_labels=False)
    with pytest.raises(ValueError, match='has 20 classes, cifar100 has 100'):
        check_images(coarse, 'torch/cifar100', 'test')
    swapped = ImageArrays(arrays.images, arrays.labels.clone(), arrays.class_names)
    swapped.labels[3] = 4
    with pytest.raises(ValueError, match="has 99 images of class '3', it should have 100"):
        check_images(swapped, 'torch/cifar100', 'test')
    with pytest.raises(ValueError, match='cifar10 test: has 100 classes, cifar10 has 10'):
        check_images(arrays, 'torch/cifar10', 'test')


def test_altered_cifar100_is_told_by_its_statistics():
    arrays = make_cifar100(500)
    check_images(arrays, 'torch/cifar100', 'train')  # not of CIFAR's size, so resized, which alters deviations
    whole = ImageArrays(arrays.images.repeat(1, 1, 16, 16), arrays.labels, arrays.class_names)
    with pytest.raises(ValueError, match='mean and deviation are .* the images were altered'):
        check_images(whole, 'torch/cifar100', 'train')


def test_labels_out_of_range_are_named():
    arrays = make_arrays(classes=10)
    bad = ImageArrays(arrays.images, arrays.labels - 1, arrays.class_names)
    with pytest.raises(ValueError, match='labels go from -1 to 8, with 10 classes they must be from 0 to 9'):
        check_images(bad)
    bad = ImageArrays(arrays.images, arrays.labels, arrays.class_names[:7])
    with pytest.raises(ValueError, match='labels go from 0 to 9, with 7 classes'):
        check_images(bad)


@pytest.mark.parametrize('targets', [None, np.zeros((5, 8))])
def test_data_without_one_label_an_image(targets):
    """As torchvision's INaturalist and QMNIST."""
    source = SimpleNamespace() if targets is None else SimpleNamespace(targets=targets)
    with pytest.raises(ValueError, match='torch/x: this data set does not list one label an image'):
        ImageReader(source, 'torch/x', indices=np.arange(5))


def test_statistics_are_numpys():
    arrays = make_arrays(size=5)
    pixels = arrays.images.numpy() / 255.
    np.testing.assert_allclose(dataset_stats(arrays), (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))), rtol=1e-12)


def test_statistics_of_images_not_held_are_estimated(tmp_path):
    reader = load_images(write_folder(tmp_path, count=20), 'train', memory_limit=1)
    assert isinstance(reader, ImageReader)
    np.testing.assert_allclose(dataset_stats(reader), dataset_stats(reader.decode()), rtol=1e-12)


def test_images_are_held_up_to_the_memory_limit(tmp_path):
    root = write_folder(tmp_path)
    size = load_images(root, 'train').images.numel()
    assert isinstance(load_images(root, 'train', memory_limit=size), ImageArrays)
    assert isinstance(load_images(root, 'train', memory_limit=size - 1), ImageReader)


# Hold-out


def test_hold_out_is_stratified_disjoint_and_seeded():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 21)[np.random.default_rng(0).permutation(101)]
    images = torch.arange(101, dtype=torch.uint8).view(101, 1, 1, 1)
    arrays = ImageArrays(images, labels, ('a', 'b', 'c'))
    rest, held = hold_out_split(arrays, 20, seed=1)
    assert (len(rest), len(held)) == (81, 20)
    assert torch.bincount(held.labels).tolist() == [10, 6, 4]
    assert sorted((*rest.images.flatten().tolist(), *held.images.flatten().tolist())) == list(range(101))
    assert torch.equal(labels[held.images.flatten().long()], held.labels)
    assert torch.equal(hold_out_split(arrays, 20, seed=1)[1].images, held.images)
    assert not torch.equal(hold_out_split(arrays, 20, seed=2)[1].images, held.images)
    for count in (1, 50, 90):
        rest, held = hold_out_split(arrays, count, seed=0)
        assert (len(rest), len(held)) == (101 - count, count)
    for count in (0, 101, -1):
        with pytest.raises(ValueError, match=f'{count} images cannot be held out of 101'):
            hold_out_split(arrays, count, seed=0)
    with pytest.raises(ValueError, match="100 images held out would be all of class 'b', which has 30; hold out fewer"):
        hold_out_split(arrays, 100, seed=0)


# Batches


def test_epoch_shows_every_image_once_with_its_label():
    arrays = make_arrays(50)
    seen, labels = map(torch.cat, zip(*make_loader(arrays, batch_size=10).epoch(0)))
    expected = normalized(arrays)
    distance = torch.cdist(seen.flatten(1), expected.flatten(1), compute_mode='donot_use_mm_for_euclid_dist')
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == list(range(50)) and distance.min(1).values.max() < 1e-3
    assert nearest.tolist() != list(range(50))
    assert torch.equal(labels, arrays.labels[nearest]) and labels.dtype == torch.int64


def test_last_batch():
    arrays = make_arrays(50)
    assert [len(x) for x, _ in make_loader(arrays, batch_size=16).epoch(0)] == [16, 16, 16]
    loader = make_loader(arrays, batch_size=16, train=False)
    assert [len(x) for x, _ in loader.epoch(0)] == [16, 16, 16, 2] and len(loader) == 4
    assert [len(x) for x, _ in make_loader(make_arrays(1), batch_size=1, augment=EVERYTHING).epoch(0)] == [1]


def test_seed_and_epoch_alone_decide():
    arrays = make_arrays()
    first = list(make_loader(arrays, augment=EVERYTHING, seed=3).epoch(2))
    np.random.seed(0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert_same_batches(make_loader(arrays, augment=EVERYTHING, seed=3).epoch(2), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (make_loader(arrays, augment=EVERYTHING, seed=3).epoch(3),
                  make_loader(arrays, augment=EVERYTHING, seed=4).epoch(2)):
        assert not torch.equal(next(iter(other))[0], first[0][0])


@pytest.mark.parametrize('augment', [AugmentConfig(), EVERYTHING])
@pytest.mark.parametrize('pixels', [1, 2000])
def test_epoch_can_begin_at_any_step(monkeypatch, augment, pixels):
    """Groups of steps are one step long, then three."""
    monkeypatch.setattr('timm_dense2net.loader._GROUP_PIXELS', pixels)
    loader = make_loader(make_arrays(80), augment=augment)
    whole = list(loader.epoch(1))
    for start in range(len(whole)):
        assert_same_batches(loader.epoch(1, start), whole[start:])
    assert list(loader.epoch(1, len(whole))) == []


def test_grouping_does_not_change_a_batch(monkeypatch):
    loader = make_loader(make_arrays(80), augment=EVERYTHING)
    whole = list(loader.epoch(0))
    monkeypatch.setattr('timm_dense2net.loader._GROUP_PIXELS', 1)
    assert_same_batches(loader.epoch(0), whole)


@pytest.mark.parametrize('augment', [None, AugmentConfig(cutout_holes=1), EVERYTHING])
@pytest.mark.parametrize('world_size', [2, 5])
def test_processes_see_together_what_one_sees(augment, world_size):
    arrays = make_arrays(50)
    whole = make_loader(arrays, augment=augment, seed=1).epoch(0)
    parts = [make_loader(arrays, augment=augment, seed=1, rank=rank, world_size=world_size).epoch(0)
             for rank in range(world_size)]
    together = [tuple(torch.cat(tensors) for tensors in zip(*step)) for step in zip(*parts)]
    assert_same_batches(together, whole)


@pytest.mark.parametrize('count, batch_size, world_size', [(50, 12, 1), (50, 12, 3), (7, 8, 4), (3, 8, 4)])
def test_evaluation_shows_every_image_once_in_order(count, batch_size, world_size):
    arrays = make_arrays(count)
    loaders = [
        make_loader(arrays, batch_size, train=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader.epoch(0)]
    assert sum(len(loader) for loader in loaders) == len(batches)
    expected = normalized(arrays)
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.equal(torch.cat([labels for _, labels in batches]), arrays.labels)
    assert max(len(images) for images, _ in batches) <= batch_size // world_size
    assert_same_batches(loaders[-1].epoch(5), loaders[-1].epoch(0))


def test_soft_targets_until_mixing_is_off_and_smoothed_after():
    augment = AugmentConfig(hflip=0., crop_padding=0, mixup=1., smoothing=0.1, mixup_off_epoch=2)
    arrays = make_arrays(50)
    loader, plain = make_loader(arrays, augment=augment), make_loader(arrays)
    for epoch, mixed in ((0, True), (1, True), (2, False), (3, False)):
        for (images, targets), (own, labels) in zip(loader.epoch(epoch), plain.epoch(epoch)):
            assert targets.shape == (10, 10) and targets.dtype == torch.float32
            torch.testing.assert_close(targets.sum(1), torch.ones(10))
            assert torch.equal(images, own) != mixed
            one_hot = torch.nn.functional.one_hot(labels, 10) * 0.9 + 0.01
            assert torch.allclose(targets, one_hot) != mixed


def test_mixed_images_and_targets_belong_together():
    """On images of one colour a class, the mean of a mixed image tells the weights of its target."""
    labels = torch.arange(64) % 2
    images = (labels.view(-1, 1, 1, 1) * 255).to(torch.uint8).expand(64, 3, 16, 16).contiguous()
    arrays = ImageArrays(images, labels, ('black', 'white'))
    augment = AugmentConfig(hflip=0., crop_padding=0, mixup=1., cutmix=1.)
    for rank in range(2):
        loader = make_loader(
            arrays, 16, augment=augment, mean=(0.,) * 3, std=(1.,) * 3, rank=rank, world_size=2)
        weights = [targets for _, targets in loader.epoch(0)]
        for (mixed, _), target in zip(loader.epoch(0), weights):
            torch.testing.assert_close(mixed.mean((1, 2, 3)), target[:, 1])
        assert ((torch.cat(weights) > 0.01) & (torch.cat(weights) < 0.99)).any()


def test_first_epochs_show_smaller_images():
    arrays = make_arrays(20, size=16)
    plain = make_loader(arrays, augment=EVERYTHING)
    loader = make_loader(arrays, augment=EVERYTHING, progressive=ProgressiveResize(8, 2))
    assert [next(loader.epoch(epoch))[0].shape[2:] for epoch in range(3)] == [(8, 8), (12, 12), (16, 16)]
    for epoch in range(3):
        # The same augmented images and targets, only smaller.
        expected = [(ProgressiveResize(8, 2)(images, epoch), targets) for images, targets in plain.epoch(epoch)]
        assert_same_batches(loader.epoch(epoch), expected)


def test_memory_format():
    loader = make_loader(make_arrays(), channels_last=True, augment=AugmentConfig(cutout_holes=1))
    images, _ = next(loader.epoch(0))
    assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
    exact, _ = next(make_loader(make_arrays(), augment=AugmentConfig(cutout_holes=1)).epoch(0))
    assert torch.equal(images, exact) and exact.is_contiguous()


def test_one_channel_and_odd_sizes():
    images = torch.randint(0, 256, (6, 1, 13, 7), dtype=torch.uint8)
    arrays = ImageArrays(images, torch.zeros(6, dtype=torch.int64), ('only',))
    loader = BatchLoader(arrays, 3, device='cpu', mean=(0.5,), std=(0.2,), train=True, augment=EVERYTHING)
    for batch, targets in loader.epoch(0):
        assert batch.shape == (3, 1, 13, 7) and torch.isfinite(batch).all()
        torch.testing.assert_close(targets, torch.ones(3, 1))


@pytest.mark.parametrize('kwargs, message', [
    (dict(batch_size=9, world_size=2), 'batch_size 9 cannot be divided among 2 processes'),
    (dict(batch_size=0), 'batch_size 0'),
    (dict(batch_size=64), '50 images do not fill one batch of 64'),
    (dict(seed=-1), 'seed must be 0 or more, got -1'),
    (dict(progressive=ProgressiveResize(8, 2)), 'initial size of 8 must be below the shorter side of the images, 8'),
])
def test_bad_loader_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_loader(make_arrays(50), **kwargs)


# Data that does not fit in memory


@pytest.mark.parametrize('num_workers', [0, 2])
def test_images_read_from_disk_make_the_same_batches(tmp_path, num_workers):
    reader = load_images(write_folder(tmp_path, count=8, size=(20, 16)), 'train', img_size=12, memory_limit=1000)
    assert isinstance(reader, ImageReader) and reader.image_shape == (3, 12, 12)
    arrays = reader.decode()
    state = torch.get_rng_state()
    for kwargs in (dict(augment=EVERYTHING), dict(train=False)):
        read = make_loader(reader, 4, num_workers=num_workers, **kwargs)
        held = make_loader(arrays, 4, **kwargs)
        assert_same_batches(read.epoch(1, 1), held.epoch(1, 1))
    assert torch.equal(state, torch.get_rng_state())
    rest, out = hold_out_split(reader, 4, seed=0)
    rest_held, out_held = hold_out_split(arrays, 4, seed=0)
    assert torch.equal(out.decode().images, out_held.images) and torch.equal(rest.labels, rest_held.labels)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_broken_image_read_from_disk_is_named_in_one_line(tmp_path, num_workers):
    root = write_folder(tmp_path)
    (tmp_path / 'train' / 'dog' / '2.png').write_bytes(b'nothing')
    loader = make_loader(load_images(root, 'train', memory_limit=1), 6, num_workers=num_workers)
    with pytest.raises(ValueError, match=r'image 5 \(.*dog.2\.png\) cannot be decoded: not an image') as error:
        next(loader.epoch(0))
    assert '\n' not in str(error.value)


READS_TO_NO_END = '''
import sys
import time

from timm_dense2net.data import load_images
from timm_dense2net.interrupt import StopSignal
from timm_dense2net.loader import BatchLoader

if __name__ == '__main__':
    reader = load_images(sys.argv[1], 'train', memory_limit=1)
    batches = BatchLoader(
        reader, 4, device='cpu', mean=(0.5,), std=(0.2,), train=False, num_workers=2).epoch(0)
    with StopSignal() as stop:
        next(batches)
        print('begun', flush=True)
        while not stop.signum:
            time.sleep(0.05)
        time.sleep(0.5)
        print('read', len(list(batches)) if sys.argv[2] == 'all' else next(batches)[1].tolist())
'''


@pytest.mark.skipif(os.name != 'posix', reason='there are no process groups')
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('read, told', [('all', 'read 19'), ('one', 'read [0, 0, 0, 0]')])
def test_a_signal_to_all_processes_is_for_the_one_that_trains(tmp_path, signum, read, told):
    """Which reads on, and ends where batches are left, too."""
    root = write_folder(tmp_path, count=40)
    (tmp_path / 'script.py').write_text(READS_TO_NO_END)
    with subprocess.Popen(
            [sys.executable, tmp_path / 'script.py', root, read], stdout=subprocess.PIPE, text=True,
            start_new_session=True) as process:
        assert process.stdout.readline() == 'begun\n'
        os.killpg(process.pid, signum)
        assert process.communicate(timeout=60)[0].strip() == told
    assert process.returncode == 0


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ValueError, match=r"hfds/some/set needs the package datasets: pip install -e '.\["):
        load_images('hfds/some/set', 'train')


def test_the_hubs_misprint_among_cifar100s_classes(tmp_path):
    names = ['cra' if name == 'crab' else name for name in CIFAR100_CLASSES]
    root = write_folder(tmp_path, names, count=1, size=(2, 2), splits=('train',))
    assert load_images(root, 'train').class_names == CIFAR100_CLASSES


def test_channel_of_one_value_is_refused():
    pixels = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    pixels[:, 2] = 51
    with pytest.raises(ValueError, match='channel 2 has one value in all images, 0.2, .* give --mean and --std'):
        dataset_stats(ImageArrays(pixels, torch.zeros(4, dtype=torch.int64), ('a',)))
