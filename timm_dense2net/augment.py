"""Training augmentation on whole batches of uint8 images, each image with its own draw.

The draws of a batch are made on the host by a numpy generator, so that they are the same whatever device does the
work and no step waits for the device. The images are never looped over.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from torchvision.transforms import v2

_AUTO_AUGMENT_POLICIES = {'cifar10': v2.AutoAugmentPolicy.CIFAR10}


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to a training batch, in the order of the fields.

    Args:
        crop_padding: Black pixels added on each side before a crop of the original size, as torchvision's
            ``RandomCrop(size, padding)``; 0 leaves the crop out.
        hflip: Probability of a horizontal flip.
        auto_augment: ``'cifar10'`` for AutoAugment's CIFAR policy as torchvision has it
            (https://arxiv.org/abs/1805.09501).
        cutout_holes: Number of squares masked in each image (https://arxiv.org/abs/1708.04552); 0 leaves cutout out.
        cutout_length: Side of a square in pixels. Its centre is anywhere in the image, so it may be clipped.
        mixup: Alpha of Mixup's Beta distribution (https://arxiv.org/abs/1710.09412); 0 leaves it out.
        cutmix: Alpha of CutMix's Beta distribution (https://arxiv.org/abs/1905.04899); 0 leaves it out.
        mixup_prob: Probability that an image is mixed.
        mixup_switch_prob: Probability of CutMix where both are on.
        mixup_off_epoch: First epoch without mixing; 0 for never.
        smoothing: Label smoothing put in the soft targets where Mixup or CutMix is on.

    Raises:
        ValueError: A value is out of its range.
    """
    crop_padding: int = 4
    hflip: float = 0.5
    auto_augment: str = ''
    cutout_holes: int = 0
    cutout_length: int = 8
    mixup: float = 0.
    cutmix: float = 0.
    mixup_prob: float = 1.
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0
    smoothing: float = 0.

    def __post_init__(self) -> None:
        for name in ('hflip', 'mixup_prob', 'mixup_switch_prob', 'smoothing'):
            if not 0. <= getattr(self, name) <= 1.:
                raise ValueError(f'{name} must be between 0 and 1, got {getattr(self, name)}.')
        for name in ('crop_padding', 'cutout_holes', 'mixup', 'cutmix', 'mixup_off_epoch'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} must be 0 or more, got {getattr(self, name)}.')
        if self.cutout_length < 1:
            raise ValueError(f'cutout_length must be at least 1, got {self.cutout_length}.')
        if self.auto_augment and self.auto_augment not in _AUTO_AUGMENT_POLICIES:
            raise ValueError(
                f'auto_augment must be empty or one of {sorted(_AUTO_AUGMENT_POLICIES)}, got {self.auto_augment!r}.')

    @property
    def mixes(self) -> bool:
        """Whether targets are soft."""
        return self.mixup > 0. or self.cutmix > 0.


class ImageDraws(NamedTuple):
    """Draws for images taken one by one; the first axis of each array is the image."""
    flip: np.ndarray  # (B,) bool
    crop: np.ndarray  # (B, 2) top and left in the padded image
    policy: np.ndarray  # (B,) AutoAugment's sub-policy
    apply: np.ndarray  # (B, 2) uniform in [0, 1): an operation is applied where this is at most its probability
    negate: np.ndarray  # (B, 2) bool, sign of each operation's magnitude
    holes: np.ndarray  # (B, cutout_holes, 2) row and column of each square's centre

    def take(self, part: slice | np.ndarray) -> ImageDraws:
        """The draws of some of the images."""
        return ImageDraws(*(values[part] for values in self))

    @classmethod
    def join(cls, draws: Sequence[ImageDraws]) -> ImageDraws:
        """The draws of several batches, one after the other."""
        return cls(*map(np.concatenate, zip(*draws)))


class MixDraws(NamedTuple):
    """Draws for mixing each image with its partner; the first axis of each array is the image."""
    pixel_weight: np.ndarray  # (B,) float32 weight of the image's own pixels outside the box: lambda, or 1 for CutMix
    box: np.ndarray  # (B, 2, 2) first and last + 1 (row, column) pasted from the partner; empty for Mixup
    target_weight: np.ndarray  # (B,) float32 weight of the image's own target

    def take(self, part: slice | np.ndarray) -> MixDraws:
        """The draws of some of the images."""
        return MixDraws(*(values[part] for values in self))


