"""Image data held in memory as uint8, and deterministic batches of it made on the device."""
import math
import os
from dataclasses import dataclass
from typing import Any, Iterator, Optional, Sequence, Union

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset, create_transform
from tqdm import tqdm

from .augment import AugmentConfig, BatchAugment, ImageDraws, Normalize, draw_images, draw_mix, mix_images, mix_targets

# Classes, training images and test images of the data sets whose size is known, by the last part of their name.
_KNOWN_SIZES = {'cifar10': (10, 50000, 10000), 'cifar100': (100, 50000, 10000)}

_KNOWN_STATS = {
    'cifar10': ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    'cifar100': ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}

# Names that a split may go by, in the order in which they are tried.
_SPLIT_NAMES = {
    'train': ('train', 'training'),
    'test': ('test', 'validation', 'val', 'valid', 'eval', 'evaluation'),
}

# First words of the entropy of each random stream. numpy takes (1, 2) and (1, 2, 0) for the same seed, so streams of
# different length need different first words.
_PERMUTATION, _AUGMENTATION, _HOLD_OUT = 1, 2, 3


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

    def subset(self, indices: Union[torch.Tensor, np.ndarray, Sequence[int]]) -> 'ImageArrays':
        """The images of the given indices, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return ImageArrays(self.images[index], self.labels[index], self.class_names)


def load_arrays(
        dataset: str,
        split: str,
        *,
        data_dir: Optional[str] = None,
        download: bool = False,
        num_classes: Optional[int] = None,
        img_size: Optional[int] = None,
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        class_map: Union[str, dict] = '',
) -> ImageArrays:
    """Open one split of a data set through timm and decode all of it.

    Args:
        dataset: timm's data set name (``torch/cifar100``, ``hfds/PATH_OR_HUB_ID``, empty for an image folder in
            ``data_dir``), the path of an image folder, or ``digits`` for scikit-learn's handwritten digits.
        split: ``'train'`` or ``'test'``; the latter is also looked for by the names of a validation split.
        data_dir: Root folder of the data, or the cache folder of a Hugging Face data set.
        download: Fetch a ``torch/`` data set that is not there.
        num_classes: Number of classes that the data must have.
        img_size: Side in pixels that every image is resized and centre-cropped to, as timm does for evaluation with
            ``crop_pct=1``. Not needed where the images are all of one size.
        input_key: Image column of a Hugging Face data set; found where not given.
        target_key: Label column of a Hugging Face data set; found where not given, ``fine_label`` before ``label``.
        class_map: timm's class map, class name to index.

    Returns:
        The images and labels of the split, checked by :func:`check_arrays`.

    Raises:
        FileNotFoundError: The data set or the split is not there.
        ValueError: The data set is damaged, incomplete, or of the wrong classes.
    """
    if split not in _SPLIT_NAMES:
        raise ValueError(f'split must be one of {sorted(_SPLIT_NAMES)}, got {split!r}.')
    if dataset == 'digits':
        arrays = _load_digits(split, img_size or 32)
    else:
        source = open_dataset(
            dataset, split, data_dir=data_dir, download=download,
            input_key=input_key, target_key=target_key, class_map=class_map)
        arrays = decode(source, img_size, f'{dataset or data_dir} {split}')
    check_arrays(arrays, dataset, split, num_classes)
    return arrays


def open_dataset(
        dataset: str,
        split: str,
        *,
        data_dir: Optional[str] = None,
        download: bool = False,
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        class_map: Union[str, dict] = '',
) -> torch.utils.data.Dataset:
    """timm's ``create_dataset`` with the split's name and the columns found; see :func:`load_arrays`."""
    prefix, _, name = dataset.partition('/')
    prefix = prefix.lower()
    if prefix == 'torch' and name:
        return _open_torch(dataset, split, data_dir, download)
    if prefix == 'hfds' and name:
        return _open_hfds(dataset, split, data_dir, input_key, target_key, class_map)
    if prefix in ('hfids', 'tfds', 'wds') and name:
        raise ValueError(f'{dataset}: a streamed data set cannot be held in memory; use torch/, hfds/ or a folder.')
    root = data_dir if dataset in ('', 'folder') else dataset
    return _open_folder(root, split, class_map)


def _open_torch(dataset: str, split: str, data_dir: Optional[str], download: bool) -> torch.utils.data.Dataset:
    if not data_dir:
        raise ValueError(f'{dataset}: needs the folder that holds it, or is to hold it, as data_dir.')
    timm_split = 'train' if split == 'train' else 'validation'
    try:
        return create_dataset(dataset, root=data_dir, split=timm_split, download=download)
    except AssertionError as error:
        raise ValueError(f'{dataset}: {error}') from error
    except (RuntimeError, OSError) as error:
        hint = 'check the network, or copy it there' if download else 'download it, or delete what is damaged'
        raise FileNotFoundError(f'{dataset}: not found or damaged in {data_dir} ({error}); {hint}.') from error


def _open_hfds(
        dataset: str,
        split: str,
        cache_dir: Optional[str],
        input_key: Optional[str],
        target_key: Optional[str],
        class_map: Union[str, dict],
) -> torch.utils.data.Dataset:
    import datasets  # optional, and slow to import
    name = dataset.partition('/')[2]
    try:
        available = datasets.get_dataset_split_names(name)
        found = next((candidate for candidate in _SPLIT_NAMES[split] if candidate in available), None)
        if found is None:
            raise FileNotFoundError(f'{dataset}: no {split} split, only {available}.')
        features = datasets.load_dataset(name, split=found, cache_dir=cache_dir).features
        return create_dataset(
            dataset,
            root=cache_dir,
            split=found,
            input_key=_find_column(dataset, features, input_key, ('img', 'image'), datasets.Image),
            target_key=_find_column(dataset, features, target_key, ('fine_label', 'label'), datasets.ClassLabel),
            class_map=class_map,
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{dataset}: {error}') from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f'{dataset}: damaged: {_damaged_parquet(name) or error.__cause__ or error}') from error


def _find_column(dataset: str, features: Any, given: Optional[str], names: Sequence[str], kind: type) -> str:
    if given:
        if given not in features:
            raise ValueError(f'{dataset}: no column {given!r}, only {list(features)}.')
        return given
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    for name in (*names, *of_kind):
        if name in features:
            return name
    raise ValueError(f'{dataset}: none of its columns {list(features)} is {" or ".join(names)}; name the column.')


def _damaged_parquet(folder: str) -> Optional[str]:
    """Name of the first parquet file below a local folder that cannot be read, and why."""
    import pyarrow.parquet as parquet
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


def _open_folder(root: Optional[str], split: str, class_map: Union[str, dict]) -> torch.utils.data.Dataset:
    if not root or not os.path.isdir(root):
        raise FileNotFoundError(f'{root or "data_dir"}: not a folder of images, nor a data set name that timm knows.')
    found = next((name for name in _SPLIT_NAMES[split] if os.path.isdir(os.path.join(root, name))), None)
    if found is None:
        raise FileNotFoundError(f'{root}: no folder for the {split} split, one of {", ".join(_SPLIT_NAMES[split])}.')
    try:
        return create_dataset('', root=os.path.join(root, found), search_split=False, class_map=class_map)
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def _load_digits(split: str, img_size: int) -> ImageArrays:
    """scikit-learn's 1,797 digits, 8 x 8 of 17 grey levels, resized bilinearly and repeated on three channels.

    The split is ``train_test_split`` of all indices, a fifth for testing, stratified, ``random_state=0``.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    index = train if split == 'train' else test
    levels = np.rint(digits.images[index] * (255. / 16.)).astype(np.uint8)
    grey = np.stack([Image.fromarray(level).resize((img_size, img_size), Image.Resampling.BILINEAR) for level in levels])
    images = torch.from_numpy(grey).unsqueeze(1).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target[index]).long()
    return ImageArrays(images, labels, tuple(str(name) for name in digits.target_names))


