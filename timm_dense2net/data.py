"""Data sets, opened through timm and checked to be whole."""
from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from timm.data import create_dataset
from timm.utils import natural_key
from torch.utils.data import Dataset

from .cifar import CIFAR100_MEAN, CIFAR100_STD
from .errors import one_line
from .images import ImageArrays, ImageReader, Images, dataset_stats
from .names import is_utf8
from .pictures import EXTENSIONS

__all__ = ['IN_DATA_DIR', 'check_images', 'check_splits_agree', 'load_images', 'open_dataset']

# timm's names of the image folder that `data_dir` is.
IN_DATA_DIR = ('', 'folder')

# Classes, training images and test images of the data sets whose size is known, by the last part of their name.
_KNOWN_SIZES = {'cifar10': (10, 50000, 10000), 'cifar100': (100, 50000, 10000)}

_KNOWN_SHAPE = (3, 32, 32)

_KNOWN_STATS = {
    'cifar10': ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    'cifar100': (CIFAR100_MEAN, CIFAR100_STD),
}

# Names that a split may go by, in the order in which they are tried.
_SPLIT_NAMES = {
    'train': ('train', 'training'),
    'test': ('test', 'validation', 'val', 'valid', 'eval', 'evaluation'),
}

# Columns of labels, in the order in which they are looked for.
_LABEL_COLUMNS = ('fine_label', 'label')

# Data sets of more bytes than this, as uint8, are read from where they are.
_MEMORY_LIMIT = 4 << 30


def load_images(
        dataset: str,
        split: str,
        *,
        data_dir: str | None = None,
        download: bool = False,
        num_classes: int | None = None,
        img_size: int | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        memory_limit: int | None = _MEMORY_LIMIT,
        **preprocessing,
) -> Images:
    """Open one split of a data set through timm, and decode all of it where it fits in memory.

    Args:
        dataset: timm's data set name (``torch/cifar100``, ``hfds/PATH_OR_HUB_ID``, empty for an image folder in
            ``data_dir``), the path of an image folder, or ``digits`` for scikit-learn's handwritten digits.
        split: ``'train'`` or ``'test'``; the latter is also looked for by the names of a validation split.
        data_dir: Root folder of the data, or the cache folder of a Hugging Face data set.
        download: Fetch a ``torch/`` data set that is not there.
        num_classes: Number of classes that the data must have.
        img_size: Side in pixels that every image is resized and centre-cropped to, as timm does for evaluation. Not
            needed where the images are all of one size.
        input_key: Image column of a Hugging Face data set; found where not given.
        target_key: Label column of a Hugging Face data set; found where not given, ``fine_label`` before ``label``.
        memory_limit: Bytes that the decoded images may take; None for any number.
        **preprocessing: timm's ``interpolation``, ``crop_pct`` and ``crop_mode``, in place of ``PREPROCESSING``'s.

    Returns:
        The images and labels of the split, checked by :func:`check_images`.

    Raises:
        FileNotFoundError: The data set or the split is not there.
        ValueError: The data set is damaged, incomplete, or of the wrong classes.
    """
    if split not in _SPLIT_NAMES:
        raise ValueError(f'split must be one of {sorted(_SPLIT_NAMES)}, got {split!r}.')
    if dataset == 'digits':
        images = _load_digits(split, img_size or 32)
    else:
        source = open_dataset(
            dataset, split, data_dir=data_dir, download=download, input_key=input_key, target_key=target_key)
        images = ImageReader(source, f'{dataset or data_dir} {split}', img_size, **preprocessing)
        if memory_limit is None or len(images) * math.prod(images.image_shape) <= memory_limit:
            images = images.decode()
    own_labels = target_key in (None, *_LABEL_COLUMNS)
    check_images(images, dataset, split, num_classes, own_labels)
    return images


