"""Calibration of a classifier's probabilities."""
from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ['check_logits', 'cross_fit_calibration', 'expected_calibration_error', 'fit_temperature']


def expected_calibration_error(logits: torch.Tensor, targets: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error of the most likely class, as a fraction.

    ECE = sum_b n_b / n * |accuracy_b - confidence_b| over bins of equal width, each open below and closed above
    (C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599).

    Args:
        logits: (N, C) unnormalised scores.
        targets: (N,) class indices.
        bins: Number of bins on (0, 1].

    Raises:
        ValueError: If `bins` is below 1, or `check_logits` refuses the logits and targets.
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
        ValueError: If `check_logits` refuses the logits and targets.
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


def cross_fit_calibration(logits: torch.Tensor, targets: torch.Tensor, seed: int = 0) -> dict[str, Any]:
    """Calibration error before and after temperature scaling, no sample judged by a temperature fitted on it.

    The samples are split at random into two halves; each is scaled by the temperature fitted on the other.

    Args:
        logits: (N, C) unnormalised scores, N at least 2.
        targets: (N,) class indices.
        seed: Of the split.

    Returns:
        ece and ece_scaled (15 bins, fractions) over all samples, and the two temperatures.

    Raises:
        ValueError: If there are fewer samples.
    """
    if len(targets) < 2:
        raise ValueError(f'calibration needs at least 2 samples, one for each half, got {len(targets)}')
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    first, second = order.chunk(2)
    scaled, temperatures = torch.empty_like(logits), []
    for fitted, judged in ((first, second), (second, first)):
        temperatures.append(fit_temperature(logits[fitted], targets[fitted]))
        scaled[judged] = logits[judged] / temperatures[-1]
    return dict(
        ece=expected_calibration_error(logits, targets), ece_scaled=expected_calibration_error(scaled, targets),
        temperatures=temperatures)


def check_logits(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Checks that (N, C) logits and (N,) targets fit each other.

    Raises:
        ValueError: If their shapes do not, there is no sample, a target is out of range or a logit not finite.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise ValueError(
            f'logits must be (N, C) and targets (N,) with N > 0, got {tuple(logits.shape)} and {tuple(targets.shape)}')
    if targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise ValueError(
            f'targets must lie in 0..{logits.shape[1] - 1}, got {targets.min().item()}..{targets.max().item()}')
    if not logits.isfinite().all():
        bad = (~logits.isfinite()).any(dim=1).sum()
        raise ValueError(f'the logits of {bad} of {len(logits)} images are not finite')
