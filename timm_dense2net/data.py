"""Image data held in memory as uint8, and deterministic batches of it made on the device.

Data too large to be held is read by worker processes instead; all that follows is the same.
"""
from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .augment import (
    AugmentConfig,
    BatchAugment,
    ImageDraws,
    MixDraws,
    Normalize,
    ProgressiveResize,
    draw_images,
    draw_mix,
    mix_images,
    mix_targets,
    to_device,
)

# Classes, training images and test images of the data sets whose size is known, by the last part of their name.
_KNOWN_SIZES = {'cifar10': (10, 50000, 10000), 'cifar100': (100, 50000, 10000)}

_KNOWN_SHAPE = (3, 32, 32)

_KNOWN_STATS = {
    'cifar10': ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    'cifar100': ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
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

# About so many pixels are cropped, flipped and put through AutoAugment at a time: the images of several small steps
# share the operations' fixed cost.
_GROUP_PIXELS = 1 << 21

_STATS_SAMPLE = 5000

# How images are resized that are trained on: all of them is kept that a square holds.
PREPROCESSING = dict(interpolation='bicubic', crop_pct=1.0, crop_mode='center')

# First words of the entropy of each random stream. numpy takes (1, 2) and (1, 2, 0) for the same seed, so streams of
# different length need different first words.
_PERMUTATION, _AUGMENTATION, _HOLD_OUT, _STATS = 1, 2, 3, 4


@dataclass(frozen=True)
class ImageArrays:
    """A decoded data set.

    Args:
        images: uint8, N x C x H x W, contiguous, on the CPU.
        labels: int64 class indices, N.
        class_names: Name of each class index.
    """
    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return tuple(self.images.shape[1:])

    def subset(self, indices: torch.Tensor | np.ndarray | Sequence[int]) -> ImageArrays:
        """The images of the given indices, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return ImageArrays(self.images[index], self.labels[index], self.class_names)


class ImageReader(Dataset):
    """A data set that is decoded image by image, when asked.

    Args:
        source: Map-style data set of timm or torchvision that gives PIL images.
        name: For messages.
        img_size: Side in pixels that every image is resized and centre-cropped to, as timm does for evaluation; None
            where the images have one size.
        indices: Those of the images that are part of it; None for all.
        **preprocessing: timm's ``interpolation``, ``crop_pct`` and ``crop_mode``, in place of ``PREPROCESSING``'s.

    Raises:
        ValueError: There is no image, the labels are no class indices, or the first image cannot be decoded.
    """

    def __init__(
            self,
            source: Dataset,
            name: str,
            img_size: int | None = None,
            indices: np.ndarray | None = None,
            **preprocessing,
    ) -> None:
        self.source = source
        self.name = name
        self.img_size = img_size
        self.preprocessing = PREPROCESSING | preprocessing
        self.indices = np.arange(len(source)) if indices is None else indices
        if len(self.indices) == 0:
            raise ValueError(f'{name}: holds no image.')
        labels = _read_labels(source, name)
        self.class_names = _class_names(source, labels)
        self.labels = torch.from_numpy(labels[self.indices])
        self.transform = None
        if img_size is not None:
            self.transform = create_transform((3, img_size, img_size), use_prefetcher=True, **self.preprocessing)
        self.image_shape = self[0][0].shape

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, indices: torch.Tensor | np.ndarray | Sequence[int]) -> ImageReader:
        """The images of the given indices, in that order."""
        return ImageReader(
            self.source, self.name, self.img_size, self.indices[np.asarray(indices)], **self.preprocessing)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """One image, uint8, C x H x W, and its label.

        Raises:
            ValueError: It cannot be decoded, or has another size than the first and ``img_size`` is not given.
        """
        image = self._decode(int(self.indices[index]))
        as_it_is = image.size == (self.img_size, self.img_size) and self.preprocessing['crop_pct'] == 1
        if self.transform is not None and not as_it_is:
            array = np.asarray(self.transform(image))
        else:
            array = np.array(image).transpose(2, 0, 1)
        if index and array.shape != self.image_shape:
            raise ValueError(
                f'{self.name}: image {index} is {array.shape[1]} x {array.shape[2]}, the first is '
                f'{self.image_shape[1]} x {self.image_shape[2]}; give img_size so that all are brought to one size.')
        return array, int(self.labels[index])

    def _decode(self, index: int) -> Image.Image:
        if not isinstance(self.source, ImageDataset):
            return self.source[index][0].convert('RGB')
        # Read past ImageDataset, which puts the next image in the place of one that cannot be decoded.
        try:
            stream = self.source.reader[index][0]
            with stream, Image.open(stream) as image:
                return image.convert('RGB')
        except (OSError, SyntaxError, ValueError) as error:
            reason = 'not an image' if isinstance(error, UnidentifiedImageError) else error
            file = self.source.filename(index, absolute=True)
            raise ValueError(f'{self.name}: image {index} ({file}) cannot be decoded: {reason}.') from error

    def decode(self) -> ImageArrays:
        """Decode all images into memory."""
        images = np.empty((len(self), *self.image_shape), dtype=np.uint8)
        # One process shows the bar for all.
        hidden = os.environ.get('RANK', '0') != '0'
        for index in tqdm(range(len(self)), desc=f'Decoding {self.name}', mininterval=1., disable=hidden):
            images[index] = self[index][0]
        return ImageArrays(torch.from_numpy(images), self.labels, self.class_names)


def _read_labels(source: Dataset, name: str) -> np.ndarray:
    """Labels of a map-style data set, without decoding its images."""
    reader = getattr(source, 'reader', None)
    if reader is None:
        labels = source.targets
    elif hasattr(reader, 'iter_targets'):
        labels = list(reader.iter_targets())
    else:
        labels = [label for _, label in reader.samples]
    try:
        return np.asarray(labels, dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{name}: labels must be class indices, the first is {labels[0]!r}.') from error


def _class_names(source: Dataset, labels: np.ndarray) -> tuple[str, ...]:
    class_to_idx = getattr(getattr(source, 'reader', source), 'class_to_idx', None)
    if not class_to_idx:
        return tuple(str(index) for index in range(int(labels.max()) + 1))
    names = [str(index) for index in range(max(class_to_idx.values()) + 1)]
    for class_name, index in class_to_idx.items():
        names[index] = str(class_name)
    return tuple(names)


def load_arrays(dataset: str, split: str, **kwargs) -> ImageArrays:
    """:func:`load_images`, held in memory whatever the size."""
    return load_images(dataset, split, memory_limit=None, **kwargs)


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
) -> ImageArrays | ImageReader:
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
        if memory_limit is None or fits_in_memory(len(images), images.image_shape, memory_limit):
            images = images.decode()
    own_labels = target_key in (None, *_LABEL_COLUMNS)
    check_images(images, dataset, split, num_classes, own_labels)
    return images


def fits_in_memory(num_images: int, image_shape: Sequence[int], limit: int = _MEMORY_LIMIT) -> bool:
    """Whether images of a shape (C, H, W) take at most ``limit`` bytes as uint8."""
    return num_images * math.prod(image_shape) <= limit


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
    root = data_dir if dataset in ('', 'folder') else dataset
    return _open_folder(root, split)


def _open_torch(dataset: str, split: str, data_dir: str | None, download: bool) -> Dataset:
    if not data_dir:
        raise ValueError(f'{dataset}: needs the folder that holds it, or is to hold it, as --data-dir (data_dir).')
    timm_split = 'train' if split == 'train' else 'validation'
    try:
        if not download:
            return create_dataset(dataset, root=data_dir, split=timm_split)
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
                f'(data_dir), or fetch it with --dataset-download (download=True).') from error
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
        return create_dataset(
            dataset,
            root=cache_dir,
            split=found,
            input_key=_find_column(dataset, features, input_key, ('img', 'image'), datasets.Image),
            target_key=_find_column(dataset, features, target_key, _LABEL_COLUMNS, datasets.ClassLabel),
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f'{dataset}: {error}') from error
    except pyarrow.ArrowNotImplementedError as error:  # of a cast
        raise ValueError(f'{dataset}: column {input_key!r} holds no images: {error}') from error
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        reason = _damaged_parquet(name) or str(error.__cause__ or error)
        raise ValueError(f'{dataset}: damaged: {" ".join(reason.split())}') from error


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
    if not root or not os.path.isdir(root):
        raise FileNotFoundError(f'{root or "data_dir"}: not a folder of images, nor a data set name that timm knows.')
    found = next((name for name in _SPLIT_NAMES[split] if os.path.isdir(os.path.join(root, name))), None)
    if found is None:
        raise FileNotFoundError(f'{root}: no folder for the {split} split, one of {", ".join(_SPLIT_NAMES[split])}.')
    try:
        return create_dataset('', root=os.path.join(root, found), search_split=False)
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


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
        images: ImageArrays | ImageReader,
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


def _check_known(images: ImageArrays | ImageReader, known: str, split: str, own_labels: bool, name: str) -> None:
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


def check_same_classes(train: ImageArrays | ImageReader, test: ImageArrays | ImageReader) -> None:
    """Check that two splits number the same classes in the same way.

    Raises:
        ValueError: They do not; the message names the classes.
    """
    if train.class_names == test.class_names:
        return
    only_train = sorted(set(train.class_names) - set(test.class_names))[:5]
    only_test = sorted(set(test.class_names) - set(train.class_names))[:5]
    raise ValueError(f'the training split has {train.num_classes} classes and the test split {test.num_classes}; '
                     f'only in training: {only_train}, only in test: {only_test}.')


def _known_name(dataset: str) -> str | None:
    prefix, _, rest = dataset.rstrip('/').partition('/')
    name = rest.rpartition('/')[2].lower()
    return name if prefix.lower() in ('torch', 'hfds') and name in _KNOWN_SIZES else None


def dataset_stats(images: ImageArrays | ImageReader) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, on the scale of 0 to 1.

    They are exact for decoded images. Of images that are not, 5,000 are decoded, chosen at random with a fixed seed.
    """
    if isinstance(images, ImageReader):
        sample = np.random.default_rng(_STATS).permutation(len(images))[:_STATS_SAMPLE]
        images = images.subset(np.sort(sample)).decode()
    means, stds = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255.
    for channel in range(images.image_shape[0]):
        frequency = torch.bincount(images.images[:, channel].flatten(), minlength=256).double()
        frequency /= frequency.sum()
        mean = float((frequency * levels).sum())
        means.append(mean)
        stds.append(math.sqrt(float((frequency * (levels - mean) ** 2).sum())))
    return tuple(means), tuple(stds)


def hold_out_split(
        images: ImageArrays | ImageReader,
        count: int,
        seed: int,
) -> tuple[ImageArrays | ImageReader, ImageArrays | ImageReader]:
    """Hold out images chosen at random, as many of each class as its share allows.

    Args:
        images: Training images.
        count: Number of images held out.
        seed: Of the choice.

    Returns:
        What is left, and what is held out; both keep the order of ``images``.

    Raises:
        ValueError: ``count`` leaves nothing on one side.
    """
    if not 0 < count < len(images):
        raise ValueError(f'{count} images cannot be held out of {len(images)}; give 1 to {len(images) - 1}.')
    labels = images.labels.numpy()
    sizes = np.bincount(labels, minlength=images.num_classes)
    # Largest remainder: the shares rounded down, then one more for the classes that lost most by it.
    shares = sizes * (count / len(labels))
    takes = np.floor(shares).astype(np.int64)
    takes[np.argsort(takes - shares, kind='stable')[:count - takes.sum()]] += 1
    rng = np.random.default_rng((_HOLD_OUT, seed))
    held = np.zeros(len(labels), dtype=bool)
    for label, take in enumerate(takes):
        held[rng.permutation(np.flatnonzero(labels == label))[:take]] = True
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))


