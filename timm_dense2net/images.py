"""Images of a data set: held in memory as uint8, or decoded when asked where they are too many."""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_transform
from torch.utils.data import Dataset
from tqdm import tqdm

from .cifar import CIFAR100_CLASSES
from .pictures import convert_mode
from .rng import HOLD_OUT_STREAM, STATS_STREAM

__all__ = ['PREPROCESSING', 'ImageArrays', 'ImageReader', 'Images', 'dataset_stats', 'hold_out_split']

_STATS_SAMPLE = 5000

# How images are resized that are trained on: all of them is kept that a square holds.
PREPROCESSING = dict(interpolation='bicubic', crop_pct=1.0, crop_mode='center')


# `uoft-cs/cifar100` there has a misprint.
_CIFAR100_ON_THE_HUB = ['cra' if name == 'crab' else name for name in CIFAR100_CLASSES]


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
        """Number of classes, those without images too."""
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
        """Number of classes, those without images too."""
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
                f'{self.name}: image {self.indices[index]} is {array.shape[1]} x {array.shape[2]}, the first is '
                f'{self.image_shape[1]} x {self.image_shape[2]}; give img_size so that all are brought to one size.')
        return array, int(self.labels[index])

    def _decode(self, index: int) -> Image.Image:
        in_files = isinstance(self.source, ImageDataset)
        try:
            if not in_files:
                return convert_mode(self.source[index][0], 'RGB')
            # Read past ImageDataset, which puts the next image in the place of one that cannot be decoded.
            stream = self.source.reader[index][0]
            with stream, Image.open(stream) as image:
                return convert_mode(image, 'RGB')
        except Exception as error:  # of all kinds where a header is damaged, or an image too large
            # The latter of an empty cell in a table.
            reason = 'not an image' if isinstance(error, (UnidentifiedImageError, TypeError)) else error
            file = self._file(index) if in_files else ''
            raise ValueError(f'{self.name}: image {index}{file} cannot be decoded: {reason}.') from error

    def _file(self, index: int) -> str:
        """For a message, the file of an image; empty where none is known, as in a table that does not tell."""
        try:
            file = self.source.filename(index, absolute=True)
        except TypeError:
            return ''
        return f' ({file})' if file else ''

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
        labels = getattr(source, 'targets', ())
    elif hasattr(reader, 'iter_targets'):
        labels = list(reader.iter_targets())
    else:
        labels = [label for _, label in reader.samples]
    if np.ndim(labels) != 1 or not len(labels):
        raise ValueError(f'{name}: this data set does not list one label an image, as torchvision does in targets.')
    try:
        return np.asarray(labels, dtype=np.int64)
    except (TypeError, ValueError) as error:
        index, label = next(
            (index, label) for index, label in enumerate(labels) if not isinstance(label, (int, np.integer)))
        raise ValueError(f'{name}: labels must be class indices, that of image {index} is {label!r}.') from error


def _class_names(source: Dataset, labels: np.ndarray) -> tuple[str, ...]:
    class_to_idx = getattr(getattr(source, 'reader', source), 'class_to_idx', None)
    if not class_to_idx:
        return tuple(str(index) for index in range(int(labels.max()) + 1))
    names = [str(index) for index in range(max(class_to_idx.values()) + 1)]
    for class_name, index in class_to_idx.items():
        names[index] = str(class_name)
    return CIFAR100_CLASSES if names == _CIFAR100_ON_THE_HUB else tuple(names)


# Held in memory, or read image by image where they are too many.
Images = Union[ImageArrays, ImageReader]


def dataset_stats(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, on the scale of 0 to 1.

    They are exact for decoded images. Of images that are not, 5,000 are decoded, chosen at random with a fixed seed.

    Raises:
        ValueError: A channel has one value in all images.
    """
    if isinstance(images, ImageReader):
        sample = np.random.default_rng(STATS_STREAM).permutation(len(images))[:_STATS_SAMPLE]
        images = images.subset(np.sort(sample)).decode()
    means, stds = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255.
    for channel in range(images.image_shape[0]):
        frequency = torch.bincount(images.images[:, channel].flatten(), minlength=256).double()
        frequency /= frequency.sum()
        mean = float((frequency * levels).sum())
        if frequency.count_nonzero() == 1:
            raise ValueError(
                f'channel {channel} has one value in all images, {mean:.3g}, and no deviation to divide by: give'
                ' --mean and --std')
        means.append(mean)
        stds.append(math.sqrt(float((frequency * (levels - mean) ** 2).sum())))
    return tuple(means), tuple(stds)


def hold_out_split(
        images: Images,
        count: int,
        seed: int,
) -> tuple[Images, Images]:
    """Hold out images chosen at random, as many of each class as its share allows.

    Args:
        images: Training images.
        count: Number of images held out.
        seed: Of the choice.

    Returns:
        What is left, and what is held out; both keep the order of ``images``.

    Raises:
        ValueError: ``count`` leaves nothing on one side, or nothing to train on of a class.
    """
    if not 0 < count < len(images):
        raise ValueError(f'{count} images cannot be held out of {len(images)}; give 1 to {len(images) - 1}.')
    labels = images.labels.numpy()
    sizes = np.bincount(labels, minlength=images.num_classes)
    # Largest remainder: the shares rounded down, then one more for the classes that lost most by it.
    shares = sizes * (count / len(labels))
    takes = np.floor(shares).astype(np.int64)
    takes[np.argsort(takes - shares, kind='stable')[:count - takes.sum()]] += 1
    taken = np.flatnonzero((takes == sizes) & (sizes > 0))
    if len(taken):
        raise ValueError(
            f'{count} images held out would be all of class {images.class_names[taken[0]]!r}, which has '
            f'{sizes[taken[0]]}; hold out fewer.')
    rng = np.random.default_rng((HOLD_OUT_STREAM, seed))
    held = np.zeros(len(labels), dtype=bool)
    for label, take in enumerate(takes):
        held[rng.permutation(np.flatnonzero(labels == label))[:take]] = True
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))
