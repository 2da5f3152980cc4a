"""Calibration of a classifier's probabilities."""
from __future__ import annotations

import math

import torch

__all__ = ['check_logits', 'expected_calibration_error', 'fit_temperature']


def expected_calibration_error(logits: torch.Tensor, targets: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error of the most likely class, as a fraction.

    ECE = sum_b n_b / n * |accuracy_b - confidence_b| over bins of equal width, each open below and closed above
    (C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599).

    Args:
        logits: (N, C) unnormalised scores.
        targets: (N,) class indices.
        bins: Number of bins on (0, 1].

    Raises:
        ValueError: If the shapes do not fit, there is no sample, or `bins` is below 1.
    """
    check_logits(logits, targets)
    if bins < 1:
        raise ValueError(f'bins must be at least 1, got {bins}')
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    gap = (predicted == targets).double() - confidence
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return gap.new_zeros(bins).index_add_(0, index, gap).abs().sum().item() / len(targets)


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Temperature T in [0.01, 100] that minimises the cross entropy of `logits / T`.

    The loss is convex in 1 / T, so bisecting its derivative's sign finds the minimum (C. Guo et al., "On Calibration
    of Modern Neural Networks", ICML 2017, section 4.2).

    Args:
        logits: (N, C) unnormalised scores of held-out samples.
        targets: (N,) class indices.

    Raises:
        ValueError: If the shapes do not fit or there is no sample.
    """
    check_logits(logits, targets)
    logits = logits.double()
    mean_target_logit = logits.gather(1, targets[:, None]).mean()
    low, high = math.log(0.01), math.log(100.)
    for _ in range(50):
        middle = (low + high) / 2
        mean_logit = ((logits / math.exp(middle)).softmax(dim=1) * logits).sum(dim=1).mean()
        # The derivative by 1 / T: below zero the network is not confident enough, so T must fall.
        if mean_logit <= mean_target_logit:
            high = middle
        else:
            low = middle
    return math.exp((low + high) / 2)


def check_logits(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Checks that (N, C) logits and (N,) targets fit each other.

    Raises:
        ValueError: If their shapes do not, there is no sample, or a value is out of range.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise ValueError(
            f'logits must be (N, C) and targets (N,) with N > 0, got {tuple(logits.shape)} and {tuple(targets.shape)}')
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise ValueError(
            f'targets must lie in 0..{logits.shape[1] - 1}, got {targets.min().item()}..{targets.max().item()}')
    if not logits.isfinite().all():
        raise ValueError('logits hold values that are not finite')
