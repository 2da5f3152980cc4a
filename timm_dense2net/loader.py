"""Deterministic batches, made on the device from uint8 images that are held there or read by worker processes."""
from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader

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
from .images import ImageArrays, ImageReader, Images
from .rng import AUGMENTATION_STREAM, PERMUTATION_STREAM

__all__ = ['BatchLoader']

# About so many pixels are cropped, flipped and put through AutoAugment at a time: the images of several small steps
# share the operations' fixed cost.
_GROUP_PIXELS = 1 << 21


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
            images: Images,
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
        self.config = augment if train and augment is not None else AugmentConfig(hflip=0., crop_padding=0)
        self.augment = BatchAugment(self.config, Normalize(mean, std, self.device))
        self.held = self.augment.pad(images.images.to(self.device)) if isinstance(images, ImageArrays) else None

    def __len__(self) -> int:
        """Steps of an epoch on this process."""
        if self.train:
            return len(self.labels) // self.batch_size
        start, stop = self._eval_bounds()
        return math.ceil((stop - start) / (self.batch_size // self.world_size))

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
        order = np.random.default_rng((PERMUTATION_STREAM, self.seed, epoch)).permutation(len(self.labels))
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
        rng = np.random.default_rng((AUGMENTATION_STREAM, self.seed, epoch, step.number))
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
            worker_init_fn=_leave_process_group,
        )
        batches = iter(loader)
        try:
            for group in groups:
                images = torch.cat([next(batches)[0].to(self.device, non_blocking=True) for _ in group])
                yield self.augment.pad(images), np.arange(len(images))
        except ValueError as error:
            # A worker's message comes with its traceback in front.
            raise ValueError(str(error).strip().rpartition('\nValueError: ')[2]) from error


def _leave_process_group(_worker: int) -> None:
    # A signal to the whole group (Ctrl-C, `timeout`) is for the process that trains, which ends its workers when it is
    # done. They must not ignore SIGTERM: at its exit Python ends them by that, and waits.
    if hasattr(os, 'setpgid'):
        os.setpgid(0, 0)


@dataclass(frozen=True)
class _Step:
    """What one process does in one training step."""
    number: int
    index: np.ndarray  # images of the global batch
    rows: np.ndarray  # positions in it that this process makes: its own, then their partners in other processes
    share: int  # how many are its own
