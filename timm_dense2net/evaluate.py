"""`python -m timm_dense2net evaluate`: the accuracy of a trained model on a test split, and how far it can be trusted.

    evaluate --model dense2net40_k12_s4 --pretrained --dataset torch/cifar100 --data-dir data
    evaluate --checkpoint output/RUN --dataset torch/cifar100 --data-dir data --tta-flip --calibration --corruptions
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from timm.utils import accuracy, reparameterize_model
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from .calibration import expected_calibration_error, fit_temperature
from .distributed import find_device
from .engine import predict
from .files import write_json
from .images import ImageArrays, Images
from .loader import BatchLoader
from .trained import TrainedModel, check_fits, load_test_split, load_trained

__all__ = ['CORRUPTIONS', 'FlipAverage', 'corrupt', 'cross_fit_calibration', 'evaluate', 'main']


def _gaussian_noise(images: torch.Tensor, sigma: float) -> torch.Tensor:
    # In floating point: torchvision's uint8 kernel rounds the noise towards zero.
    noisy = F.gaussian_noise(F.to_dtype(images, torch.float32, scale=True), sigma=sigma)
    return F.to_dtype(noisy, torch.uint8, scale=True)


def _jpeg(images: torch.Tensor, quality: float) -> torch.Tensor:
    # Pillow, as CIFAR-10-C does: torchvision's own JPEG functions are deprecated.
    decoded = []
    for image in images:
        with BytesIO() as file:
            F.to_pil_image(image).save(file, 'JPEG', quality=int(quality))
            decoded.append(F.pil_to_tensor(Image.open(file)))
    return torch.stack(decoded)


def _gaussian_blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    size = 2 * int(4 * sigma + 0.5) + 1
    return F.gaussian_blur(images, kernel_size=[size, size], sigma=[sigma, sigma])


# Name: the corruption of (N, 3, H, W) uint8 images, and its parameter at severity 1 to 5. The parameters are those of
# CIFAR-10-C (D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
# Perturbations", ICLR 2019, https://arxiv.org/abs/1903.12261); the operations are torchvision's and Pillow's.
CORRUPTIONS: dict[str, tuple[Callable[[torch.Tensor, float], torch.Tensor], tuple[float, ...]]] = {
    'gaussian_noise': (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    'gaussian_blur': (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    'contrast': (F.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    'jpeg': (_jpeg, (80, 65, 58, 50, 40)),
}


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


def corrupt(images: torch.Tensor, name: str, severity: int, seed: int = 0) -> torch.Tensor:
    """Corrupts images; the same images, severity and seed give the same result.

    Args:
        images: (N, 3, H, W) uint8 on the CPU.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the noise.

    Returns:
        (N, 3, H, W) uint8.

    Raises:
        ValueError: If there is no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption '{name}': choose one of {', '.join(CORRUPTIONS)}")
    operation, parameters = CORRUPTIONS[name]
    if not 1 <= severity <= len(parameters):
        raise ValueError(f'severity must be 1 to {len(parameters)}, got {severity}')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # In parts: blur and noise work on float copies of the images.
        return torch.cat([operation(part, parameters[severity - 1]) for part in images.split(1000)])