def decode(source: torch.utils.data.Dataset, img_size: Optional[int], name: str) -> ImageArrays:
    """Decode all images of a map-style timm or torchvision data set.

    Args:
        source: What :func:`open_dataset` gives.
        img_size: Side in pixels of the result; None where all images have one size.
        name: For the progress bar and for messages.

    Returns:
        Images and labels in the order of ``source``.

    Raises:
        ValueError: An image cannot be decoded, or has another size than the first and ``img_size`` is not given.
    """
    transform = None
    if img_size is not None:
        transform = create_transform((3, img_size, img_size), interpolation='bicubic', crop_pct=1., use_prefetcher=True)
    images: Optional[np.ndarray] = None
    labels = np.empty(len(source), dtype=np.int64)
    # Disabled on the other processes: one bar is enough.
    for index in tqdm(range(len(source)), desc=f'Decoding {name}', disable=os.environ.get('RANK', '0') != '0'):
        image, labels[index] = _read(source, index, name)
        if transform is not None and image.size != (img_size, img_size):
            array = np.asarray(transform(image))
        else:
            array = np.asarray(image).transpose(2, 0, 1)
        if images is None:
            images = np.empty((len(source), *array.shape), dtype=np.uint8)
        if array.shape != images.shape[1:]:
            raise ValueError(
                f'{name}: image {index} is {array.shape[1]} x {array.shape[2]}, the first is {images.shape[2]} x '
                f'{images.shape[3]}; give img_size so that all are brought to one size.')
        images[index] = array
    if images is None:
        raise ValueError(f'{name}: holds no image.')
    return ImageArrays(torch.from_numpy(images), torch.from_numpy(labels), _class_names(source, labels))


