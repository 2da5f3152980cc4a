"""Knowledge distillation: a trained model's answers as targets beside the labels."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['Distillation', 'loss_weights']


def loss_weights(distill: float | None, task: float | None) -> tuple[float, float]:
    """Weights of the teacher's answers and of the labels by the rules of timm's `LogitDistillationTask`.

    Args:
        distill: `--distill-loss-weight`.
        task: `--task-loss-weight`.

    Returns:
        What is given as given; a task weight alone is completed to 1; what is left is 1.
    """
    if distill is None and task is not None:
        distill = 1. - task
    return (1. if distill is None else distill), (1. if task is None else task)


class Distillation(nn.Module):
    r"""Adds a teacher's answers to a loss, by `Distilling the Knowledge in a Neural Network`.

    .. math:: w_{task} L + w_{distill} T^2 \, KL(softmax(t / T) \,\|\, softmax(z / T))

    with logits z, the teacher's t and the temperature T (https://arxiv.org/abs/1503.02531), as timm's
    `LogitDistillationTask` has it, in float32.

    Args:
        teacher: Trained model of the same classes, in evaluation mode.
        stats: Mean and std of each channel that the images come normalised by.
        teacher_stats: Those that the teacher was trained with.
        temperature: T, above 0.
        distill_weight: Weight of the teacher's answers.
        task_weight: Weight of the loss that they are added to.
        autocast: Makes the context of the teacher's forward pass.
    """

    def __init__(
            self,
            teacher: nn.Module,
            stats: tuple[Sequence[float], Sequence[float]],
            teacher_stats: tuple[Sequence[float], Sequence[float]],
            temperature: float = 4.,
            distill_weight: float = 1.,
            task_weight: float = 1.,
            autocast: Callable = nullcontext,
    ):
        super().__init__()
        self.teacher = teacher
        self.temperature = temperature
        self.distill_weight = distill_weight
        self.task_weight = task_weight
        self.autocast = autocast
        (mean, std), (teacher_mean, teacher_std) = (
            [torch.tensor(values).view(1, -1, 1, 1) for values in pair] for pair in (stats, teacher_stats))
        self.register_buffer('scale', std / teacher_std, persistent=False)
        self.register_buffer('shift', (mean - teacher_mean) / teacher_std, persistent=False)

    def forward(self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Loss with the teacher's answers.

        Args:
            loss: Mean loss of the labels, a scalar.
            logits: (B, C).
            images: Normalised images (B, C, H, W) that they are of.
        """
        with torch.no_grad():
            with self.autocast():
                target = self.teacher(torch.addcmul(self.shift, images, self.scale))
        student, target = (F.log_softmax(values.float() / self.temperature, dim=1) for values in (logits, target))
        divergence = F.kl_div(student, target, reduction='batchmean', log_target=True)
        return self.task_weight * loss + self.distill_weight * self.temperature ** 2 * divergence