class BatchLoader:
    """Batches of normalised images and their targets, made on the device from uint8 images held there.

    Every draw is a pure function of (seed, epoch, step), for the whole global batch, of which each process takes its
    slice. So an epoch can be begun at any step with nothing saved, and N processes see together what one would see.

    Args:
        images: Decoded images, or a reader of those that are too many to be held.
        batch_size: Of all processes together.
        device: Where the images are held and the batches made.
        mean: Mean of each channel, on the scale of 0 to 1.
        std: Standard deviation of each channel, on the same scale.
        train: Shuffle, augment and, as timm does, leave out a last batch that is not full. Otherwise the images come in
            order, each once: each process has its contiguous part of them, and the last batch may be short.
        augment: What is done to training batches; None for nothing.
        progressive: How much smaller they are in the first epochs; None for full size in all.
        seed: Of the order and the augmentation.
        rank: Of this process.
        world_size: Number of processes.
        channels_last: Memory format of the batches.
        num_workers: Processes that decode images of a reader; 0 for this one.

    Raises:
        ValueError: The batch cannot be divided among the processes, the images do not fill one batch, or are no larger
            than those of the first epochs are to be.
    """

    def __init__(
            self,
            images: ImageArrays | ImageReader,
            batch_size: int,
            *,
            device: str | torch.device,
            mean: Sequence[float],
            std: Sequence[float],
            train: bool,
            augment: AugmentConfig | None = None,
            progressive: ProgressiveResize | None = None,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            channels_last: bool = False,
            num_workers: int = 0,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f'batch_size {batch_size} cannot be divided among {world_size} processes.')
        if seed < 0:
            raise ValueError(f'seed must be 0 or more, got {seed}.')
        if train and len(images) < batch_size:
            raise ValueError(f'{len(images)} images do not fill one batch of {batch_size}.')
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.num_workers = num_workers
        self.num_classes = images.num_classes
        self.image_size = tuple(images.image_shape[1:])
        self.progressive = progressive
        if progressive is not None and progressive.initial_size >= min(self.image_size):
            raise ValueError(f'an initial size of {progressive.initial_size} must be below the shorter side of the '
                             f'images, {min(self.image_size)}.')
        self.reader = images if isinstance(images, ImageReader) else None
        self.labels = images.labels.to(self.device)
        self.config = (train and augment) or AugmentConfig(hflip=0., crop_padding=0)
        self.augment = BatchAugment(self.config, Normalize(mean, std, self.device))
        self.held = self.augment.pad(images.images.to(self.device)) if isinstance(images, ImageArrays) else None

    def __len__(self) -> int:
        """Steps of an epoch on this process."""
        if self.train:
            images, batch = len(self.labels), self.batch_size
        else:
            start, stop = self._eval_bounds()
            images, batch = stop - start, self.batch_size // self.world_size
        return images // batch if self.train else math.ceil(images / batch)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch, from a step on.

        Args:
            epoch: Number of the epoch, from 0.
            start_step: First step.

        Yields:
            Images, B x C x H x W, and targets: int64 class indices, B, or float32 class weights, B x num_classes,
            in training with Mixup or CutMix. B is this process's share of the global batch.
        """
        batches = self._train_batches(epoch, start_step) if self.train else self._eval_batches(start_step)
        for images, targets in batches:
            if self.progressive is not None:
                images = self.progressive(images, epoch)
            yield images.to(memory_format=self.memory_format), targets

    def _eval_bounds(self) -> tuple[int, int]:
        total = len(self.labels)
        return total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size

    def _eval_batches(self, start_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        start, stop = self._eval_bounds()
        batch = self.batch_size // self.world_size
        steps = range(start_step, len(self))
        indices = [np.arange(start + step * batch, min(start + (step + 1) * batch, stop)) for step in steps]
        for index, (images, chosen) in zip(indices, self._fetch([[index] for index in indices])):
            images = images.index_select(0, to_device(chosen, self.device))
            yield self.augment.normalize(images), self.labels[index[0]:index[-1] + 1]

    def _train_batches(self, epoch: int, start_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = np.random.default_rng((_PERMUTATION, self.seed, epoch)).permutation(len(self.labels))
        mixing = self.config.mixes and not 0 < self.config.mixup_off_epoch <= epoch
        group = max(1, _GROUP_PIXELS // (self.batch_size * math.prod(self.image_size)))
        # Groups begin at multiples of their length, so that a step's group is the same wherever the epoch is begun.
        groups = [
            [self._plan(order, step, mixing) for step in range(first, min(first + group, len(self)))]
            for first in range(start_step - start_step % group, len(self), group)
        ]
        fetched = self._fetch([[step.index[step.rows] for step in steps] for steps in groups])
        for steps, (images, chosen) in zip(groups, fetched):
            drawn = [self._draw(epoch, step, mixing) for step in steps]
            pixels = self.augment.pixels(images, chosen, ImageDraws.join([draws for draws, _ in drawn]))
            parts = pixels.split([len(step.rows) for step in steps])
            for step, part, (draws, mix) in zip(steps, parts, drawn):
                if step.number >= start_step:
                    yield self._finish(step, part, draws, mix)

    def _plan(self, order: np.ndarray, number: int, mixing: bool) -> _Step:
        index = order[number * self.batch_size:(number + 1) * self.batch_size]
        share = len(index) // self.world_size
        rows = np.arange(self.rank * share, (self.rank + 1) * share)
        if mixing and self.world_size > 1:
            # Image i is mixed with image B - 1 - i of the global batch, as timm does; behind this process's images
            # go their partners, in such an order that the same rule pairs them here.
            rows = np.concatenate((rows, len(index) - 1 - rows[::-1]))
        return _Step(number, index, rows, share)

    def _draw(self, epoch: int, step: _Step, mixing: bool) -> tuple[ImageDraws, MixDraws | None]:
        rng = np.random.default_rng((_AUGMENTATION, self.seed, epoch, step.number))
        draws = draw_images(self.config, len(step.index), self.image_size, rng).take(step.rows)
        mix = draw_mix(self.config, len(step.index), self.image_size, rng).take(step.rows) if mixing else None
        return draws, mix

    def _finish(
            self,
            step: _Step,
            pixels: torch.Tensor,
            draws: ImageDraws,
            mix: MixDraws | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.augment.finish(pixels, draws)
        targets = self.labels.index_select(0, to_device(step.index[step.rows], self.device))
        if mix is not None:
            images = mix_images(images, images.flip(0), mix)
        if self.config.mixes:
            targets = mix_targets(targets, self.num_classes, mix, self.config.smoothing)
        return images[:step.share], targets[:step.share]

    def _fetch(self, groups: list[list[np.ndarray]]) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """For each group of batches, padded uint8 images on the device and which of them are the group's."""
        if self.held is not None:
            for group in groups:
                yield self.held, np.concatenate(group)
            return
        loader = DataLoader(
            self.reader,
            batch_sampler=[index for group in groups for index in group],
            num_workers=self.num_workers,
            collate_fn=fast_collate,
            pin_memory=self.device.type == 'cuda',
            generator=torch.Generator(),  # keeps the loader's own draws off the global one
        )
        batches = iter(loader)
        try:
            for group in groups:
                images = torch.cat([next(batches)[0].to(self.device, non_blocking=True) for _ in group])
                yield self.augment.pad(images), np.arange(len(images))
        except ValueError as error:
            # A worker's message comes with its traceback in front.
            raise ValueError(str(error).strip().rpartition('\nValueError: ')[2]) from error


@dataclass(frozen=True)
class _Step:
    """What one process does in one training step."""
    number: int
    index: np.ndarray  # images of the global batch
    rows: np.ndarray  # positions in it that this process makes: its own, then their partners in other processes
    share: int  # how many are its own
