"""Images per second of `BatchLoader` against torch's DataLoader with torchvision's transforms, on the same cores.

Both make normalised float batches with flip, pad-and-crop and one cutout square. All ways are timed in turn, again and
again, so that what else the machine does falls on all of them. BatchLoader counts with its best number of threads,
DataLoader with its best number of workers.

    python benchmarks/data_path.py --output data_path.csv
"""
from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from timm_dense2net.augment import AugmentConfig
from timm_dense2net.data import load_images
from timm_dense2net.files import write_csv
from timm_dense2net.images import ImageArrays, dataset_stats
from timm_dense2net.loader import BatchLoader

CUTOUT_LENGTH = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--dataset', metavar='NAME', help='data set (random 32 x 32 images)')
    parser.add_argument('--data-dir', metavar='DIR', help='its root folder')
    parser.add_argument('--batch-size', type=int, default=128, metavar='N')
    parser.add_argument('--cores', type=int, default=2, metavar='N', help='cores that each way may use')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2], metavar='N', help="BatchLoader's, each tried")
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 2], metavar='N', help="DataLoader's, each tried")
    parser.add_argument('--repeats', type=int, default=7, metavar='N')
    parser.add_argument('--images', type=int, default=10000, metavar='N', help='a repeat of the DataLoader')
    parser.add_argument('--output', metavar='FILE', help='CSV of every repeat')
    return parser.parse_args()


class Cutout:
    """One square of a normalised image masked, as the paper's code does (https://arxiv.org/abs/1708.04552)."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
        half = CUTOUT_LENGTH // 2
        image[:, max(y - half, 0):y + half, max(x - half, 0):x + half] = 0.
        return image


class PilDataset(Dataset):
    """PIL images through torchvision's transforms, as torchvision's CIFAR100 gives them."""

    def __init__(self, arrays: ImageArrays, transform: Callable) -> None:
        self.pixels = arrays.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = arrays.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def random_arrays(count: int) -> ImageArrays:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return ImageArrays(images, torch.arange(count) % 100, tuple(str(i) for i in range(100)))


def endless(make_epoch: Callable[[int], Iterator]) -> Iterator:
    """Batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from make_epoch(epoch)
        epoch += 1


def images_per_second(batches: Iterator, images: int, threads: int) -> float:
    torch.set_num_threads(threads)
    seen, start = 0, time.perf_counter()
    while seen < images:
        seen += len(next(batches)[1])
    return seen / (time.perf_counter() - start)


def make_ways(args: argparse.Namespace, arrays: ImageArrays) -> dict[str, tuple[Iterator, int, int]]:
    """Batches, images of a measurement and torch's threads, of each way by name."""
    mean, std = dataset_stats(arrays)
    loader = BatchLoader(
        arrays, args.batch_size, device='cpu', mean=mean, std=std, train=True,
        augment=AugmentConfig(cutout_holes=1, cutout_length=CUTOUT_LENGTH))
    theirs = PilDataset(arrays, transforms.Compose([
        transforms.RandomCrop(arrays.images.shape[2], padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
        Cutout(),
    ]))
    ways = {f'BatchLoader, {threads} threads': (endless(loader.epoch), 10 * args.images, threads)
            for threads in args.threads}
    for workers in args.workers:
        other = DataLoader(
            theirs, args.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
        ways[f'DataLoader, {workers} workers'] = (endless(lambda _, other=other: iter(other)), args.images, 1)
    return ways


def time_ways(ways: dict[str, tuple[Iterator, int, int]], repeats: int) -> dict[str, list[float]]:
    """Images a second of each way, which take turns."""
    # A training step frees larger blocks than these ways do; from then on malloc keeps what is freed, for both.
    torch.ones(16 << 20, dtype=torch.uint8)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=(repeats + 1) * len(ways)) as progress:
        for repeat in range(repeats + 1):
            for name, way in ways.items():
                speed = images_per_second(*way)
                if repeat:  # the first one warms up
                    speeds[name].append(speed)
                progress.update()
    return speeds


def print_table(speeds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = {kind: max(median for name, median in medians.items() if name.startswith(kind))
            for kind in ('BatchLoader', 'DataLoader')}
    print('| way | images/s, median | lowest | highest |\n|---|---|---|---|')
    for name, values in speeds.items():
        print(f'| {name} | {medians[name]:,.0f} | {min(values):,.0f} | {max(values):,.0f} |')
    ratio = best['BatchLoader'] / best['DataLoader']
    print(f'\nBatchLoader makes {ratio:.1f} times the images per second of the best DataLoader.')


def main() -> None:
    args = parse_args()
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cores])
    arrays = random_arrays(50000)
    if args.dataset:
        arrays = load_images(args.dataset, 'train', data_dir=args.data_dir, memory_limit=None)
    speeds = time_ways(make_ways(args, arrays), args.repeats)
    side = arrays.images.shape[2]
    print(f'\nFlip, crop and cutout of {side} x {side} images, batch {args.batch_size}, {args.cores} cores, '
          f'torch {torch.__version__}, {args.repeats} repeats\n')
    print_table(speeds)
    if args.output:
        write_csv(args.output, ('way', 'repeat', 'images_per_second'), (
            (name, repeat, f'{speed:.1f}') for name, values in speeds.items() for repeat, speed in enumerate(values)))


if __name__ == '__main__':
    main()