def _read(source: torch.utils.data.Dataset, index: int, name: str) -> tuple[Image.Image, int]:
    if not isinstance(source, ImageDataset):
        image, label = source[index]
        return image.convert('RGB'), label
    # Read past ImageDataset, which puts the next image in the place of one that cannot be decoded.
    try:
        stream, label = source.reader[index]
        with stream, Image.open(stream) as image:
            return image.convert('RGB'), label
    except (OSError, SyntaxError, ValueError) as error:
        reason = 'not an image' if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f'{name}: image {index} ({source.filename(index)}) cannot be decoded: {reason}.') from error


def _class_names(source: torch.utils.data.Dataset, labels: np.ndarray) -> tuple[str, ...]:
    reader = getattr(source, 'reader', source)
    class_to_idx = getattr(reader, 'class_to_idx', None)
    if not class_to_idx:
        return tuple(str(index) for index in range(int(labels.max()) + 1))
    names = [str(index) for index in range(max(class_to_idx.values()) + 1)]
    for class_name, index in class_to_idx.items():
        names[index] = str(class_name)
    return tuple(names)


def check_arrays(arrays: ImageArrays, dataset: str = '', split: str = '', num_classes: Optional[int] = None) -> None:
    """Check that a split is whole.

    Every class must have an image and every label a class. CIFAR-10 and CIFAR-100, known by the last part of
    ``dataset``, must have their published number of images, equally many of each class, and training images with the
    published mean and standard deviation.

    Args:
        arrays: Decoded split.
        dataset: Name or path it came from.
        split: ``'train'`` or ``'test'``.
        num_classes: Number of classes it must have.

    Raises:
        ValueError: It is not; the message names the numbers.
    """
    name = f'{dataset} {split}'.strip() or 'data set'
    if num_classes is not None and arrays.num_classes != num_classes:
        raise ValueError(f'{name}: has {arrays.num_classes} classes, {num_classes} are asked for.')
    low, high = int(arrays.labels.min()), int(arrays.labels.max())
    if low < 0 or high >= arrays.num_classes:
        raise ValueError(f'{name}: labels go from {low} to {high}, with {arrays.num_classes} classes they must be '
                         f'from 0 to {arrays.num_classes - 1}.')
    counts = torch.bincount(arrays.labels, minlength=arrays.num_classes)
    known = _known_name(dataset)
    if known is None:
        if int(counts.min()) == 0:
            raise ValueError(f'{name}: no image of class {arrays.class_names[int(counts.argmin())]!r}.')
        return

    classes, *sizes = _KNOWN_SIZES[known]
    expected = sizes[0] if split == 'train' else sizes[1]
    if len(arrays) != expected:
        raise ValueError(f'{name}: has {len(arrays)} images, the whole of it has {expected}.')
    if arrays.num_classes != classes:
        raise ValueError(f'{name}: has {arrays.num_classes} classes, {known} has {classes}.')
    worst = int((counts - expected // classes).abs().argmax())
    if int(counts[worst]) != expected // classes:
        raise ValueError(f'{name}: has {int(counts[worst])} images of class {arrays.class_names[worst]!r}, '
                         f'it should have {expected // classes}.')
    if split == 'train':
        stats = dataset_stats(arrays)
        if not np.allclose(stats, _KNOWN_STATS[known], rtol=0., atol=1e-5):
            raise ValueError(f'{name}: mean and deviation are {stats}, {known} has {_KNOWN_STATS[known]}: '
                             f'the images were altered.')


def check_same_classes(train: ImageArrays, test: ImageArrays) -> None:
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


def _known_name(dataset: str) -> Optional[str]:
    prefix, _, rest = dataset.rstrip('/').partition('/')
    name = rest.rpartition('/')[2].lower()
    return name if prefix.lower() in ('torch', 'hfds') and name in _KNOWN_SIZES else None


def known_stats(dataset: str) -> Optional[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Published mean and standard deviation of a data set's training images, None where none is known here."""
    name = _known_name(dataset)
    return None if name is None else _KNOWN_STATS[name]


def dataset_stats(arrays: ImageArrays) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation of each channel over all pixels, on the scale of 0 to 1."""
    means, stds = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255.
    for channel in range(arrays.images.shape[1]):
        frequency = torch.bincount(arrays.images[:, channel].flatten(), minlength=256).double()
        frequency /= frequency.sum()
        mean = float((frequency * levels).sum())
        means.append(mean)
        stds.append(math.sqrt(float((frequency * (levels - mean) ** 2).sum())))
    return tuple(means), tuple(stds)


def hold_out_split(arrays: ImageArrays, count: int, seed: int) -> tuple[ImageArrays, ImageArrays]:
    """Hold out images chosen at random, as many of each class as its share allows.

    Args:
        arrays: Training images.
        count: Number of images held out.
        seed: Of the choice.

    Returns:
        What is left, and what is held out; both keep the order of ``arrays``.

    Raises:
        ValueError: ``count`` leaves nothing on one side.
    """
    if not 0 < count < len(arrays):
        raise ValueError(f'{count} images cannot be held out of {len(arrays)}; give 1 to {len(arrays) - 1}.')
    labels = arrays.labels.numpy()
    sizes = np.bincount(labels, minlength=arrays.num_classes)
    # Largest remainder: the shares rounded down, then one more for the classes that lost most by it.
    shares = sizes * (count / len(labels))
    takes = np.floor(shares).astype(np.int64)
    takes[np.argsort(takes - shares, kind='stable')[:count - takes.sum()]] += 1
    rng = np.random.default_rng((_HOLD_OUT, seed))
    held = np.zeros(len(labels), dtype=bool)
    for label, take in enumerate(takes):
        held[rng.permutation(np.flatnonzero(labels == label))[:take]] = True
    return arrays.subset(np.flatnonzero(~held)), arrays.subset(np.flatnonzero(held))


class BatchLoader:
    """Batches of normalised images and their targets, made on the device from uint8 images held there.

    Every draw is a pure function of (seed, epoch, step), for the whole global batch, of which each process takes its
    slice. So an epoch can be begun at any step with nothing saved, and N processes see together what one would see.

    Args:
        arrays: Images and labels.
        batch_size: Of all processes together.
        device: Where the images are held and the batches made.
        mean: Mean of each channel, on the scale of 0 to 1.
        std: Standard deviation of each channel, on the same scale.
        train: Shuffle and augment. Otherwise the images come in order, each once: each process has its contiguous
            part of them, and the last batch may be short.
        augment: What is done to training batches; None for nothing.
        seed: Of the order and the augmentation.
        rank: Of this process.
        world_size: Number of processes.
        drop_last: Leave out a last batch that is not full; by default in training, as timm does.
        channels_last: Memory format of the batches.
        dtype: Of the images.

    Raises:
        ValueError: The batch cannot be divided among the processes, or the images do not fill one batch.
    """

    def __init__(
            self,
            arrays: ImageArrays,
            batch_size: int,
            *,
            device: Union[str, torch.device],
            mean: Sequence[float],
            std: Sequence[float],
            train: bool,
            augment: Optional[AugmentConfig] = None,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            drop_last: Optional[bool] = None,
            channels_last: bool = False,
            dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f'batch_size {batch_size} cannot be divided among {world_size} processes.')
        if seed < 0:
            raise ValueError(f'seed must be 0 or more, got {seed}.')
        self.drop_last = train if drop_last is None else drop_last
        if train and self.drop_last and len(arrays) < batch_size:
            raise ValueError(f'{len(arrays)} images do not fill one batch of {batch_size}.')
        if train and not self.drop_last and len(arrays) % batch_size % world_size:
            raise ValueError(f'the last batch of {len(arrays) % batch_size} images cannot be divided among '
                             f'{world_size} processes; drop it.')
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.dtype = dtype
        self.num_classes = arrays.num_classes
        self.num_images = len(arrays)
        if not train:
            bounds = [len(arrays) * r // world_size for r in (rank, rank + 1)]
            arrays = arrays.subset(range(*bounds)) if world_size > 1 else arrays
        self.images = arrays.images.to(self.device)
        self.labels = arrays.labels.to(self.device)
        self.normalize = Normalize(mean, std, self.device)
        self.config = (augment or AugmentConfig(hflip=0., crop_padding=0)) if train else None
        self.augment = BatchAugment(self.config, self.normalize) if train else None

    def __len__(self) -> int:
        """Steps of an epoch on this process."""
        images, batch = self.num_images, self.batch_size
        if not self.train:
            images, batch = len(self.labels), self.batch_size // self.world_size
        return images // batch if self.drop_last else math.ceil(images / batch)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch, from a step on.

        Args:
            epoch: Number of the epoch, from 0.
            start_step: First step.

        Yields:
            Images, B x C x H x W, and targets: int64 class indices, B, or float32 class weights, B x num_classes,
            in training with Mixup or CutMix. B is this process's share of the global batch.
        """
        batches = self._train_batches if self.train else self._eval_batches
        for images, targets in batches(epoch, start_step):
            yield images.to(dtype=self.dtype, memory_format=self.memory_format), targets

    def _eval_batches(self, epoch: int, start_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batch = self.batch_size // self.world_size
        for start in range(start_step * batch, len(self) * batch, batch):
            yield self.normalize(self.images[start:start + batch]), self.labels[start:start + batch]

    def _train_batches(self, epoch: int, start_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        config = self.config
        size = tuple(self.images.shape[-2:])
        order = np.random.default_rng((_PERMUTATION, self.seed, epoch)).permutation(self.num_images)
        order = torch.from_numpy(order).to(self.device)
        mixing = config.mixes and not (config.mixup_off_epoch and epoch >= config.mixup_off_epoch)
        for step in range(start_step, len(self)):
            index = order[step * self.batch_size:(step + 1) * self.batch_size]
            count = len(index)
            rng = np.random.default_rng((_AUGMENTATION, self.seed, epoch, step))
            draws = draw_images(config, count, size, rng)
            share = count // self.world_size
            own = slice(self.rank * share, (self.rank + 1) * share)
            images = self._make(index, draws, own)
            targets = self.labels[index]
            if mixing:
                mix = draw_mix(config, count, size, rng)
                # Image i is mixed with image count - 1 - i of the global batch, as timm does.
                if self.world_size == 1:
                    partners = images.flip(0)
                else:
                    partners = self._make(index, draws, slice(count - own.stop, count - own.start)).flip(0)
                images = mix_images(images, partners, mix.take(own))
                targets = mix_targets(targets, self.num_classes, mix, config.smoothing)
            elif config.mixes:
                targets = mix_targets(targets, self.num_classes, None, config.smoothing)
            yield images, targets[own]

    def _make(self, index: torch.Tensor, draws: ImageDraws, part: slice) -> torch.Tensor:
        return self.augment(self.images.index_select(0, index[part]), draws.take(part))