def draw_images(config: AugmentConfig, count: int, size: tuple[int, int], rng: np.random.Generator) -> ImageDraws:
    """Draw flips, crops, AutoAugment operations and cutout squares for ``count`` images of ``size`` (H, W)."""
    policies = len(_auto_augment(config.auto_augment).policies) if config.auto_augment else 1
    # One call for all, since at this size a call costs more than its numbers.
    uniform = rng.random((count, 8 + 2 * config.cutout_holes))
    return ImageDraws(
        flip=uniform[:, 0] < config.hflip,
        crop=(uniform[:, 1:3] * (2 * config.crop_padding + 1)).astype(np.int64),
        policy=(uniform[:, 3] * policies).astype(np.int64),
        apply=uniform[:, 4:6],
        negate=uniform[:, 6:8] < 0.5,
        holes=(uniform[:, 8:].reshape(count, -1, 2) * size).astype(np.int64),
    )


def draw_mix(config: AugmentConfig, count: int, size: tuple[int, int], rng: np.random.Generator) -> MixDraws:
    """Draw Mixup's and CutMix's parameters image by image, as timm's ``Mixup(mode='elem')`` does.

    But a box of an odd side is that wide here; timm's is one pixel narrower.
    """
    use_cutmix = rng.random(count) < (config.mixup_switch_prob if config.mixup > 0. else 1.)
    if config.cutmix == 0.:
        use_cutmix[:] = False
    beta = np.where(
        use_cutmix,
        rng.beta(config.cutmix or 1., config.cutmix or 1., count),
        rng.beta(config.mixup or 1., config.mixup or 1., count))
    lam = np.where(rng.random(count) < config.mixup_prob, beta, 1.)

    ratio = np.where(use_cutmix, np.sqrt(1. - lam), 0.)
    cut = (np.array(size) * ratio[:, None]).astype(np.int64)
    centre = rng.integers(size, size=(count, 2))
    box = np.stack((centre - cut // 2, centre + (cut + 1) // 2), axis=1).clip(0, size)
    area = (box[:, 1] - box[:, 0]).prod(axis=1)
    return MixDraws(
        pixel_weight=np.where(use_cutmix, 1., lam).astype(np.float32),
        box=box,
        # The box may be clipped: what it covers is the partner's true share.
        target_weight=np.where(use_cutmix, 1. - area / math.prod(size), lam).astype(np.float32),
    )


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host array as a tensor on the device, without waiting for it."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def crop_and_flip(
        images: torch.Tensor,
        index: np.ndarray,
        crop: np.ndarray,
        flip: np.ndarray,
        size: tuple[int, int],
) -> torch.Tensor:
    """Crop images out of a set of padded ones, then flip some.

    Args:
        images: Padded images, N x C x H' x W', contiguous, any dtype.
        index: Which of them make the batch, B.
        crop: Top and left of each crop, B x 2.
        flip: Which crops are flipped left to right, B, bool.
        size: Height and width of the crops.

    Returns:
        Batch, B x C x H x W.
    """
    channels, tall, wide = images.shape[1:]
    height, width = size
    device = images.device
    # The images to be flipped go last, are flipped at once, and all are put back in order.
    order = np.argsort(flip, kind='stable')
    first = ((index * channels * tall + crop[:, 0]) * wide + crop[:, 1])[order]
    rows = to_device(first, device).view(-1, 1, 1) + _row_offsets(channels, tall, wide, height, device)
    batch = _take_runs(images, rows.flatten(), width).view(-1, channels, height, width)
    flipped = batch[len(flip) - np.count_nonzero(flip):]
    flipped.copy_(flipped.flip(3))
    return batch.index_select(0, to_device(np.argsort(order), device))


@lru_cache
def _row_offsets(channels: int, tall: int, wide: int, height: int, device: torch.device) -> torch.Tensor:
    """Where in memory the rows of a crop begin, C x height, in a padded image of C x tall x wide."""
    planes = torch.arange(channels, device=device).view(-1, 1) * tall
    return (planes + torch.arange(height, device=device)) * wide


def _take_runs(values: torch.Tensor, first: torch.Tensor, length: int) -> torch.Tensor:
    """Runs of ``length`` neighbours in memory, which begin at ``first`` in the flattened values."""
    if values.device.type == 'cpu':
        return _copy_rows(values, first, length)
    return _take_elements(values, first, length)


def _copy_rows(values: torch.Tensor, first: torch.Tensor, length: int) -> torch.Tensor:
    # Every run is a row of this view, and a CPU copies rows whole, several times faster than element by element.
    return values.as_strided((values.numel() - length + 1, length), (1, 1)).index_select(0, first)


def _take_elements(values: torch.Tensor, first: torch.Tensor, length: int) -> torch.Tensor:
    return torch.take(values, first.unsqueeze(1) + torch.arange(length, device=values.device))


def _boxes_over(start: np.ndarray, stop: np.ndarray, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Number of boxes over each pixel, B x 1 x H x W, of boxes [start, stop), B x boxes x 2 (rows, columns)."""
    sides = []
    for axis, length in enumerate(size):
        position = np.arange(length)
        inside = (position >= start[..., axis, None]) & (position < stop[..., axis, None])
        sides.append(to_device(inside, device).float())
    return torch.einsum('bnh,bnw->bhw', *sides).unsqueeze(1)


def cutout_mask(holes: np.ndarray, length: int, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Mask of the squares of side ``length`` centred at ``holes``, clipped at the border.

    A square covers ``[centre - length // 2, centre - length // 2 + length)`` on each axis.

    Args:
        holes: Row and column of the centres, B x holes x 2.
        length: Side in pixels.
        size: Height and width of the images.
        device: Of the mask.

    Returns:
        float32, B x 1 x H x W: 0 in a square, 1 elsewhere.
    """
    start = holes - length // 2
    return _boxes_over(start, start + length, size, device).lt_(1.)


class _BatchAutoAugment(v2.AutoAugment):
    """torchvision's AutoAugment with the draws given, on a batch.

    Images that get the same operation at the same magnitude are taken together through torchvision's own operation.
    """

    def __init__(self, policy: v2.AutoAugmentPolicy) -> None:
        super().__init__(policy)
        self.policies = self._policies

    def forward(self, images: torch.Tensor, draws: ImageDraws) -> torch.Tensor:
        for stage in range(2):
            groups: dict[tuple[str, int | None, bool], list[int]] = {}
            for row, policy in enumerate(draws.policy.tolist()):
                name, probability, level = self.policies[policy][stage]
                if draws.apply[row, stage] <= probability:
                    signed = self._AUGMENTATION_SPACE[name][1]
                    key = name, level, bool(signed and draws.negate[row, stage])
                    groups.setdefault(key, []).append(row)
            for (name, level, negate), rows in groups.items():
                magnitude = self._magnitude(name, level, *images.shape[-2:])
                index = to_device(np.array(rows), images.device)
                group = self._apply_image_or_video_transform(
                    images.index_select(0, index),
                    name,
                    -magnitude if negate else magnitude,
                    interpolation=self.interpolation,
                    fill=self._fill,
                )
                images.index_copy_(0, index, group)
        return images

    def _magnitude(self, name: str, level: int | None, height: int, width: int) -> float:
        """Magnitude of an operation at one of the policy's ten levels; 0 for operations that have none."""
        magnitudes, _ = self._AUGMENTATION_SPACE[name]
        return 0. if level is None else float(magnitudes(10, height, width)[level])


@lru_cache
def _auto_augment(name: str) -> _BatchAutoAugment:
    return _BatchAutoAugment(_AUTO_AUGMENT_POLICIES[name])


class Normalize:
    """uint8 to float32 of mean 0 and deviation 1 by channel.

    Args:
        mean: Mean of each channel, on the scale of 0 to 1.
        std: Standard deviation of each channel, on the same scale.
        device: Where the batches are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        mean_, std_ = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.scale = (1. / (255. * std_)).float().to(device).view(-1, 1, 1)
        self.shift = (-mean_ / std_).float().to(device).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # Conversion first, then in place: one float batch is written, not three.
        return images.float().mul_(self.scale).add_(self.shift)


class BatchAugment:
    """Augments uint8 batches and normalises them.

    Args:
        config: What to do; mixing is left to :func:`mix_images`, which needs a second batch.
        normalize: uint8 to float.
    """

    def __init__(self, config: AugmentConfig, normalize: Normalize) -> None:
        self.config = config
        self.normalize = normalize
        self.auto_augment = _auto_augment(config.auto_augment) if config.auto_augment else None

    def pad(self, images: torch.Tensor) -> torch.Tensor:
        """Images with the black border that crops may reach into."""
        return F.pad(images, (self.config.crop_padding,) * 4) if self.config.crop_padding else images

    def pixels(self, images: torch.Tensor, index: np.ndarray, draws: ImageDraws) -> torch.Tensor:
        """What is done to uint8 pixels: crop, flip and AutoAugment.

        Args:
            images: uint8, N x C x H' x W', from :meth:`pad`.
            index: Which of them make the batch, B.
            draws: For the batch.

        Returns:
            uint8 batch, B x C x H x W.
        """
        size = tuple(side - 2 * self.config.crop_padding for side in images.shape[-2:])
        batch = crop_and_flip(images, index, draws.crop, draws.flip, size)
        return batch if self.auto_augment is None else self.auto_augment(batch, draws)

    def finish(self, images: torch.Tensor, draws: ImageDraws) -> torch.Tensor:
        """What is done after :meth:`pixels`: normalisation and cutout.

        Args:
            images: uint8 batch, B x C x H x W.
            draws: For these images.

        Returns:
            float32 batch, B x C x H x W; a masked pixel is 0, the mean.
        """
        images = self.normalize(images)
        if self.config.cutout_holes:
            images.mul_(cutout_mask(draws.holes, self.config.cutout_length, images.shape[-2:], images.device))
        return images


@dataclass(frozen=True)
class ProgressiveResize:
    """Smaller images in the first epochs, which take less time.

    The side grows evenly from epoch to epoch, in multiples of 4 pixels, as in the progressive learning of
    EfficientNetV2 (https://arxiv.org/abs/2104.00298).

    Args:
        initial_size: Shorter side in the first epoch, in pixels, a multiple of 4.
        full_size_epoch: First epoch at full size.

    Raises:
        ValueError: A value is less than 1, or ``initial_size`` no multiple of 4.
    """
    initial_size: int
    full_size_epoch: int

    def __post_init__(self) -> None:
        for name in ('initial_size', 'full_size_epoch'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}.')
        if self.initial_size % 4:
            raise ValueError(f'initial_size must be a multiple of 4, got {self.initial_size}.')

    def size(self, epoch: int, full: tuple[int, int]) -> tuple[int, int]:
        """Height and width in an epoch, counted from 0, of images whose full size is given."""
        if epoch >= self.full_size_epoch:
            return full
        shorter = min(full)
        side = self.initial_size + (shorter - self.initial_size) * epoch / self.full_size_epoch
        return tuple(min(length, 4 * round(side * length / shorter / 4)) for length in full)

    def __call__(self, images: torch.Tensor, epoch: int) -> torch.Tensor:
        """The float batch, B x C x H x W, in the size of an epoch."""
        size = self.size(epoch, tuple(images.shape[-2:]))
        if size == images.shape[-2:]:
            return images
        return F.interpolate(images, size, mode='bilinear', antialias=True)


def mix_images(images: torch.Tensor, partners: torch.Tensor, draws: MixDraws) -> torch.Tensor:
    """Mixup, or CutMix, of each image with its partner.

    Args:
        images: float batch, B x C x H x W.
        partners: What is mixed in, B x C x H x W.
        draws: For these images.

    Returns:
        float batch, B x C x H x W.
    """
    device = images.device
    outside = 1. - _boxes_over(draws.box[:, :1], draws.box[:, 1:], images.shape[-2:], device)
    return torch.lerp(partners, images, outside.mul_(to_device(draws.pixel_weight, device).view(-1, 1, 1, 1)))


def mix_targets(
        labels: torch.Tensor,
        num_classes: int,
        draws: MixDraws | None,
        smoothing: float,
) -> torch.Tensor:
    """Soft targets of a batch in which image i is mixed with image B - 1 - i (timm's ``mixup_target``).

    Args:
        labels: Class indices, B.
        num_classes: Number of classes.
        draws: For the whole batch; None where nothing is mixed.
        smoothing: Label smoothing.

    Returns:
        float32, B x num_classes.
    """
    weight = 1. if draws is None else to_device(draws.target_weight, labels.device).unsqueeze(1)
    return mixup_target(labels, num_classes, weight, smoothing)
