"""Common corruptions of images, made when they are asked for."""
from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

__all__ = ['CORRUPTIONS', 'corrupt']


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
    # Beyond its edges an image goes on as it ends, as in scikit-image; torchvision's own padding mirrors it.
    radius = int(4 * sigma + 0.5)
    padded = F.pad(images, [radius] * 4, padding_mode='edge')
    size = [2 * radius + 1] * 2
    return F.gaussian_blur(padded, kernel_size=size, sigma=[sigma, sigma])[..., radius:-radius, radius:-radius]


def _contrast(images: torch.Tensor, factor: float) -> torch.Tensor:
    # About the mean of each channel; torchvision's adjust_contrast is about that of the grey image.
    values = images.float()
    means = values.mean((2, 3), keepdim=True)
    return ((values - means) * factor + means).round().clamp(0, 255).to(torch.uint8)


# Name: the corruption of (N, 3, H, W) uint8 images, and its parameter at severity 1 to 5. The parameters are those of
# CIFAR-10-C (D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
# Perturbations", ICLR 2019, https://arxiv.org/abs/1903.12261), and so are the operations; values are rounded where
# those cut off.
CORRUPTIONS: dict[str, tuple[Callable[[torch.Tensor, float], torch.Tensor], tuple[float, ...]]] = {
    'gaussian_noise': (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    'gaussian_blur': (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    'contrast': (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    'jpeg': (_jpeg, (80, 65, 58, 50, 40)),
}


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