def cross_fit_calibration(logits: torch.Tensor, targets: torch.Tensor, seed: int = 0) -> dict[str, Any]:
    """Calibration error before and after temperature scaling, no sample judged by a temperature fitted on it.

    The samples are split at random into two halves; each is scaled by the temperature fitted on the other.

    Args:
        logits: (N, C) unnormalised scores, N at least 2.
        targets: (N,) class indices.
        seed: Of the split.

    Returns:
        ece and ece_scaled (15 bins, fractions) over all samples, and the two temperatures.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    first, second = order.chunk(2)
    scaled, temperatures = torch.empty_like(logits), []
    for fitted, judged in ((first, second), (second, first)):
        temperatures.append(fit_temperature(logits[fitted], targets[fitted]))
        scaled[judged] = logits[judged] / temperatures[-1]
    return dict(
        ece=expected_calibration_error(logits, targets), ece_scaled=expected_calibration_error(scaled, targets),
        temperatures=temperatures)


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
        ValueError: If the model's classes are not the data's, or it does not take images of their shape.
    """
    check_fits(trained, images)
    model = trained.model.to(device)
    config = trained.data_config
    run = functools.partial(
        _predict, device=device, batch_size=batch_size, mean=config['mean'], std=config['std'])
    logits, targets = run(model, images, 'test')
    figures = dict(samples=len(targets), **_top(logits, targets))
    if tta_flip:
        averaged = _top(*run(FlipAverage(model), images, 'flip'))
        figures |= {f'{name}_flip': value for name, value in averaged.items()}
    if calibration:
        figures['calibration'] = cross_fit_calibration(logits, targets, seed)
    if corruptions:
        figures['corruptions'] = {
            name: [
                _top(*run(model, _corrupted(images, name, severity, seed), f'{name} {severity}'))['top1']
                for severity in range(1, len(parameters) + 1)]
            for name, (_, parameters) in CORRUPTIONS.items()}
    return figures


def _predict(model, images, name, *, device, batch_size, mean, std) -> tuple[torch.Tensor, torch.Tensor]:
    loader = BatchLoader(images, batch_size, device=device, mean=mean, std=std, train=False)
    return predict(model, tqdm(loader.epoch(0), total=len(loader), desc=name, leave=False))


def _top(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    top1, top5 = accuracy(logits, targets, topk=(1, 5))
    return dict(top1=round(top1.item(), 4), top5=round(top5.item(), 4))


def _corrupted(arrays: ImageArrays, name: str, severity: int, seed: int) -> ImageArrays:
    return dataclasses.replace(arrays, images=corrupt(arrays.images, name, severity, seed))


def format_figures(figures: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f'top-1 {figures["top1"]:.2f} %, top-5 {figures["top5"]:.2f} % ({figures["samples"]:,} images)']
    if 'top1_flip' in figures:
        lines.append(
            f'top-1 {figures["top1_flip"]:.2f} %, top-5 {figures["top5_flip"]:.2f} % with the mirror image averaged in')
    if 'calibration' in figures:
        calibration = figures['calibration']
        first, second = calibration['temperatures']
        lines.append(
            f'ECE {calibration["ece"]:.4f}, {calibration["ece_scaled"]:.4f} after temperature scaling (15 bins; each '
            f'half of the split scaled by the temperature of the other half: {first:.3f}, {second:.3f})')
    if 'corruptions' in figures:
        lines += ['top-1 (%) under corruption', f'{"severity":<16}{"1":>7}{"2":>7}{"3":>7}{"4":>7}{"5":>7}{"mean":>7}']
        for name, values in figures['corruptions'].items():
            columns = (*values, sum(values) / len(values))
            lines.append(f'{name:<16}' + ''.join(f'{value:>7.2f}' for value in columns))
    return '\n'.join(lines)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_dense2net evaluate',
        description='Evaluate a trained model on the test split of a data set.')
    parser.add_argument('--model', metavar='NAME', help='timm model name, hf-hub: or local-dir: name')
    parser.add_argument('--pretrained', action='store_true', help="use the model's pretrained weights")
    parser.add_argument(
        '--checkpoint', metavar='PATH', help='run folder or safetensors file (with --model where it does not say)')
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
    parser.add_argument('--calibration', action='store_true', help='also print the expected calibration error')
    parser.add_argument('--corruptions', action='store_true', help='also evaluate under noise, blur, contrast and JPEG')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help="of the noise and the calibration's halves")
    parser.add_argument('--output', type=Path, metavar='FILE', help='also write the figures as JSON')
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
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {value}')
    if args.output and not Path(args.output).parent.is_dir():
        parser.error(f'--output {args.output}: there is no folder {Path(args.output).parent}')
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
        figures = evaluate(
            trained, images, device=device, batch_size=args.batch_size, tta_flip=args.tta_flip,
            calibration=args.calibration, corruptions=args.corruptions, seed=args.seed)
        print(format_figures(figures))
        if args.output:
            write_json(args.output, figures)
    except (OSError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return 0
