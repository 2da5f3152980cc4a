"""`python -m timm_dense2net evaluate`: the accuracy of a trained model on a test split, and how far it can be trusted.

    evaluate --model dense2net40_k12_s4 --pretrained --dataset torch/cifar100 --data-dir data
    evaluate --checkpoint output/RUN --dataset torch/cifar100 --data-dir data --tta-flip --calibration --corruptions
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.utils import reparameterize_model
from tqdm import tqdm

from .calibration import check_logits, cross_fit_calibration
from .corruptions import CORRUPTIONS, corrupt
from .distributed import find_device
from .engine import predict, top_accuracies
from .files import output_file, write_json
from .images import Images
from .loader import BatchLoader
from .names import option
from .trained import TrainedModel, check_fits, load_test_split, load_trained

__all__ = ['FlipAverage', 'evaluate', 'main']


class FlipAverage(nn.Module):
    """Mean of a model's logits for an image and its mirror image.

    Args:
        model: Classifier of (N, C, H, W) images.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, num_classes) logits of (N, C, H, W) images."""
        return (self.model(x) + self.model(x.flip(-1))) / 2


def evaluate(
        trained: TrainedModel,
        images: Images,
        *,
        device: torch.device | str = 'cpu',
        batch_size: int = 256,
        tta_flip: bool = False,
        calibration: bool = False,
        corruptions: bool = False,
        seed: int = 0,
) -> dict[str, Any]:
    """Evaluates a model on images.

    Args:
        trained: The model; it is moved to `device`.
        images: Images and labels; `corruptions` needs those held in memory.
        device: Device to run on.
        batch_size: Images at a time.
        tta_flip: Also average the logits of each image and its mirror image.
        calibration: Also measure the calibration error, as it is and by `cross_fit_calibration`.
        corruptions: Also measure top-1 under each of `CORRUPTIONS` at each severity.
        seed: Of the noise and the calibration's split.

    Returns:
        top1, top5, samples; with the options top1_flip and top5_flip, calibration, and corruptions (each name's five
        top-1 accuracies). Accuracies are in percent.

    Raises:
        ValueError: If the model's classes are not the data's, it does not take images of their shape, or its logits are
            not finite.
    """
    check_fits(trained, images)
    model = trained.model.to(device)
    config = trained.data_config
    run = functools.partial(
        _predict, device=device, batch_size=batch_size, mean=config['mean'], std=config['std'])
    logits, targets = run(model, images, 'test')
    metrics = dict(samples=len(targets), **top_accuracies(logits, targets))
    if tta_flip:
        averaged = top_accuracies(*run(FlipAverage(model), images, 'flip'))
        metrics |= {f'{name}_flip': value for name, value in averaged.items()}
    if calibration:
        metrics['calibration'] = cross_fit_calibration(logits, targets, seed)
    if corruptions:
        metrics['corruptions'] = {}
        for name, (_, parameters) in CORRUPTIONS.items():
            metrics['corruptions'][name] = top1 = []
            for severity in range(1, len(parameters) + 1):
                corrupted = dataclasses.replace(images, images=corrupt(images.images, name, severity, seed))
                top1.append(top_accuracies(*run(model, corrupted, f'{name} {severity}'))['top1'])
    return metrics


def _predict(
        model: nn.Module,
        images: Images,
        name: str,
        *,
        device: torch.device,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets; `name` is what the progress bar says."""
    loader = BatchLoader(images, batch_size, device=device, mean=mean, std=std, train=False)
    logits, targets = predict(model, tqdm(loader.epoch(0), total=len(loader), desc=name, leave=False))
    check_logits(logits, targets)
    return logits, targets


def format_metrics(metrics: dict[str, Any]) -> str:
    """The metrics as lines of text."""
    lines = [f'top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} % ({metrics["samples"]:,} images)']
    if 'top1_flip' in metrics:
        lines.append(
            f'top-1 {metrics["top1_flip"]:.2f} %, top-5 {metrics["top5_flip"]:.2f} % with the mirror image averaged in')
    if 'calibration' in metrics:
        calibration = metrics['calibration']
        first, second = calibration['temperatures']
        lines.append(
            f'ECE {calibration["ece"]:.4f}, {calibration["ece_scaled"]:.4f} after temperature scaling (15 bins; each '
            f'half of the split scaled by the temperature of the other half: {first:.3f}, {second:.3f})')
    if 'corruptions' in metrics:
        lines += ['top-1 (%) under corruption', f'{"severity":<16}{"1":>7}{"2":>7}{"3":>7}{"4":>7}{"5":>7}{"mean":>7}']
        for name, values in metrics['corruptions'].items():
            columns = (*values, sum(values) / len(values))
            lines.append(f'{name:<16}' + ''.join(f'{value:>7.2f}' for value in columns))
    return '\n'.join(lines)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net evaluate',
        description='Evaluate a trained model on the test split of a data set.')
    parser.add_argument('--model', metavar='NAME', help='timm model name, hf-hub: or local-dir: name')
    parser.add_argument('--pretrained', action='store_true', help="use the model's pretrained weights")
    parser.add_argument('--checkpoint', metavar='PATH', help=(
        "run folder, safetensors file or checkpoint of timm's train.py (with --model where it does not say)"))
    parser.add_argument('--dataset', required=True, metavar='SPEC', help="timm data set, image folder or 'digits'")
    parser.add_argument('--data-dir', metavar='DIR', help='folder of a torch/ data set, cache of an hfds/ one')
    parser.add_argument('--input-key', metavar='NAME', help='image column of a Hugging Face data set')
    parser.add_argument('--target-key', metavar='NAME', help='label column of a Hugging Face data set')
    parser.add_argument('--img-size', type=int, metavar='N', help="side to resize the images to (the model's)")
    parser.add_argument('-b', '--batch-size', type=int, default=256, metavar='N')
    parser.add_argument('--device', metavar='NAME', help='cpu, cuda, ... (cuda where there is one)')
    parser.add_argument(
        '--reparam', action='store_true', help="evaluate the model's form for inference, the same up to rounding")
    parser.add_argument('--tta-flip', action='store_true', help='also average the logits of each image and its mirror')
    parser.add_argument('--calibration', action='store_true', help=(
        'also print the expected calibration error, before and after temperature scaling'))
    parser.add_argument('--corruptions', action='store_true', help='also evaluate under noise, blur, contrast and JPEG')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help="of the noise and the calibration's halves")
    parser.add_argument('--output', type=output_file, metavar='FILE', help='also write the metrics as JSON')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 where model, weights or data cannot be used."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    if args.pretrained == bool(args.checkpoint):
        parser.error('give either --pretrained or --checkpoint')
    if args.pretrained and not args.model:
        parser.error('--pretrained needs --model')
    for name in ('batch_size', 'img_size'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'{option(name)} must be at least 1, got {value}')
    try:
        device = find_device(args.device)
        trained = load_trained(args.model, args.checkpoint)
        if args.reparam:
            trained = dataclasses.replace(trained, model=reparameterize_model(trained.model))
        # To be corrupted they must be held.
        memory = dict(memory_limit=None) if args.corruptions else {}
        images = load_test_split(
            trained, args.dataset, img_size=args.img_size, data_dir=args.data_dir, input_key=args.input_key,
            target_key=args.target_key, **memory)
        metrics = evaluate(
            trained, images, device=device, batch_size=args.batch_size, tta_flip=args.tta_flip,
            calibration=args.calibration, corruptions=args.corruptions, seed=args.seed)
        print(format_metrics(metrics))
        if args.output:
            write_json(args.output, metrics)
    except (OSError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return 0