def open_dataset(
        dataset: str,
        split: str,
        *,
        data_dir: str | None = None,
        download: bool = False,
        input_key: str | None = None,
        target_key: str | None = None,
) -> Dataset:
    """timm's ``create_dataset`` with the split's name and the columns found.

    Arguments and errors are those of :func:`load_images`.
    """
    prefix, _, name = dataset.partition('/')
    prefix = prefix.lower()
    if prefix == 'torch' and name:
        return _open_torch(dataset, split, data_dir, download)
    if prefix == 'hfds' and name:
        return _open_hfds(dataset, split, data_dir, input_key, target_key)
    if prefix in ('hfids', 'tfds', 'wds') and name:
        raise ValueError(f'{dataset}: a streamed data set cannot be held in memory; use torch/, hfds/ or a folder.')
    root = data_dir if dataset in IN_DATA_DIR else dataset
    return _open_folder(root, split)


def _open_torch(dataset: str, split: str, data_dir: str | None, download: bool) -> Dataset:
    if not data_dir:
        raise ValueError(f'{dataset}: needs the folder that holds it, or is to hold it, as --data-dir (data_dir).')
    timm_split = 'train' if split == 'train' else 'validation'
    try:
        try:
            return create_dataset(dataset, root=data_dir, split=timm_split)
        except RuntimeError:  # by which torchvision says that it is not there
            if not download:
                raise
        # Of several processes on one machine the first downloads and the others find it done.
        os.makedirs(data_dir, exist_ok=True)
        with FileLock(os.path.join(data_dir, '.download.lock')):
            return create_dataset(dataset, root=data_dir, split=timm_split, download=True)
    except AssertionError as error:
        raise ValueError(f'{dataset}: {error}') from error
    except (RuntimeError, OSError) as error:
        if not download and isinstance(error, RuntimeError):
            # torchvision says no more than this, and names an argument of its own.
            raise FileNotFoundError(
                f'{dataset}: not found in {data_dir}, or damaged there; name the folder that holds it as --data-dir '
                f'(data_dir), or fetch it with --dataset-download (download=True); a folder of images is named by '
                f'--dataset {data_dir}.') from error
        hint = 'check the network, or copy it there' if download else 'make it readable'
        raise FileNotFoundError(f'{dataset}: not found or damaged in {data_dir} ({error}); {hint}.') from error


def _open_hfds(
        dataset: str,
        split: str,
        cache_dir: str | None,
        input_key: str | None,
        target_key: str | None,
) -> Dataset:
    datasets, pyarrow = _optional_package('datasets', dataset), _optional_package('pyarrow', dataset)
    name = dataset.partition('/')[2]
    try:
        splits = datasets.load_dataset(name, cache_dir=cache_dir)
        found = next((candidate for candidate in _SPLIT_NAMES[split] if candidate in splits), None)
        if found is None:
            raise FileNotFoundError(f'no {split} split, only {list(splits)}.')
        features = splits[found].features
        target = _find_column(dataset, features, target_key, _LABEL_COLUMNS, datasets.ClassLabel)
        if isinstance(features[target], datasets.Image):
            raise ValueError(f'{dataset}: column {target!r} holds images, not classes.')
        return create_dataset(
            dataset,
            root=cache_dir,
            split=found,
            input_key=_find_column(dataset, features, input_key, ('img', 'image'), datasets.Image),
            target_key=target,
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f'{dataset}: {error}') from error
    except pyarrow.ArrowNotImplementedError as error:  # of a cast
        raise ValueError(f'{dataset}: column {input_key!r} holds no images: {error}') from error
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        reason = _damaged_parquet(name) or str(error.__cause__ or error)
        raise ValueError(f'{dataset}: damaged: {" ".join(reason.split())}') from error
    except (datasets.exceptions.DatasetsError, RuntimeError) as error:  # other splits than its card says; a script
        raise ValueError(f'{dataset}: {type(error).__name__}: {one_line(error)}') from error


def _optional_package(package: str, dataset: str) -> ModuleType:
    """Import what only some data sets need, and may be slow to import."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"{dataset} needs the package {error.name}: pip install -e '.[train]'.") from error


def _find_column(dataset: str, features: Any, given: str | None, names: Sequence[str], kind: type) -> str:
    if given:
        if given not in features:
            raise ValueError(f'{dataset}: no column {given!r}, only {list(features)}.')
        return given
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    for name in (*names, *of_kind):
        if name in features:
            return name
    raise ValueError(f'{dataset}: none of its columns {list(features)} is {" or ".join(names)}; name the column.')


def _damaged_parquet(folder: str) -> str | None:
    """Name of the first parquet file below a local folder that cannot be read, and why."""
    from pyarrow import parquet
    for root, _, files in sorted(os.walk(folder)):
        for name in sorted(file for file in files if file.endswith('.parquet')):
            path = os.path.join(root, name)
            try:
                with parquet.ParquetFile(path) as file:
                    for _ in file.iter_batches():
                        pass
            except (OSError, ValueError) as error:
                return f'{path}: {error}'
    return None


def _open_folder(root: str | None, split: str) -> Dataset:
    if not root:
        raise ValueError('an image folder is named by --data-dir (data_dir), or by its path as --dataset (dataset).')
    if not os.path.isdir(root):
        raise FileNotFoundError(f'{root}: not a folder of images, nor a data set name that timm knows.')
    found = next((name for name in _SPLIT_NAMES[split] if os.path.isdir(os.path.join(root, name))), None)
    if found is None:
        raise FileNotFoundError(f'{root}: no folder for the {split} split, one of {", ".join(_SPLIT_NAMES[split])}.')
    folder = os.path.join(root, found)
    how = dict(root=folder, search_split=False, input_key=';'.join(EXTENSIONS))
    try:
        images = create_dataset('', **how)
    except RuntimeError as error:
        raise FileNotFoundError(f'{folder}: no image in it or in the folders below it.') from error
    _check_class_folders(folder, [file for file, _ in images.reader.samples])
    names = list(images.reader.class_to_idx)
    # timm orders names that differ only in case or in leading zeros in another way in each process.
    ordered = sorted(names, key=lambda name: (natural_key(name), name))
    if names != ordered:
        images = create_dataset('', **how, class_map={name: index for index, name in enumerate(ordered)})
    return images


def _check_class_folders(folder: str, files: Sequence[str]) -> None:
    # To timm the name of the folder that an image lies in is its class, at whatever depth.
    folders: dict[str, str] = {}
    for file in files:
        place = os.path.dirname(file)
        if place == folder:
            raise ValueError(f'{file}: in no folder of a class; there must be one for each in {folder}.')
        other = folders.setdefault(os.path.basename(place), place)
        if other != place:
            raise ValueError(
                f'{other} and {place}: two folders of one name, whose images would be one class; put the images of a '
                f'class in one folder, named like no other.')


def _load_digits(split: str, img_size: int) -> ImageArrays:
    """scikit-learn's 1,797 digits, 8 x 8 of 17 grey levels, resized bilinearly and repeated on three channels.

    The split is ``train_test_split`` of all indices, a fifth for testing, stratified, ``random_state=0``.
    """
    digits = _optional_package('sklearn.datasets', 'digits').load_digits()
    train, test = _optional_package('sklearn.model_selection', 'digits').train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    index = train if split == 'train' else test
    levels = np.rint(digits.images[index] * (255. / 16.)).astype(np.uint8)
    size = (img_size, img_size)
    grey = np.stack([Image.fromarray(level).resize(size, Image.Resampling.BILINEAR) for level in levels])
    images = torch.from_numpy(grey).unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target[index]).long()
    return ImageArrays(images, labels, tuple(str(name) for name in digits.target_names))


def check_images(
        images: Images,
        dataset: str = '',
        split: str = '',
        num_classes: int | None = None,
        own_labels: bool = True,
) -> None:
    """Check that a split is whole.

    Every class must have an image and every label a class. CIFAR-10 and CIFAR-100, known by the last part of
    ``dataset``, must have their published number of images, equally many of each class, and training images, where they
    are decoded in their own size, with the published mean and standard deviation.

    Args:
        images: One split.
        dataset: Name or path it came from.
        split: ``'train'`` or ``'test'``.
        num_classes: Number of classes it must have.
        own_labels: Whether the labels are those that the data set is known by.

    Raises:
        ValueError: It is not; the message names the numbers.
    """
    name = f'{dataset} {split}'.strip() or 'data set'
    if num_classes is not None and images.num_classes != num_classes:
        raise ValueError(f'{name}: has {images.num_classes} classes, {num_classes} are asked for.')
    if images.num_classes < 2:
        raise ValueError(
            f'{name}: has one class only, {images.class_names[0]!r}; there must be two or more to tell apart, in an '
            f'image folder each a folder below that of the split.')
    _check_text(images.class_names, name)
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= images.num_classes:
        raise ValueError(f'{name}: labels go from {low} to {high}, with {images.num_classes} classes they must be '
                         f'from 0 to {images.num_classes - 1}.')
    counts = torch.bincount(images.labels, minlength=images.num_classes)
    known = _known_name(dataset)
    if int(counts.min()) == 0 and (known is None or not own_labels):
        raise ValueError(f'{name}: no image of class {images.class_names[int(counts.argmin())]!r}.')
    if known is not None:
        _check_known(images, known, split, own_labels, name)


def _check_text(class_names: Sequence[str], name: str) -> None:
    for class_name in class_names:
        if not is_utf8(class_name):
            raise ValueError(f'{name}: the name of class {class_name!r} is not UTF-8; rename it.')


def _check_known(images: Images, known: str, split: str, own_labels: bool, name: str) -> None:
    classes, *sizes = _KNOWN_SIZES[known]
    expected = sizes[0] if split == 'train' else sizes[1]
    if len(images) != expected:
        raise ValueError(f'{name}: has {len(images)} images, the whole of it has {expected}.')
    if own_labels and images.num_classes != classes:
        raise ValueError(f'{name}: has {images.num_classes} classes, {known} has {classes}.')
    counts = torch.bincount(images.labels, minlength=images.num_classes)
    worst = int((counts - expected // classes).abs().argmax())
    if own_labels and int(counts[worst]) != expected // classes:
        raise ValueError(f'{name}: has {int(counts[worst])} images of class {images.class_names[worst]!r}, '
                         f'it should have {expected // classes}.')
    # Resized images have other deviations.
    if split == 'train' and isinstance(images, ImageArrays) and images.image_shape == _KNOWN_SHAPE:
        stats = dataset_stats(images)
        if not np.allclose(stats, _KNOWN_STATS[known], rtol=0., atol=1e-5):
            raise ValueError(f'{name}: mean and deviation are {stats}, {known} has {_KNOWN_STATS[known]}: '
                             f'the images were altered.')


def check_splits_agree(train: Images, test: Images) -> None:
    """Check that two splits number the same classes in the same way, and have images of one shape.

    Raises:
        ValueError: They do not; the message names the classes, or the sizes.
    """
    if train.class_names != test.class_names:
        only_train = sorted(set(train.class_names) - set(test.class_names))[:5]
        only_test = sorted(set(test.class_names) - set(train.class_names))[:5]
        raise ValueError(f'the training split has {train.num_classes} classes and the test split {test.num_classes}; '
                         f'only in training: {only_train}, only in test: {only_test}.')
    if train.image_shape != test.image_shape:
        shapes = ['x'.join(map(str, images.image_shape)) for images in (train, test)]
        raise ValueError(f'the training images are of {shapes[0]} and the test images of {shapes[1]}: give --img-size')


def _known_name(dataset: str) -> str | None:
    prefix, _, rest = dataset.rstrip('/').partition('/')
    name = rest.rpartition('/')[2].lower()
    return name if prefix.lower() in ('torch', 'hfds') and name in _KNOWN_SIZES else None
